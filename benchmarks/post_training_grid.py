"""What compression without training costs: {float, int8, int4, int3, int2} x {dense, 4:8, 2:4, 1:4} on one float model.

    python benchmarks/post_training_grid.py --float-model float.usm --data CORPUS
    python benchmarks/post_training_grid.py --float-model float.usm --data CORPUS --only 'int4 2:4' --only 'int2 dense'

Every cell is compressed in several ways. The best is chosen on dev; test is read once per cell, for plain absmax and
magnitude and for the chosen way. The table goes to `benchmarks/results/post_training_CORPUS.{json,md}`; a run that is
interrupted continues, and refuses to if it was for another model. `--moonshine` as for `grid.py`.
"""

import argparse
import hashlib
import json
import os
import platform
import tempfile

from grid import RESULTS, commit, prepare
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


def size_of(usm, model):
    """Whole-file bytes of the packed form."""
    with tempfile.TemporaryDirectory() as folder:
        return os.path.getsize(usm.save_packed(model, os.path.join(folder, "model.usm")))


def measure(usm, task, float_model, float_texts, bits, pattern, calibration):
    """Return one cell as a dict."""
    models, dev = {}, {}
    for name, way in ways(usm, bits, pattern).items():
        models[name] = compressed(usm, float_model, way[0], pattern, *way[1:], calibration)
        references, texts = task.transcribe(models[name].predict_on_batch, "dev")
        dev[name] = usm.error_rates(references, texts).wer
        print(f"  dev {name:26} {dev[name]:7.2%}", flush=True)
    plain, best = next(iter(dev)), min(dev, key=dev.get)
    cell = {"bits": bits, "pattern": pattern, "dev": dev, "best": best, "commit": commit()}
    for kind, name in (("plain", plain), ("chosen", best)):
        references, texts = task.transcribe(models[name].predict_on_batch, "test")
        rates = usm.error_rates(references, texts)
        cell[kind] = {"way": name, "wer": rates.wer, "words": rates.words}
        if texts != float_texts:
            change = usm.paired_bootstrap(references, float_texts, texts)
            cell[kind] |= {"relative_change": change.relative_change, "interval": [change.low, change.high]}
    table = usm.report(models[best])
    cell["bits_per_weight"] = table.kernel_bits_per_weight if bits or pattern else 32.0
    cell["packed_bytes"], cell["float32_bytes"] = size_of(usm, models[best]), table.float32_bytes
    return cell


def as_markdown(content):
    """The table for readers."""
    lines = [
        f"Post-training compression of the float recogniser of {content['corpus']}, test WER (dev chose the way), "
        "95 % interval of the relative change against the float model from 10,000 paired draws.",
        "",
        "| bits | N:M | absmax, magnitude | best way | | relative | bits/weight | packed file, of FP32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in content["cells"]:
        plain, best = cell["plain"], cell["chosen"]
        change = "-"
        if "interval" in best:
            low, high = best["interval"]
            change = f"{best['relative_change']:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append(
            f"| {cell['bits'] or 'float'} | {cell['pattern'] or 'dense'} | {plain['wer']:.2%} | {best['wer']:.2%} | "
            f"{best['way']} | {change} | {cell['bits_per_weight']:.2f} | "
            f"{cell['packed_bytes'] / cell['float32_bytes']:.1%} |"
        )
    return "\n".join(lines) + "\n"


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
    from keras_usm_lite.data.manifest import replacing

    corpus = usm.data.open_corpus(args.data)
    task, _, _ = prepare(usm, args, seed=0)
    float_model = usm.load_packed(args.float_model)
    with open(args.float_model, "rb") as file:
        checksum = hashlib.sha256(file.read()).hexdigest()[:16]
    path = os.path.join(RESULTS, f"post_training_{corpus.name}.json")
    content = {
        "command": f"python benchmarks/post_training_grid.py --float-model float.usm --data {corpus.name} "
        f"{'--moonshine FOLDER ' if args.moonshine else ''}--utterances {args.utterances} --frames {args.frames}",
        "corpus": corpus.name,
        "float_model": checksum,
        "versions": {"keras": keras.__version__, "python": platform.python_version()},
        "cells": [],
    }
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        if before["float_model"] != checksum or before["command"] != content["command"]:
            raise SystemExit(f"{path} is of another model or command. Move it away to measure this one.")
        content = before
    calibration = task.calibration_batch(args.utterances, args.frames)
    _, float_texts = task.transcribe(float_model.predict_on_batch, "test")
    done = {(cell["bits"], cell["pattern"]) for cell in content["cells"]}
    for bits in BITS:
        for pattern in PATTERNS:
            if (bits, pattern) in done or (args.only and cell_name(bits, pattern) not in args.only):
                continue
            print(cell_name(bits, pattern), flush=True)
            content["cells"].append(measure(usm, task, float_model, float_texts, bits, pattern, calibration))
            content["cells"].sort(key=lambda cell: (BITS.index(cell["bits"]), PATTERNS.index(cell["pattern"])))
            with replacing(path) as temporary:
                with open(temporary, "w") as file:
                    json.dump(content, file, indent=1)
    with replacing(path.replace(".json", ".md")) as temporary:
        with open(temporary, "w") as file:
            file.write(as_markdown(content))
    print(as_markdown(content))


if __name__ == "__main__":
    main()
