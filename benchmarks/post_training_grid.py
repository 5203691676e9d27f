"""What compression without training costs: {float, int8, int4, int3, int2} x {dense, 4:8, 2:4, 1:4} on one float model.

    python benchmarks/post_training_grid.py --float-model float.usm --data CORPUS
    python benchmarks/post_training_grid.py --float-model float.usm --data CORPUS --only 'int4 2:4' --only 'int2 dense'

Every cell is compressed in several ways. The best is chosen on dev; of it and of plain absmax and magnitude all files
are written, and the archives are read back. Test is read once per cell, for these two. The table goes to
`benchmarks/results/post_training_CORPUS.{json,md}`; a run that is interrupted continues, and refuses to if it was for
another model. `--moonshine` as for `grid.py`.
"""

import argparse
import json
import os
import platform
import tempfile

from grid import ARCHIVE_VERSION, RESULTS, checksum, commit, prepare, written
from grid_plan import BITS, CONVOLUTIONS, ENCODER, PATTERNS, cell_name

LEFT_OUT = {CONVOLUTIONS: (None, None)}


def ways(usm, bits, pattern):
    """Return `{name: (quantization, permute, one-shot)}` for one cell; the first is the paper's."""
    if bits is None:
        found = {"magnitude": (None, False, False)}
        return {**found, "permuted, compensated": (None, True, True)} if pattern else found
    mse = usm.QuantizationConfig(bits, scale="mse")
    found = {"absmax": (usm.QuantizationConfig(bits), False, False), "mse": (mse, False, False)}
    permute = pattern is not None
    found["compensated"] = (mse, permute, True)
    if bits < 4:
        found["compensated, midrise"] = (mse.replace(codebook="midrise"), permute, True)
        found["compensated, asymmetric"] = (mse.replace(codebook="asymmetric"), permute, True)
    return found


def compressed(usm, float_model, quantization, pattern, permute, clever, calibration):
    """Return one compressed copy, nothing trained."""
    if quantization is None and pattern is None:
        return float_model
    if permute:
        sparse = usm.compress(float_model, {**LEFT_OUT, ENCODER: (None, pattern)})
        usm.permute_channels(sparse)
        float_model = sparse
    model = usm.compress(float_model, {**LEFT_OUT, ENCODER: (quantization, pattern)})
    if clever:
        usm.one_shot(model, calibration)
    elif pattern is not None:
        usm.update_masks(model)
    return model


def measure(usm, task, float_model, float_texts, bits, pattern, calibration):
    """Return one cell as a dict: what every way has on dev, then plain and chosen way with their files."""
    models, dev = {}, {}
    for name, way in ways(usm, bits, pattern).items():
        models[name] = compressed(usm, float_model, way[0], pattern, *way[1:], calibration)
        dev[name] = usm.error_rates(*task.transcribe(models[name].predict_on_batch, "dev")).wer
        print(f"  dev {name:26} {dev[name]:7.2%}", flush=True)
    cell = {"bits": bits, "pattern": pattern, "dev": dev, "commit": commit()}
    for kind, name in (("plain", next(iter(dev))), ("chosen", min(dev, key=dev.get))):
        same = kind == "chosen" and name == cell["plain"]["way"]
        cell[kind] = cell["plain"] if same else read_back(usm, task, models[name], name, float_texts)
    return cell


def read_back(usm, task, model, name, float_texts):
    """Write every file of a model; return their sizes, and what the archive has on dev and test."""
    with tempfile.TemporaryDirectory() as folder:
        paths = written(usm, task, model, os.path.join(folder, "model"))
        sizes = {kind: os.path.getsize(path) for kind, path in paths.items()}
        archive = usm.load_packed(paths["archive"])
    dev = usm.error_rates(*task.transcribe(archive.predict_on_batch, "dev"))
    references, texts = task.transcribe(archive.predict_on_batch, "test")
    table = usm.report(model)
    found = {
        "way": name,
        "dev_wer": dev.wer,
        "wer": usm.error_rates(references, texts).wer,
        "bits_per_weight": table.kernel_bits_per_weight if usm.compressed_layers(model) else 32.0,
        "bytes": {**sizes, "float32": table.float32_bytes},
        "archive_version": ARCHIVE_VERSION,
    }
    if texts != float_texts:
        change = usm.paired_bootstrap(references, float_texts, texts)
        found |= {"relative_change": change.relative_change, "interval": [change.low, change.high]}
    return found


def as_markdown(content):
    """The table for readers."""
    lines = [
        f"Post-training compression of the float recogniser of {content['corpus']}: absmax and magnitude, and the way "
        "that dev chose before it was packed, which may have codes of its own and so larger files. Error rates of the "
        "archive; 95 % interval of the relative change against the float model from 10,000 paired draws. Whole files, "
        "of FP32.",
        "",
        "| | way | test WER | relative | dev WER | bits/weight | packed | archive | .tflite |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for cell in content["cells"]:
        name = cell_name(cell["bits"], cell["pattern"])
        for way in [cell["plain"], cell["chosen"]][cell["plain"]["way"] == cell["chosen"]["way"] :]:
            lines.append(f"| {' | '.join([name, *described(way)])} |")
    return "\n".join(lines) + "\n"


def described(way):
    """One way to compress a cell, as the columns of the table."""
    change = "-"
    if "interval" in way:
        change = "{:+.1%} ({:+.1%} to {:+.1%})".format(way["relative_change"], *way["interval"])
    sizes = [f"{way['bytes'][kind] / way['bytes']['float32']:.1%}" for kind in ("packed", "archive", "tflite")]
    errors = [f"{way['wer']:.2%}", change, f"{way['dev_wer']:.2%}"]
    return [way["way"], *errors, f"{way['bits_per_weight']:.2f}", *sizes]


def results_so_far(path, args, corpus):
    """Return what an earlier run of the same command measured, or no cells."""
    import keras

    content = {
        "command": f"python benchmarks/post_training_grid.py --float-model float.usm --data {corpus} "
        f"{'--moonshine FOLDER ' if args.moonshine else ''}--utterances {args.utterances} --frames {args.frames}",
        "corpus": corpus,
        "float_model": checksum(args.float_model),
        "versions": {"keras": keras.__version__, "python": platform.python_version()},
        "cells": [],
    }
    if not os.path.exists(path):
        return content
    with open(path) as file:
        before = json.load(file)
    if before["float_model"] != content["float_model"] or before["command"] != content["command"]:
        raise SystemExit(f"{path} is of another model or command. Move it away to measure this one.")
    return before


def keep(path, text):
    """Write one of the results."""
    from keras_usm_lite.data.manifest import replacing

    with replacing(path) as temporary, open(temporary, "w") as file:
        file.write(text)


def main():
    """Measure the cells that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--float-model", required=True, help="packed file of a trained float recogniser")
    parser.add_argument("--data", required=True, help="folder or name of the corpus it was trained on")
    parser.add_argument("--moonshine", help="folder of the Moonshine weights, for a float model made of them")
    parser.add_argument("--only", action="append", help="a cell such as 'int4 2:4'; all of them by default")
    parser.add_argument("--utterances", type=int, default=128, help="training recordings to calibrate with")
    parser.add_argument("--frames", type=int, default=300, help="10 ms frames of each of them")
    args = parser.parse_args()

    import keras

    import keras_usm_lite as usm

    corpus = usm.data.open_corpus(args.data)
    task, _, _ = prepare(usm, args, seed=0)
    float_model = usm.load_packed(args.float_model)
    path = os.path.join(RESULTS, f"post_training_{corpus.name}.json")
    content = results_so_far(path, args, corpus.name)
    calibration = task.calibration_batch(args.utterances, args.frames)
    content["cells"] = [cell for cell in content["cells"] if "bytes" in cell["chosen"]]  # by earlier code: anew
    done = {(cell["bits"], cell["pattern"]) for cell in content["cells"]}
    asked = [(b, p) for b in BITS for p in PATTERNS if not args.only or cell_name(b, p) in args.only]
    missing = [cell for cell in asked if cell not in done]
    float_texts = missing and task.transcribe(float_model.predict_on_batch, "test")[1]
    for bits, pattern in missing:
        print(cell_name(bits, pattern), flush=True)
        content["cells"].append(measure(usm, task, float_model, float_texts, bits, pattern, calibration))
        content["cells"].sort(key=lambda cell: (BITS.index(cell["bits"]), PATTERNS.index(cell["pattern"])))
        keep(path, json.dumps(content, indent=1))
        keras.utils.clear_session()
    keep(path.replace(".json", ".md"), as_markdown(content))
    print(as_markdown(content))


if __name__ == "__main__":
    main()
