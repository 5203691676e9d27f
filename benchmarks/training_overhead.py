"""What int4, 2:4 and both cost in training: whole steps of preset "small" against those of the float model.

    python benchmarks/training_overhead.py                       # TensorFlow and JAX, one after the other

A step is CTC loss, dropout, SpecAugment, gradients and AdamW as `usm.compile_ctc` sets them up, on one batch of random
speech-like shapes. The models take turns, so that whatever else the machine does meets all of them; a ratio is the
median over the rounds of (step of the model / step of the float model in the same round). Masks are made beforehand:
`NMPruning` makes them a few times in a training, not in every step.

Two more int4 models, one without the gradient of the scale and one without computing a scale, tell what int4's time is
spent on: the median difference between a model and the one that does a part less.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
RESULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "training_overhead.json")
MODELS = {
    "dense": (None, None),
    "QuantDense int4": ({"bits": 4}, None),
    "NMSparseDense 2:4": (None, "2:4"),
    "joint int4 + 2:4": ({"bits": 4}, "2:4"),
    "int4, no gradient of its scale": ({"bits": 4, "stop_scale_gradient": True}, None),
    "int4, stored scale": ({"bits": 4, "scale": "mse"}, None),
}
TARGETS = {"QuantDense int4": 1.10, "NMSparseDense 2:4": 1.05, "joint int4 + 2:4": 1.15}
PROFILE = ("dense", "int4, stored scale", "int4, no gradient of its scale", "QuantDense int4")  # each adds a part
PARTS = ("rounding and its gradient", "the scale, max|w|", "gradient of the scale")
VOCABULARY = 1024


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backends", nargs="+", default=["tensorflow", "jax"], help="Keras backends (default tensorflow jax)")
    add("--batch", type=int, nargs=2, default=(8, 500), metavar=("UTTERANCES", "FRAMES"),
        help="shape of the batch (default 8 500: the 4000 frames of SpeechTask)")  # fmt: skip
    add("--rounds", type=int, default=24, help="timed steps of each model (default 24)")
    add("--preset", default="small", help="model size (default small)")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args):
    """Return the seconds of every step, `{model: [seconds]}`."""
    import keras
    import numpy as np

    import keras_usm_lite as usm

    utterances, frames = args.batch
    draw = np.random.default_rng(0)
    x = {
        "features": draw.normal(size=(utterances, frames, 80)).astype("float32"),
        "lengths": np.full(utterances, frames, "int32"),
    }
    y = draw.integers(1, VOCABULARY, (utterances, frames // 25)).astype("int32")  # four tokens a second
    models = {}
    for name, (quantization, sparsity) in MODELS.items():
        keras.utils.set_random_seed(0)
        quantization = quantization and usm.QuantizationConfig(**quantization)
        model = usm.USMForCTC(VOCABULARY, args.preset, quantization=quantization, sparsity=sparsity)
        if sparsity is not None:
            usm.update_masks(model)
        models[name] = usm.compile_ctc(model, 1e-3, steps=1000)
        for _ in range(2):
            model.train_on_batch(x, y)
        print(f"  {name}: compiled", file=sys.stderr, flush=True)
    seconds = {name: [] for name in models}
    for number in range(args.rounds):
        names = list(models)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            float(models[name].train_on_batch(x, y))  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return seconds, keras.distribution.list_devices()[0].split(":")[0]


def summarize(backend, device, seconds, load):
    """Return the ratios of one backend as a dict and print them."""
    row = {"backend": backend, "device": device, "load_average": load, "rounds": len(seconds["dense"]), "ratios": {}}
    row["median_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{backend}, {device}: float step {row['median_seconds']['dense']:.3f} s, load average {load:.1f}")
    for name, target in TARGETS.items():
        ratios = [one / dense for one, dense in zip(seconds[name], seconds["dense"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        row["ratios"][name] = {"median": median, "quartiles": [low, high], "target": target, "met": median <= target}
        print(f"  {name:18} {median:.3f} ({low:.3f} to {high:.3f}), target {target:.2f}")
    row["int4_profile"] = {}
    for part, less, more in zip(PARTS, PROFILE[:-1], PROFILE[1:], strict=True):
        shares = [(b - a) / dense for a, b, dense in zip(seconds[less], seconds[more], seconds["dense"], strict=True)]
        row["int4_profile"][part] = statistics.median(shares)
        print(f"  of int4: {part:26} {row['int4_profile'][part]:+.3f} float steps")
    return row


def main():
    """Measure each backend in a process of its own and write the result."""
    args = parse_arguments()
    if args.child:
        seconds, device = measure(args)
        print(json.dumps({"seconds": seconds, "device": device}))
        return
    from keras_usm_lite.data.manifest import replacing

    rows = []
    for backend in args.backends:
        command = [sys.executable, os.path.abspath(__file__), "--child", *sys.argv[1:]]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(summarize(backend, found["device"], found["seconds"], os.getloadavg()[0]))
    result = {"preset": args.preset, "batch": args.batch, "cpu": platform.processor(), "cores": os.cpu_count()}
    with replacing(RESULT) as temporary, open(temporary, "w") as file:
        json.dump({**result, "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
