"""USM-Lite from speech to phone: train a float recogniser, fine-tune it low-bit and N:M sparse, measure, export.

    python examples/finetune_usm_lite.py                       # speech is found, downloaded or synthesised
    python examples/finetune_usm_lite.py --data my_corpus      # a folder with train.tsv, dev.tsv, test.tsv

A run that was interrupted continues where it was when started again with the same --output. After the report the run
counts as failed (exit status 1) if the packed file does not reload bit for bit, or if the word error rate of the
.tflite in LiteRT differs from Keras' by more than 0.01 (one percentage point).
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import time

from finetune_report import failures, print_report, summarise
from float_model import load_float_model
from run_folder import remember_arguments, write_json

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Arguments that do not decide what the models become; what --data meant is remembered as the corpus itself.
FREE_ARGUMENTS = ("data", "on_bad", "control", "output")


def parse_arguments(arguments=None):
    """Read the command line and refuse what could only fail later."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with train.tsv, dev.tsv, test.tsv, or the name of a corpus; default: "
        "$KERAS_USM_LITE_DATA, else a corpus prepared earlier, else a download, else synthetic speech")  # fmt: skip
    add("--on-bad", default="skip", choices=("skip", "raise"), help="rows that cannot be used, such as missing or "
        "empty recordings: leave them out and list them in left_out.json, or stop (default skip)")  # fmt: skip
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
    add("--float-model", help="a float model to start from instead of training one: the .keras of an "
        "earlier run, or a packed .usm")  # fmt: skip
    add("--pretrained", help="an encoder.weights.h5 of pretrain_best_rq.py that float training starts from")
    add("--output", default="outputs/finetune_usm_lite", help="folder for models and report")
    add("--seed", type=int, default=0, help="seed of initialisation, order and augmentation (default 0)")
    args = parser.parse_args(arguments)
    for name in ("epochs", "finetune_epochs", "batch_frames"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is below 1")
    for name in ("float_model", "pretrained"):
        path = getattr(args, name)
        if path is not None and not os.path.isfile(path):
            parser.error(f"argument --{name.replace('_', '-')}: there is no file {path!r}; correct the path")
    try:
        try_compression(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def try_compression(args):
    """Compress one untrained block of the preset: a ValueError if the options do not fit it or each other."""
    import keras

    import keras_usm_lite as usm

    compress(usm, usm.USMForCTC(2, args.preset, num_layers=1), args)
    keras.utils.clear_session()  # layers are named as if this had not been


def train(usm, task, model, args, name, epochs, learning_rate, callbacks=(), warmup=None):
    """Train a model, with a backup in every epoch until NAME.keras is written."""
    batches, backup = task.batches["train"], os.path.join(args.output, f"backup-{name}")
    usm.compile_ctc(model, learning_rate, epochs * len(batches), warmup)
    usm.fit_ctc(model, batches, task.batches["dev"], task.tokenizer, epochs, callbacks=callbacks, backup_dir=backup)
    save_model(model, os.path.join(args.output, f"{name}.keras"))
    shutil.rmtree(backup)
    return model


def train_float(usm, keras, task, args):
    """Train the float model, or load the one that an earlier start left."""
    earlier = os.path.join(args.output, "float.keras")
    if os.path.exists(earlier):
        print(f"\nfloat model: loaded from {earlier}")
        return load_float_model(task, earlier)
    print(f"\nfloat training: {args.epochs} epochs")
    model = usm.USMForCTC(
        task.tokenizer.vocab_size,
        args.preset,
        num_mel_bins=task.frontend.num_mel_bins,
        spec_augment={"frequency_width": 15, "time_masks": 2},  # gentle: a short training on few hours of speech
    )
    if args.pretrained:
        keras.saving.load_weights(model.encoder, args.pretrained)
    return train(usm, task, model, args, "float", args.epochs, args.learning_rate)


def compress(usm, model, args):
    """Return a compressed copy of the float model: every projection of the encoder."""
    quantization = usm.QuantizationConfig(bits=args.bits, scale=args.scale)
    sparsity = None if args.sparsity == "none" else usm.SparsityConfig.resolve(args.sparsity)
    return usm.compress(model, {"depthwise|subsampling/conv": (None, None), "encoder/": (quantization, sparsity)})


def fine_tune(usm, keras, task, model, args, name):
    """Fine-tune a model, or load a finished one."""
    finished = os.path.join(args.output, f"{name}.keras")
    if os.path.exists(finished):
        print(f"\n{name} model: loaded from {finished}")
        return keras.models.load_model(finished)
    print(f"\nfine-tuning, {name}: {args.finetune_epochs} epochs")
    callbacks = schedules(usm, model, args, len(task.batches["train"]))
    rate = args.finetune_learning_rate
    return train(usm, task, model, args, name, args.finetune_epochs, rate, callbacks, warmup=0.1)


def schedules(usm, model, args, steps):
    """Make masks in five shots over the first third of the steps, and search "mse" scales anew in every epoch."""
    layers, callbacks = usm.compressed_layers(model), []
    if any(layer.sparsity is not None for layer in layers):
        callbacks.append(usm.callbacks.NMPruning(num_shots=5, interval=max(args.finetune_epochs * steps // 15, 1)))
    if layers and args.scale == "mse":  # the others follow the kernel by themselves
        callbacks.append(usm.callbacks.QuantizationSchedule([(0, args.bits)], scale_interval=steps))
    return callbacks


@contextlib.contextmanager
def timed(seconds, stage, finished=None):
    """Note the seconds that a stage takes in this start, or "loaded" if its result is there already."""
    loaded, start = finished is not None and os.path.exists(finished), time.monotonic()
    yield
    seconds[stage] = "loaded" if loaded else round(time.monotonic() - start, 1)


def save_model(model, path):
    """Write a .keras file, all or nothing."""
    part = f"{path.removesuffix('.keras')}.part.keras"
    model.save(part)
    os.replace(part, path)


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


def main(arguments=None):
    """Run everything and print the report."""
    args = parse_arguments(arguments)
    import keras

    import keras_usm_lite as usm

    keras.utils.set_random_seed(args.seed)
    os.makedirs(args.output, exist_ok=True)
    corpus = usm.data.open_corpus(args.data) if args.data else usm.data.default_corpus()
    task = usm.data.SpeechTask.prepare(corpus, batch_frames=args.batch_frames, seed=args.seed, on_bad=args.on_bad)
    given = load_float_model(task, args.float_model) if args.float_model else None  # or refused, before all else
    batches = len(task.batches["train"])  # fewer if recordings have gone, and then the schedules no longer fit
    remember_arguments(args, corpus, FREE_ARGUMENTS, files=("float_model", "pretrained"), batches_per_epoch=batches)
    left_out = {split: [dataclasses.asdict(row) for row in rows] for split, rows in task.problems.items()}
    write_json(os.path.join(args.output, "left_out.json"), left_out)

    seconds, float_path = {}, args.float_model or os.path.join(args.output, "float.keras")
    with timed(seconds, "float training", float_path):
        float_model = train_float(usm, keras, task, args) if given is None else given
    post_training = compress(usm, float_model, args)
    usm.update_masks(post_training)
    for layer in usm.compressed_layers(post_training):
        layer.update_scale()  # of what is left
    with timed(seconds, "fine-tuning", os.path.join(args.output, "compressed.keras")):
        model = fine_tune(usm, keras, task, compress(usm, float_model, args), args, "compressed")
    candidates = {"float": float_model, "post-training": post_training, "fine-tuned": model}
    if args.control:
        with timed(seconds, "control", os.path.join(args.output, "control.keras")):
            copy = load_float_model(task, float_path)
            candidates["float, fine-tuned"] = fine_tune(usm, keras, task, copy, args, "control")

    rates, texts = {}, {}
    for name, candidate in candidates.items():
        references, texts[name] = task.transcribe(candidate.predict_on_batch, "test")
        rates[name] = usm.error_rates(references, texts[name])
    with timed(seconds, "files"):
        sizes, paths = write_files(usm, keras, task, float_model, model, args.output)
    litert_texts, differing, factor = run_litert(usm, task, paths["compressed .tflite"], texts["fine-tuned"])
    rates["fine-tuned, LiteRT"] = usm.error_rates(references, litert_texts)
    exact = check_packed(usm, model, paths["packed .usm"])
    summary = summarise(usm, args, task, float_model, model, rates)
    summary |= {
        "bytes": sizes,
        "packed_reloads_bit_identical": exact,
        "litert_texts_differing": len(differing),
        "litert_real_time_factor": factor,
        "seconds": seconds,
    }
    write_json(os.path.join(args.output, "report.json"), summary)
    print_report(args, corpus, summary, rates, differing)
    failed = failures(exact, rates)
    if failed:
        raise SystemExit(f"FAILED: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
