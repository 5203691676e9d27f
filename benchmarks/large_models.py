"""The big presets on one machine: a training step of usm_0.6b; usm_2b built, compressed, packed and reloaded.

    python benchmarks/large_models.py                 # both, each part in a process of its own
    python benchmarks/large_models.py --part train    # usm_0.6b, joint int4 + 2:4, on JAX: 19.1 GiB
    python benchmarks/large_models.py --part pack     # usm_2b, on TensorFlow: 16.1 GiB

Weights are random: they decide neither memory nor time. Peak memory is the resident set of the process, TensorFlow and
Python included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
RESULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "large_models.json")
PARTS = {"train": ("train",), "pack": ("pack", "load")}
# TensorFlow's own executor makes all quantized kernels at once, which takes more memory than XLA's schedule.
BACKENDS = {"train": "jax", "pack": "tensorflow", "load": "tensorflow"}
VOCABULARY = 16384  # sentence pieces, as USM has
FRAMES = 400  # 10 ms each


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this part; default: all")
    parser.add_argument("--child", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def train(folder):
    """Three joint training steps of usm_0.6b: masks made before the first, which also compiles."""
    import keras
    import numpy as np

    import keras_usm_lite as usm

    clock = Clock()
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(VOCABULARY, "usm_0.6b", quantization="int4", sparsity="2:4")
    clock.lap("build")
    model.compile(keras.optimizers.AdamW(1e-4), keras.losses.CTC())
    draw = np.random.default_rng(0)
    x = {"features": draw.normal(size=(1, FRAMES, 80)).astype("float32"), "lengths": np.array([FRAMES], "int32")}
    y = draw.integers(1, VOCABULARY, (1, 20)).astype("int32")
    losses, steps = [], []
    follow = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: steps.append(-time.perf_counter()),
        on_train_batch_end=lambda batch, logs: steps.append(steps.pop() + time.perf_counter()),
    )
    for _ in range(3):
        history = model.fit(x, y, verbose=0, callbacks=[usm.callbacks.NMPruning(), follow])
        losses += history.history["loss"]
    clock.lap("three steps with masks and compiling")
    kept = [float(keras.ops.mean(layer.mask)) for layer in usm.compressed_layers(model) if layer.sparsity is not None]
    return {
        "preset": "usm_0.6b",
        "parameters": model.count_params(),
        "trainable": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        "batch": [1, FRAMES],
        "losses": losses,
        "step_seconds": steps,
        "kept": [min(kept), max(kept)],
        **clock.laps,
    }


def pack(folder):
    """Build usm_2b compressed, make its masks, write it; remember what its kernels are."""
    import keras

    import keras_usm_lite as usm

    clock = Clock()
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(VOCABULARY, "usm_2b", quantization="int4", sparsity="2:4")
    clock.lap("build")
    usm.update_masks(model)
    clock.lap("make the masks")
    path = usm.save_packed(model, os.path.join(folder, "usm_2b.usm"))
    clock.lap("save_packed")
    weights = sum(int(keras.ops.size(weight)) for weight in model.trainable_weights)
    found = {"preset": "usm_2b", "weights": weights, "float32_bytes": 4 * weights, "bytes": os.path.getsize(path)}
    return {**found, "bits_per_weight": 8 * found["bytes"] / weights, "crc32": fingerprint(usm, model), **clock.laps}


def load(folder):
    """Reload usm_2b in a fresh process and recognise four seconds."""
    import numpy as np

    import keras_usm_lite as usm

    clock = Clock()
    model = usm.load_packed(os.path.join(folder, "usm_2b.usm"))
    clock.lap("load_packed")
    logits = np.array(model(np.zeros((1, FRAMES, 80), "float32")))
    clock.lap("forward pass of four seconds of audio")
    return {"crc32": fingerprint(usm, model), "finite": bool(np.isfinite(logits).all()), **clock.laps}


def fingerprint(usm, model):
    """CRC-32 of all effective kernels, one after the other."""
    import numpy as np

    crc = 0
    for layer in usm.compressed_layers(model):
        crc = zlib.crc32(np.ascontiguousarray(layer.effective_kernel()), crc)
    return crc


class Clock:
    """Seconds of each stage of a part."""

    def __init__(self):
        self.laps, self._last = {}, time.perf_counter()

    def lap(self, name):
        """End a stage."""
        now = time.perf_counter()
        self.laps[f"seconds to {name}" if not name.startswith(("three", "forward")) else f"seconds of {name}"] = (
            now - self._last
        )
        self._last = now
        print(f"{name}: {self.laps}, peak {peak_bytes() / 2**30:.1f} GiB", file=sys.stderr, flush=True)


def peak_bytes():
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_child(step, folder):
    """Run a step in a process of its own and return what it found."""
    command = [sys.executable, os.path.abspath(__file__), "--child", step, folder]
    environment = {**os.environ, "KERAS_BACKEND": BACKENDS[step]}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Run the parts and write the result."""
    args = parse_arguments()
    if args.child:
        step, folder = args.child
        found = {"train": train, "pack": pack, "load": load}[step](folder)
        print(json.dumps({**found, "peak_bytes": peak_bytes()}))
        return
    from keras_usm_lite.data.manifest import replacing

    results = {}
    if os.path.exists(RESULT):
        with open(RESULT) as file:
            results = json.load(file)
    for part in [args.part] if args.part else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            for step in PARTS[part]:
                results[step] = run_child(step, folder)
                print(step, json.dumps(results[step], indent=2), flush=True)
        if part == "pack" and results["pack"]["crc32"] != results["load"]["crc32"]:
            raise SystemExit("The reloaded kernels differ from the packed ones.")
    with replacing(RESULT) as temporary, open(temporary, "w") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
