"""Publish a trained recogniser: packed file, `.tflite`, tokeniser and a model card in one small folder.

    python examples/publish.py compressed.keras --data CORPUS --name commands_int4_2_4 --licence "CC BY 4.0, ..." \\
        --made "python examples/finetune_usm_lite.py --data CORPUS"

A model that is a packed file, model.usm, is published anew. The card's word error rates are measured here, on the whole
test split, from the model and from the very `.tflite` that is published. The folder appears, or takes the place of the
one before, as a whole, and only if the packed kernels reload bit for bit, the `.tflite` passes `usm.verify_litert` on
the recordings, and all files together are small enough.
"""

import argparse
import json
import os

from finetune_report import describe_split
from float_model import check_fit

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 10_000_000  # bytes of all files of a published model
CARD = """# {name}

{what}

| | |
|---|---|
| word error rate | **{wer:.2%}** (95 % interval {low:.2%} to {high:.2%}, bootstrap over utterances), {words:,} words, {utterances:,} utterances of the test split |
| character error rate | {cer:.2%} |
| the same from `model.tflite` | {litert_wer:.2%}; {differing} of {utterances} texts differ |
| data | {data} |
| licence of the data | {licence} |
| split | {split} |
| units | {units} |
| weights | {weights:,}, {share:.1%} of them compressed to {bits:.2f} bits with scales |
| `model.usm`{archive} | {packed:,} bytes, {packed_share:.1%} of FP32 |
| `model.tflite` (16 kHz audio in, logits out) | {tflite:,} bytes, {tflite_share:.1%} of FP32 |
| made by | `{made}` |

```python
import keras_usm_lite

model = keras_usm_lite.load_packed("saved_models/{name}/model.usm")  # features in, logits out
```

```
python examples/transcribe.py saved_models/{name}/model.tflite recording.wav
```

**Limits.** Knows the words and the kind of speech of its training data and nothing else; {limits}. Greedy decoding, no language model. Not tested on phones.
"""  # noqa: E501


def parse_arguments(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="trained recogniser, float or compressed, a .keras or a .usm file")
    add("--data", required=True, help="folder or name of the corpus it was trained on")
    add("--name", required=True, help="name of the folder that is made")
    add("--licence", required=True, help="licence of the data and who is to be named")
    add("--made", required=True, help="command that trained the model")
    add("--limits", default="expect much higher error rates elsewhere", help="what a user should know")
    add("--archive", action="store_true", help="smallest packed file: entropy-coded, scales bfloat16, the rest int8")
    add("--folder", default=os.path.join(ROOT, "saved_models"), help="where to put it (default saved_models)")
    args = parser.parse_args(arguments)
    if args.name in ("", ".", "..") or os.path.basename(args.name) != args.name:
        parser.error(f"argument --name: {args.name!r} is not the name of a folder; give one such as commands_int4_2_4")
    target = os.path.join(args.folder, args.name)
    if os.path.exists(target) and not os.path.exists(os.path.join(target, "card.json")):
        parser.error(f"{target} exists and is not a published model (no card.json); choose another --name or --folder")
    return args


def wer_interval(usm, references, texts, draws=10_000, seed=0):
    """Return the 95 % interval of a word error rate, from a bootstrap over utterances."""
    import numpy as np

    pairs = [usm.error_rates([a], [b]) for a, b in zip(references, texts, strict=True)]
    errors = np.array([pair.substitutions + pair.deletions + pair.insertions for pair in pairs])
    words = np.array([pair.words for pair in pairs])
    picks = np.random.default_rng(seed).integers(len(pairs), size=(draws, len(pairs)))
    return np.quantile(errors[picks].sum(axis=1) / words[picks].sum(axis=1), [0.025, 0.975]).tolist()


def open_model(usm, path):
    """Return the trained recogniser; stop if the file is none."""
    import keras

    if not os.path.isfile(path) or not path.endswith((".keras", ".usm")):
        raise SystemExit(f"{path} is no .keras or .usm file; give what model.save or usm.save_packed wrote.")
    return usm.load_packed(path) if path.endswith(".usm") else keras.models.load_model(path, compile=False)


def open_task(usm, model, args):
    """Return the task of a corpus; stop if the model was not trained for it."""
    task = usm.data.SpeechTask.prepare(usm.data.open_corpus(args.data))
    check_fit(usm, task, model, args.model)
    return task


def write_packed(usm, model, task, path, archive):
    """Write the packed file and return the model that it reads back to; stop unless that is the same.

    An archive rounds scales and what has no codes, so only the integers are the same; all else on the card is measured
    on the model that is returned.
    """
    import numpy as np

    if archive:
        smallest = {"archive": True, "scales": "bfloat16", "others": "int8", "vectors": "int8"}
        reloaded = usm.load_packed(usm.save_packed(model, path, **smallest))
        layers = [[layer for layer in usm.compressed_layers(one) if layer.quantization] for one in (model, reloaded)]
        parts = [[layer.quantized_kernel()[0] for layer in some] for some in layers]
    else:
        reloaded = usm.load_packed(usm.save_packed(model, path))
        parts = [[layer.effective_kernel() for layer in usm.compressed_layers(one)] for one in (model, reloaded)]
    # Logits of a large batch may differ in their last bits: threads add up in the order in which they finish.
    features = task.batches["dev"][0][0]
    logits = [one.predict_on_batch(features) for one in (model, reloaded)]
    if not all(map(np.array_equal, *parts)) or not (archive or np.allclose(*logits, rtol=1e-4, atol=1e-4)):
        raise RuntimeError("The packed file does not reload to the same model; please report this.")
    return reloaded


def write_litert(usm, model, task, path):
    """Write the `.tflite` and return what `verify_litert` says of it, on the recordings of the test split."""
    frontend = task.frontend
    usm.export_litert(model, path, sample_rate_input=frontend.sample_rate, frontend=frontend)
    return usm.verify_litert(model, path, task.utterances["test"], task.tokenizer, tolerance=0.01, frontend=frontend)


def describe(usm, args, model, task, folder):
    """Write all files of a published model; return the text of its card."""
    model = write_packed(usm, model, task, os.path.join(folder, "model.usm"), args.archive)
    references, texts = task.transcribe(model.predict_on_batch, "test")
    rates, (low, high) = usm.error_rates(references, texts), wer_interval(usm, references, texts)
    parity = write_litert(usm, model, task, os.path.join(folder, "model.tflite"))
    usm.save_tokenizer(task.tokenizer, os.path.join(folder, "tokenizer.json"))
    table = usm.report(model)
    sizes = {name: os.path.getsize(os.path.join(folder, f"model.{name}")) for name in ("usm", "tflite")}
    kinds = sorted({f"{row.quantization or 'float'} {row.sparsity or 'dense'}" for row in table.rows if row.compressed})
    corpus, tokenizer = task.corpus, task.tokenizer
    card = {
        "name": args.name,
        "what": f"A Conformer-CTC speech recogniser, {' and '.join(kinds) or 'float'}, for Keras, LiteRT and phones.",
        "wer": rates.wer,
        "low": low,
        "high": high,
        "cer": rates.cer,
        "words": rates.words,
        "utterances": rates.utterances,
        "litert_wer": parity.litert.wer,
        "differing": len(parity.differing),
        "data": f"{corpus.name}, {'synthetic speech (espeak-ng)' if corpus.synthetic else 'recorded speech'}",
        "licence": args.licence,
        "split": describe_split(task),
        "units": f"{tokenizer.vocab_size - 1} {corpus.tokens}s" if corpus.tokens == "word" else "characters",
        "weights": table.weights,
        "share": table.compressed_share,
        "bits": table.kernel_bits_per_weight if kinds else 32.0,
        "archive": ", an archive" if args.archive else "",
        "packed": sizes["usm"],
        "packed_share": sizes["usm"] / table.float32_bytes,
        "tflite": sizes["tflite"],
        "tflite_share": sizes["tflite"] / table.float32_bytes,
        "made": args.made,
        "limits": args.limits,
    }
    text = CARD.format(**card)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(text)
    with open(os.path.join(folder, "card.json"), "w") as file:
        json.dump(card, file, indent=1)
    return text


def main(arguments=None):
    """Write and describe everything beside the target, then put it there."""
    args = parse_arguments(arguments)
    import keras_usm_lite as usm
    from keras_usm_lite.data.corpora.cache import replacing_folder

    model = open_model(usm, args.model)
    task = open_task(usm, model, args)
    with replacing_folder(os.path.join(args.folder, args.name)) as folder:
        text = describe(usm, args, model, task, folder)
        total = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
        if total > LIMIT:
            raise SystemExit(f"The files hold {total:,} bytes; a published model has at most {LIMIT:,}.")
    print(text)


if __name__ == "__main__":
    main()
