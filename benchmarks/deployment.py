"""Every file that is deployed, at every width, dense and 2:4: sizes, latency on one thread, word errors and parity.

    python benchmarks/deployment.py                              # trains the small recogniser it needs
    python benchmarks/deployment.py --model outputs/finetune_usm_lite/float.keras

Sizes and latency are those of preset "small" with random weights, which decide neither. Word errors and parity are
those of a "tiny" recogniser of synthetic speech (espeak-ng), compressed after training by `usm.one_shot`; fine-tuning,
which would mend most of the loss, is left out. A run that was interrupted continues where it was.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "examples"))

CELLS = {f"{width} {pattern or 'dense'}": (width, pattern)
         for width in ("float", "int8", "int4", "int2") for pattern in (None, "2:4")}  # fmt: skip
SECONDS, SAMPLE_RATE = 10, 16000
FILES = {"packed": "model.usm", "archive": "archive.usm", "SavedModel": "saved_model", "LiteRT": "model.tflite"}


def parse_arguments():
    """Read the command line; the names that examples/finetune_usm_lite.py has mean the same here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model", dest="float_model", help="tiny float recogniser of synthetic_commands, a .keras file; default: train"
    )
    add("--epochs", type=int, default=12, help="epochs of that training (default 12)")
    add("--repeats", type=int, default=15, help="timed runs of each file, interleaved (default 15)")
    add("--output", default=os.path.join(ROOT, "outputs", "deployment"), help="folder for the files")
    parser.set_defaults(preset="tiny", learning_rate=2e-3, pretrained=None)
    return parser.parse_args()


def compressed(usm, model, width, pattern, calibration=None):
    """Return a compressed copy of a float model, its masks and integers made at once."""
    if (width, pattern) == ("float", None):
        return model
    quantization = None if width == "float" else usm.QuantizationConfig(bits=int(width[3:]), scale="mse")
    rules = {"depthwise|subsampling/conv": (None, None), "encoder/": (quantization, pattern)}
    copy = usm.compress(model, rules)
    if calibration is not None:
        usm.one_shot(copy, calibration)
        return copy
    if pattern is not None:
        usm.update_masks(copy)
    for layer in usm.compressed_layers(copy):
        if layer.quantization is not None:
            layer.update_scale()
    return copy


def write_files(usm, model, folder):
    """Write all files of a model and return `{kind: bytes on disk}`."""
    from finetune_usm_lite import size_on_disk

    paths = {kind: os.path.join(folder, name) for kind, name in FILES.items()}
    os.makedirs(folder, exist_ok=True)
    usm.save_packed(model, paths["packed"])
    usm.save_packed(model, paths["archive"], archive=True)
    usm.export_saved_model(model, paths["SavedModel"])
    usm.export_litert(model, paths["LiteRT"], sample_rate_input=SAMPLE_RATE)
    return {kind: size_on_disk(path) for kind, path in paths.items()}


def measure_parity(usm, model, dataset, tokenizer, path):
    """Export a model, hold the file against it, and return what the gate says."""
    usm.export_litert(model, path)
    try:
        parity = usm.verify_litert(model, path, dataset, tokenizer)
    except usm.ParityError as error:
        return {"failure": str(error)}
    return {
        "failure": None,
        "wer_keras": parity.keras.wer,
        "wer_litert": parity.litert.wer,
        "words": parity.keras.words,
        "utterances": parity.keras.utterances,
        "texts_differing": len(parity.differing),
        "frames": parity.frames,
        "frames_differing": parity.frames_differing,
        "logits_error": parity.logits_error,
        "kernels": parity.kernels,
        "integers": parity.integers,
    }


def run_cell(usm, small, tiny, task, name, folder):
    """Make one row of the table, or read the one an earlier run made."""
    from run_folder import write_json

    finished = os.path.join(folder, "cell.json")
    if os.path.exists(finished):
        with open(finished) as file:
            return json.load(file)
    print(f"{name} ...", flush=True)
    width, pattern = CELLS[name]
    start = time.time()
    row = {"bytes": write_files(usm, compressed(usm, small, width, pattern), folder)}
    model = compressed(usm, tiny, width, pattern, task.calibration_batch(64, 160))
    path = os.path.join(folder, "tiny.tflite")
    row["parity"] = measure_parity(usm, model, task.labelled("test"), task.tokenizer, path)
    row["seconds"] = time.time() - start
    write_json(finished, row)
    return row


def markdown(result):
    """Return the table as text."""
    lines = [
        f"Bytes and latency: preset small, {result['parameters']:,} parameters, random weights. Latency: median CPU "
        f"time of {result['repeats']} interleaved runs on one thread, {SECONDS} s of audio, front end included.",
        f"WER and parity: preset tiny, trained on {result['corpus']} (espeak-ng, not human speech), compressed "
        "after training by usm.one_shot without fine-tuning.",
        "",
        "| | packed | archive | SavedModel | .tflite | ms | x float | WER Keras | WER LiteRT | texts differing "
        "| logits error | integers equal |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    float_ms = result["cells"]["float dense"]["ms"]
    for name, row in result["cells"].items():
        sizes = " | ".join(f"{row['bytes'][kind]:,}" for kind in FILES)
        parity = row["parity"]
        if parity["failure"]:
            judged = f"refused: {parity['failure'].splitlines()[0]} | | | | "
        else:
            judged = (
                f"{parity['wer_keras']:.2%} | {parity['wer_litert']:.2%} | {parity['texts_differing']} of "
                f"{parity['utterances']} | {parity['logits_error']:.1e} | {parity['integers']:,}"
            )
        lines.append(f"| {name} | {sizes} | {row['ms']:.1f} | {float_ms / row['ms']:.2f} | {judged} |")
    return "\n".join(lines) + "\n"


def main():
    """Fill the table and write it to benchmarks/results."""
    args = parse_arguments()
    import finetune_usm_lite as example
    import keras
    from litert_profile import milliseconds
    from run_folder import remember_arguments

    import keras_usm_lite as usm

    keras.utils.set_random_seed(0)
    os.makedirs(args.output, exist_ok=True)
    task = usm.data.SpeechTask.prepare(usm.data.open_corpus("synthetic_commands"), seed=0, batch_frames=4000)
    remember_arguments(args, task.corpus, free=("output", "repeats"))
    tiny = example.train_float(usm, keras, task, args)
    keras.utils.set_random_seed(0)
    small = usm.USMForCTC(task.tokenizer.vocab_size, "small")
    folders = {name: os.path.join(args.output, name.replace(" ", "-").replace(":", "_")) for name in CELLS}
    cells = {name: run_cell(usm, small, tiny, task, name, folders[name]) for name in CELLS}
    shape = (SECONDS * SAMPLE_RATE,)
    files = {name: (os.path.join(folder, FILES["LiteRT"]), shape) for name, folder in folders.items()}
    for name, ms in milliseconds(files, args.repeats).items():
        cells[name]["ms"] = ms
    result = {
        "command": f"python benchmarks/deployment.py --epochs {args.epochs} --repeats {args.repeats}"
        + (" --model FLOAT.keras" if args.float_model else ""),
        "corpus": task.corpus.name,
        "parameters": small.count_params(),
        "seconds_of_audio": SECONDS,
        "repeats": args.repeats,
        "cells": cells,
    }
    table = markdown(result)
    path = os.path.join(ROOT, "benchmarks", "results", "deployment")
    example.write_json(path + ".json", result)
    with open(path + ".md", "w") as file:
        file.write(table)
    print(table)


if __name__ == "__main__":
    main()
