"""Publish a trained recogniser: packed file, `.tflite`, tokeniser and a model card in one small folder.

    python examples/publish.py compressed.keras --data CORPUS --name commands_int4_2_4 --licence "CC BY 4.0, ..." \\
        --made "python examples/finetune_usm_lite.py --data CORPUS"

The card's word error rate is measured here, on the whole test split, from the model that is published; the files are
written only if the packed file reloads bit for bit and the `.tflite` passes `usm.verify_litert`.
"""

import argparse
import json
import os

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
| split | speakers or voices of the test split are in no other split |
| units | {units} |
| weights | {weights:,}, {share:.1%} of them compressed to {bits:.2f} bits with scales |
| `model.usm` | {packed:,} bytes, {packed_share:.1%} of FP32 |
| `model.tflite` (16 kHz audio in, logits out) | {tflite:,} bytes, {tflite_share:.1%} of FP32 |
| made by | `{made}` |

```python
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
    add("model", help="trained recogniser, float or compressed, a .keras file")
    add("--data", required=True, help="folder or name of the corpus it was trained on")
    add("--name", required=True, help="name of the folder that is made")
    add("--licence", required=True, help="licence of the data and who is to be named")
    add("--made", required=True, help="command that trained the model")
    add("--limits", default="expect much higher error rates elsewhere", help="what a user should know")
    add("--folder", default=os.path.join(ROOT, "saved_models"), help="where to put it (default saved_models)")
    return parser.parse_args(arguments)


def wer_interval(usm, references, texts, draws=10_000, seed=0):
    """Return the 95 % interval of a word error rate, from a bootstrap over utterances."""
    import numpy as np

    pairs = [usm.error_rates([a], [b]) for a, b in zip(references, texts, strict=True)]
    errors = np.array([pair.substitutions + pair.deletions + pair.insertions for pair in pairs])
    words = np.array([pair.words for pair in pairs])
    picks = np.random.default_rng(seed).integers(len(pairs), size=(draws, len(pairs)))
    return np.quantile(errors[picks].sum(axis=1) / words[picks].sum(axis=1), [0.025, 0.975]).tolist()


def write_files(usm, model, task, folder):
    """Write the packed file, the `.tflite` and the tokeniser; return what `verify_litert` found."""
    import numpy as np

    packed = usm.save_packed(model, os.path.join(folder, "model.usm"))
    reloaded = usm.load_packed(packed)
    kernels = [[layer.effective_kernel() for layer in usm.compressed_layers(one)] for one in (model, reloaded)]
    # Logits of a large batch may differ in their last bits: threads add up in the order in which they finish.
    features = task.batches["dev"][0][0]
    logits = [one.predict_on_batch(features) for one in (model, reloaded)]
    if not all(map(np.array_equal, *kernels)) or not np.allclose(*logits, rtol=1e-4, atol=1e-4):
        raise RuntimeError("The packed file does not reload to the same model; please report this.")
    usm.save_tokenizer(task.tokenizer, os.path.join(folder, "tokenizer.json"))
    path = os.path.join(folder, "model.tflite")
    parity = usm.verify_litert(
        model, usm.export_litert(model, path), task.labelled("test"), task.tokenizer, tolerance=0.01
    )
    usm.export_litert(model, path, sample_rate_input=task.frontend.sample_rate, frontend=task.frontend)
    return parity


def main(arguments=None):
    """Measure, write, and describe."""
    args = parse_arguments(arguments)
    import keras

    import keras_usm_lite as usm

    model = keras.models.load_model(args.model, compile=False)
    corpus = usm.data.open_corpus(args.data)
    task = usm.data.SpeechTask.prepare(corpus)
    folder = os.path.join(args.folder, args.name)
    os.makedirs(folder, exist_ok=True)
    references, texts = task.transcribe(model.predict_on_batch, "test")
    rates, (low, high) = usm.error_rates(references, texts), wer_interval(usm, references, texts)
    parity = write_files(usm, model, task, folder)
    table = usm.report(model)
    sizes = {name: os.path.getsize(os.path.join(folder, f"model.{name}")) for name in ("usm", "tflite")}
    kinds = sorted({f"{row.quantization or 'float'} {row.sparsity or 'dense'}" for row in table.rows if row.compressed})
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
        "units": f"{task.tokenizer.vocab_size - 1} {corpus.tokens}s" if corpus.tokens == "word" else "characters",
        "weights": table.weights,
        "share": table.compressed_share,
        "bits": table.kernel_bits_per_weight if kinds else 32.0,
        "packed": sizes["usm"],
        "packed_share": sizes["usm"] / table.float32_bytes,
        "tflite": sizes["tflite"],
        "tflite_share": sizes["tflite"] / table.float32_bytes,
        "made": args.made,
        "limits": args.limits,
    }
    with open(os.path.join(folder, "README.md"), "w") as file:
        file.write(CARD.format(**card))
    with open(os.path.join(folder, "card.json"), "w") as file:
        json.dump(card, file, indent=1)
    total = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    if total > LIMIT:
        raise SystemExit(f"{folder} holds {total:,} bytes; a published model has at most {LIMIT:,}.")
    print(CARD.format(**card))


if __name__ == "__main__":
    main()
