"""What compression without training does to a real pre-trained speech encoder, Moonshine-tiny (7.7M parameters).

    python benchmarks/moonshine_encoder.py --weights FOLDER --data CORPUS

`FOLDER` holds `weights_f32.npz` of the encoder and `reference_io.npz`, one second of speech with the encoder's output.
The encoder is built in Keras (`moonshine.py`) and held against that reference; then every projection is compressed
with `usm.compress`, as the paper does before it trains (absmax, magnitude) and with compensation (`usm.one_shot` with
mse scales, calibrated on training recordings). The table, `results/moonshine_encoder.json`, gives the error of the
encoder's output on recordings of the dev split: `sum |h - h^|^2 / sum |h - mean h|^2`. Its weights lie on an 8-bit grid
already. The table is written after every cell; started again, the same command goes on where it stopped.
"""

import argparse
import itertools
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import moonshine
import numpy as np
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.data.manifest import replacing

RESULT = pathlib.Path(__file__).parent / "results" / "moonshine_encoder.json"
WIDTHS, PATTERNS = (None, "int8", "int4", "int3", "int2"), (None, "4:8", "2:4", "1:4")


def compressed(encoder, width, pattern, compensated, calibration):
    """Return a compressed copy, nothing trained."""
    quantization = width and usm.QuantizationConfig(int(width[3:]), scale="mse" if compensated else "absmax")
    model = usm.compress(encoder, {".": (quantization, pattern)})
    if compensated:
        usm.one_shot(model, calibration)
    elif pattern:
        usm.update_masks(model)
    return model


def output(model, features):
    """The output for one recording; not by `predict`, which would compile for every length."""
    return ops.convert_to_numpy(model(features, training=False))


def output_error(model, recordings, expected):
    """Error of the output over all recordings, relative to the variance of what is expected."""
    error = sum(np.square(output(model, x) - h).sum() for x, h in zip(recordings, expected, strict=True))
    frames = np.concatenate([h[0] for h in expected])
    return float(error / np.square(frames - frames.mean(axis=0)).sum())


def finished(result):
    """Return the rows that the same command has already written."""
    if not RESULT.exists():
        return []
    before = json.loads(RESULT.read_text())
    return before["output error"] if before["command"] == result["command"] else []


def main():
    """Build, verify, compress, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="folder of weights_f32.npz and reference_io.npz")
    parser.add_argument("--data", required=True, help="folder or name of an English corpus")
    parser.add_argument("--recordings", type=int, default=40, help="of the dev split (default 40)")
    args = parser.parse_args()
    folder = pathlib.Path(args.weights)
    frontend, encoder = moonshine.load(dict(np.load(folder / "weights_f32.npz")))
    difference = moonshine.check(frontend, encoder, np.load(folder / "reference_io.npz"))
    print(f"largest difference from the reference {difference:.1e}", flush=True)
    corpus = usm.data.open_corpus(args.data)
    train, dev = (usm.data.read_manifest(corpus.splits[split]) for split in ("train", "dev"))

    def heard(utterance, samples=None):
        return ops.convert_to_numpy(frontend(usm.data.load_audio(utterance.path)[None, :samples]))

    recordings = [heard(utterance) for utterance in dev[:: max(len(dev) // args.recordings, 1)]]
    expected = [output(encoder, features) for features in recordings]
    long = [utterance for utterance in train if utterance.duration > 4][:64]
    calibration = np.concatenate([heard(utterance, 64000) for utterance in long])
    result = {
        "command": f"python benchmarks/moonshine_encoder.py --weights FOLDER --data {corpus.name} "
        f"--recordings {args.recordings}",
        "recordings": len(recordings), "frames": sum(h.shape[1] for h in expected),
        "calibration frames": int(np.prod(calibration.shape[:2])),
        "largest difference from the reference": difference,
    }  # fmt: skip
    result["output error"] = finished(result)
    done = [(row["bits"], row["pattern"]) for row in result["output error"]]
    for width, pattern in itertools.product(WIDTHS, PATTERNS):
        row = {"bits": width or "float", "pattern": pattern or "dense"}
        if not (width or pattern) or (*row.values(),) in done:
            continue
        for way, compensated in (("absmax, magnitude", False), ("compensated", True)):
            model = compressed(encoder, width, pattern, compensated, calibration)
            row[way] = output_error(model, recordings, expected)
        print(row, flush=True)
        result["output error"].append(row)
        with replacing(RESULT) as temporary:
            pathlib.Path(temporary).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
