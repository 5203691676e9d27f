"""USM-Lite from speech to phone: train a float recogniser, fine-tune it low-bit and N:M sparse, measure, export.

    python examples/finetune_usm_lite.py                       # speech is found, downloaded or synthesised
    python examples/finetune_usm_lite.py --data my_corpus      # a folder with train.tsv, dev.tsv, test.tsv

A run that was interrupted continues where it was when started again with the same --output.
"""

import argparse
import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with train.tsv, dev.tsv, test.tsv, or the name of a corpus; default: "
        "$KERAS_USM_LITE_DATA, else a corpus prepared earlier, else a download, else synthetic speech")  # fmt: skip
    add("--bits", type=int, default=4, choices=(8, 4, 3, 2), help="bits per weight (default 4)")
    add("--sparsity", default="2:4", help="non-zeros:group, such as 2:4, 1:4, 4:8, or 'none' (default 2:4)")
    add("--scale", default="absmax", choices=("absmax", "mse", "learned"), help="scale estimator (default absmax)")
    add("--epochs", type=int, default=18, help="epochs of float training (default 18)")
    add("--finetune-epochs", type=int, default=8, help="epochs of compressed fine-tuning (default 8)")
    add("--learning-rate", type=float, default=2e-3, help="peak rate of float training (default 0.002)")
    add("--finetune-learning-rate", type=float, default=1e-3, help="peak rate of fine-tuning (default 0.001)")
    add("--batch-frames", type=int, default=4000, help="10 ms frames per training batch (default 4000)")
    add("--preset", default="tiny", help="model size: tiny (1M), small (10M), ... (default tiny)")
    add("--control", action="store_true", help="also fine-tune the float model for the same epochs, so that "
        "the cost of compression is told apart from the gain of training longer")  # fmt: skip
    add("--float-model", help="a float .keras model of an earlier run to start from instead of training one")
    add("--pretrained", help="an encoder.weights.h5 of pretrain_best_rq.py that float training starts from")
    add("--output", default="outputs/finetune_usm_lite", help="folder for models and report")
    add("--seed", type=int, default=0, help="seed of initialisation, order and augmentation (default 0)")
    return parser.parse_args()


def train_float(usm, keras, task, args):
    """Train the float model, or load the one a finished or earlier run left."""
    finished = os.path.join(args.output, "float.keras")
    earlier = args.float_model or finished
    if os.path.exists(earlier):
        print(f"\nfloat model: loaded from {earlier}")
        return keras.models.load_model(earlier)
    print(f"\nfloat training: {args.epochs} epochs")
    model = usm.USMForCTC(
        task.tokenizer.vocab_size,
        args.preset,
        num_mel_bins=task.frontend.num_mel_bins,
        spec_augment={"frequency_width": 15, "time_masks": 2},  # gentle: a short training on few hours of speech
    )
    if args.pretrained:
        keras.saving.load_weights(model.encoder, args.pretrained)
    train = task.batches["train"]
    usm.compile_ctc(model, args.learning_rate, args.epochs * len(train))
    backup = os.path.join(args.output, "backup-float")
    usm.fit_ctc(model, train, task.batches["dev"], task.tokenizer, args.epochs, backup_dir=backup)
    save_model(model, finished)
    return model


def compress(usm, model, args):
    """Return a compressed copy of the float model: every projection of the encoder."""
    quantization = usm.QuantizationConfig(bits=args.bits, scale=args.scale)
    sparsity = None if args.sparsity == "none" else args.sparsity
    return usm.compress(model, {"depthwise|subsampling/conv": (None, None), "encoder/": (quantization, sparsity)})


def fine_tune(usm, keras, task, model, args, name):
    """Fine-tune a model, masks made in five shots over the first third of the steps, or load a finished one."""
    finished = os.path.join(args.output, f"{name}.keras")
    if os.path.exists(finished):
        print(f"\n{name} model: loaded from {finished}")
        return keras.models.load_model(finished)
    train = task.batches["train"]
    steps = args.finetune_epochs * len(train)
    pruning = []
    if any(layer.sparsity is not None for layer in usm.compressed_layers(model)):
        pruning = [usm.callbacks.NMPruning(num_shots=5, interval=max(steps // 15, 1))]
    print(f"\nfine-tuning, {name}: {args.finetune_epochs} epochs")
    usm.compile_ctc(model, args.finetune_learning_rate, steps)
    backup = os.path.join(args.output, f"backup-{name}")
    usm.fit_ctc(
        model, train, task.batches["dev"], task.tokenizer, args.finetune_epochs, callbacks=pruning, backup_dir=backup
    )
    save_model(model, finished)
    return model


def remember_arguments(args):
    """Refuse to continue a run that was started with other arguments: its files would be mixed up."""
    path = os.path.join(args.output, "arguments.json")
    asked = {name: value for name, value in vars(args).items() if name not in ("output", "control")}
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        changed = sorted(name for name in asked if asked[name] != before.get(name))
        if changed:
            raise SystemExit(
                f"{args.output} holds a run with other arguments ({', '.join(changed)} changed). "
                "Give another --output, or delete the folder."
            )
    write_json(path, asked)


def save_model(model, path):
    """Write a .keras file, all or nothing."""
    part = f"{path.removesuffix('.keras')}.part.keras"
    model.save(part)
    os.replace(part, path)


def write_json(path, content):
    """Write a JSON file, all or nothing."""
    with open(path + ".part", "w") as file:
        json.dump(content, file, indent=2)
    os.replace(path + ".part", path)


def write_files(usm, keras, task, float_model, model, folder):
    """Write every artefact and return `{name: bytes on disk}`."""
    paths = {
        "float .keras": os.path.join(folder, "float.keras"),
        "compressed .keras": os.path.join(folder, "compressed.keras"),
        "packed .usm": os.path.join(folder, "model.usm"),
        "float .tflite": os.path.join(folder, "float.tflite"),
        "compressed .tflite": os.path.join(folder, "model.tflite"),
        "SavedModel": os.path.join(folder, "saved_model"),
    }
    usm.save_tokenizer(task.tokenizer, os.path.join(folder, "tokenizer.json"))
    if not os.path.exists(paths["float .keras"]):
        save_model(float_model, paths["float .keras"])
    usm.save_packed(model, paths["packed .usm"])
    rate = task.frontend.sample_rate
    usm.export_litert(float_model, paths["float .tflite"], sample_rate_input=rate, frontend=task.frontend)
    usm.export_litert(model, paths["compressed .tflite"], sample_rate_input=rate, frontend=task.frontend)
    usm.export_saved_model(model, paths["SavedModel"], frontend=task.frontend)
    return {name: size_on_disk(path) for name, path in paths.items()}, paths


def size_on_disk(path):
    """Bytes of a file, or of all files of a folder."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(root, file)) for root, _, files in os.walk(path) for file in files)


def check_packed(usm, model, path):
    """True if the packed file reloads to bit-identical effective kernels."""
    import numpy as np

    pairs = zip(usm.compressed_layers(model), usm.compressed_layers(usm.load_packed(path)), strict=True)
    return all(np.array_equal(a.effective_kernel(), b.effective_kernel()) for a, b in pairs)


def run_litert(usm, task, path, keras_texts, show=5):
    """Transcribe all test recordings from the `.tflite`, raw audio in; count texts that differ from Keras'."""
    recognizer = usm.LiteRTRecognizer(path, task.tokenizer)
    texts, seconds, duration = [], 0.0, 0.0
    print("\nheld-out recordings, transcribed from the .tflite by LiteRT on one thread:")
    for number, utterance in enumerate(task.utterances["test"]):
        text, taken = recognizer.transcribe(task.audio(utterance))
        texts.append(text)
        seconds, duration = seconds + taken, duration + utterance.duration
        if number < show:
            print(f"  {os.path.basename(utterance.path)}: {text!r} (spoken: {utterance.text!r})")
    differing = [(a, b) for a, b in zip(keras_texts, texts, strict=True) if a != b]
    return texts, differing, seconds / duration


def main():
    """Run everything and print the report."""
    args = parse_arguments()
    import keras

    import keras_usm_lite as usm

    keras.utils.set_random_seed(args.seed)
    os.makedirs(args.output, exist_ok=True)
    remember_arguments(args)
    corpus = usm.data.open_corpus(args.data) if args.data else usm.data.default_corpus()
    task = usm.data.SpeechTask.prepare(corpus, batch_frames=args.batch_frames, seed=args.seed)

    float_model = train_float(usm, keras, task, args)
    post_training = compress(usm, float_model, args)
    usm.update_masks(post_training)
    model = fine_tune(usm, keras, task, compress(usm, float_model, args), args, "compressed")
    candidates = {"float": float_model, "post-training": post_training, "fine-tuned": model}
    if args.control:
        copy = keras.models.load_model(args.float_model or os.path.join(args.output, "float.keras"))
        candidates["float, fine-tuned"] = fine_tune(usm, keras, task, copy, args, "control")

    rates, texts = {}, {}
    for name, candidate in candidates.items():
        references, texts[name] = task.transcribe(candidate.predict_on_batch, "test")
        rates[name] = usm.error_rates(references, texts[name])
    sizes, paths = write_files(usm, keras, task, float_model, model, args.output)
    litert_texts, differing, factor = run_litert(usm, task, paths["compressed .tflite"], texts["fine-tuned"])
    rates["fine-tuned, LiteRT"] = usm.error_rates(references, litert_texts)
    exact = check_packed(usm, model, paths["packed .usm"])
    print_report(usm, args, corpus, model, rates, sizes, differing, factor, exact)


def print_report(usm, args, corpus, model, rates, sizes, differing, factor, exact):
    """Print the result and write it to report.json."""
    table = usm.report(model)
    speech = "SYNTHETIC SPEECH (espeak-ng), not human recordings" if corpus.synthetic else "recorded speech"
    print(f"\n{'=' * 100}\nUSM-Lite report: int{args.bits}, N:M {args.sparsity}, preset {args.preset}")
    print(f"data: {corpus.name}, {speech}. {corpus.description}")
    print("\ntest split, speakers or voices not heard in training, greedy decoding, no language model:")
    for name, rate in rates.items():
        change = "" if name == "float" else f"   {rate.wer / max(rates['float'].wer, 1e-9) - 1:+.1%} relative"
        print(f"  {name:20} {rate}{change}")
    if not args.control:
        print(
            f"  (fine-tuning added {args.finetune_epochs} epochs; --control trains the float model as long, to compare)"
        )
    tensors = len(usm.compressed_layers(model))
    print(f"\nweights: {table.weights:,}; {table.compressed_share:.1%} of them, in {tensors} tensors,", end=" ")
    print(f"are compressed to {table.kernel_bits_per_weight:.3f} bits per weight with scales")
    print(f"\nbytes on disk (FP32 weights alone: {table.float32_bytes:,})")
    for name, size in sizes.items():
        print(f"  {name:20} {size:12,}   {size / table.float32_bytes:7.2%} of FP32")
    print(f"\npacked file reloads to bit-identical effective kernels: {'yes' if exact else 'NO'}")
    print(f"LiteRT against Keras: {len(differing)} of {rates['float'].utterances} texts differ", end="")
    print(" (LiteRT quantizes activations to int8)" if differing else "")
    for expected, got in differing[:5]:
        print(f"  Keras {expected!r}  LiteRT {got!r}")
    print(f"LiteRT real-time factor on one thread: {factor:.4f}")
    summary = {
        "corpus": corpus.name,
        "synthetic": corpus.synthetic,
        "arguments": {
            name: value
            for name, value in vars(args).items()
            if name not in ("data", "output", "float_model", "pretrained")
        },
        "pretrained": args.pretrained is not None,
        "error_rates": {name: {"wer": rate.wer, "cer": rate.cer, "words": rate.words} for name, rate in rates.items()},
        "bytes": sizes,
        "float32_bytes": table.float32_bytes,
        "kernel_bits_per_weight": table.kernel_bits_per_weight,
        "compressed_share": table.compressed_share,
        "packed_reloads_bit_identical": exact,
        "litert_texts_differing": len(differing),
        "litert_real_time_factor": factor,
    }
    write_json(os.path.join(args.output, "report.json"), summary)
    print(f"\nfiles and report.json: {args.output}")


if __name__ == "__main__":
    main()
