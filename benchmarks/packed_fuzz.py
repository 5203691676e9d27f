"""Thousands of damaged packed files are read: each is refused with a clear error, or is what it says it is.

    python benchmarks/packed_fuzz.py

Every attempt loads one mutation (`packed_mutations.py`) of one of a few small files. A mutation leaves the checksums
as they were, or makes all of them anew so that it reaches the checks behind them. Outcomes:

* refused: `PackedFileError`
* same: the model of the file that was not damaged, such as after a change of a label
* other file: another model; right only if the checksums were made anew, for then it is a file somebody could write
* bad: another model behind old checksums, any other exception, more than 10 s, more than 256 MB, a dead process

Attempt `i` depends on `--seed` and `i` alone. The exit status is 1 if an attempt was bad.
"""

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings

os.environ.setdefault("KERAS_BACKEND", "torch")  # builds small models fastest, and starts no threads with these:
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
from keras import ops
from packed_mutations import SHARES, mutated

import keras_usm_lite as usm
from keras_usm_lite.data.manifest import replacing

RESULT = pathlib.Path(__file__).parent / "results" / "packed_fuzz.json"
SECONDS, MEGABYTES = 10, 256  # of processor time and memory; more for one file is a failure
PATIENCE = 6  # a worker may take so many times as long on a machine that others use
ADDRESS_SPACE = 4 * 2**30  # that a worker may add to what it has when it starts: nothing harms the machine
GOOD = ("refused", "same", "other file")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=10_500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first attempt, to repeat one")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    return parser.parse_args()


def small_files():
    """Return the files that are damaged: every form of layer, of codes, of masks, of scales, and a recogniser."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((8,)),
        usm.QuantDense(32, "int4", sparsity="2:4", name="int4"),
        usm.QuantDense(24, usm.QuantizationConfig(bits=2, scale="mse"), name="int2"),
        usm.QuantDense(16, "int8", sparsity="1:4", name="int8"),
        usm.QuantDense(12, None, sparsity="2:4", name="float"),
        usm.QuantDense(8, usm.QuantizationConfig(bits=4, codebook="asymmetric"), sparsity="2:4", name="asymmetric"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(3, name="dense"),
    ]
    model = keras.Sequential(layers, name="small")
    rng = np.random.default_rng(0)
    for weight in model.trainable_variables:  # most codes are zero, which makes them worth a coder
        weight.assign(rng.normal(size=weight.shape) ** 9 / 100)
    usm.update_masks(model)
    sizes = {"num_layers": 1, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 8}
    recogniser = usm.USMForCTC(5, quantization="int4", sparsity="2:4", **sizes)
    usm.update_masks(recogniser)
    cases = {
        "plain": (model, {}),
        "archive": (model, {"archive": True}),
        "reduced": (model, {"masks": "positions", "scales": "bfloat16", "others": "int8"}),
        "recogniser": (recogniser, {}),
    }
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, options) in cases.items():
            files[name] = pathlib.Path(usm.save_packed(source, os.path.join(folder, "a"), **options)).read_bytes()
    return files


def mutation(number, seed, files):
    """Return base file, family, mutated bytes and whether the checksums were made anew, for one attempt."""
    draw = random.Random(f"{seed} {number}")
    names = [*files]
    while True:
        base = draw.choices(names, [1] * (len(names) - 1) + [0.3])[0]
        (family,) = draw.choices([*SHARES], [*SHARES.values()])
        other = files[draw.choice(names)]
        content, repaired = mutated(files[base], other, family, draw)
        if content != files[base]:
            return base, family, content, repaired


def fingerprint(model):
    """Return a hash of what a packed file promises: effective kernels, other variables, configuration."""
    layers = usm.compressed_layers(model)
    state = {id(weight) for layer in layers for weight in layer.weights if weight is not layer.bias}
    digest = hashlib.sha256()
    for tensor in [layer.effective_kernel() for layer in layers] + [w for w in model.weights if id(w) not in state]:
        array = np.ascontiguousarray(ops.convert_to_numpy(tensor))
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    config = keras.saving.serialize_keras_object(model)
    digest.update(json.dumps(config, default=repr).encode())
    return digest.hexdigest()


def outcome(path, expected, repaired):
    """Load a file and return `(class, detail)`."""
    try:
        model = usm.load_packed(path)
    except usm.PackedFileError as error:
        return "refused", str(error).replace(path, "", 1)
    except BaseException as error:
        return f"exception {type(error).__name__}", "".join(traceback.format_exception(error)[-6:])
    if fingerprint(model) == expected:
        return "same", ""
    return ("other file", "") if repaired else ("wrong model behind old checksums", "")


def memory(key):
    """Return a figure of /proc/self/status in MB."""
    return int(re.search(rf"{key}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024


def worker(connection, files, seed):
    """Answer each attempt's number with its outcome, time and memory."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path, expected = os.path.join(folder, "a.usm"), {}
        for name, content in files.items():
            for _ in range(2):  # code and buffers of the backend are loaded before memory is measured
                pathlib.Path(path).write_bytes(content)
                expected[name] = fingerprint(usm.load_packed(path))
        limit = int(memory("VmSize") * 2**20) + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        connection.send("ready")
        for number in iter(connection.recv, None):
            base, family, content, repaired = mutation(number, seed, files)
            pathlib.Path(path).write_bytes(content)
            del content
            connection.send((base, family))
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before, start = memory("VmRSS"), time.process_time()
            kind, detail = outcome(path, expected[base], repaired)
            seconds, grown = time.process_time() - start, memory("VmHWM") - before
            if grown > MEGABYTES and kind in GOOD:
                kind = f"more than {MEGABYTES} MB"
            if seconds > SECONDS and kind in GOOD:
                kind = f"more than {SECONDS} s"
            connection.send((kind, detail, seconds, grown))


class Worker:
    """A process that is replaced when it hangs or dies."""

    def __init__(self, *arguments):
        self.arguments, self.process = arguments, None

    def ask(self, number):
        """Return base file, family, outcome, detail, seconds and megabytes of one attempt."""
        if self.process is None:
            self._start()
        self.connection.send(number)
        base, family = self.connection.recv()
        try:
            if self.connection.poll(PATIENCE * SECONDS):
                return base, family, *self.connection.recv()
            kind = f"more than {SECONDS} s"
        except EOFError:
            kind = "dead process"
        self.process.kill()
        self.process.join()
        self.process = None
        return base, family, kind, "", float(SECONDS), 0.0

    def _start(self):
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=worker, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()

    def end(self):
        """Let the process end by itself, so that its processor time is counted."""
        if self.process is not None:
            self.connection.send(None)
            self.process.join()


def heading(message):
    """Return the beginning of an error message without what differs from file to file."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "_", message.lstrip(": ")[:300])
    return message.split("\n")[0][:60]


def main():
    arguments = parse_arguments()
    started = time.perf_counter()
    files = small_files()
    process = Worker(files, arguments.seed)
    tally, refusals = collections.Counter(), collections.Counter()
    families = collections.defaultdict(collections.Counter)
    bad, slowest, largest = [], 0.0, 0.0
    for number in range(arguments.start, arguments.start + arguments.attempts):
        base, family, kind, detail, seconds, grown = process.ask(number)
        tally[kind] += 1
        families[family][kind] += 1
        refusals[heading(detail)] += kind == "refused"
        slowest, largest = max(slowest, seconds), max(largest, grown)
        if kind not in GOOD:
            bad.append({"attempt": number, "file": base, "family": family, "kind": kind, "megabytes": round(grown),
                        "detail": detail[-2000:]})  # fmt: skip
            print(f"attempt {number}: {kind} ({family} of {base}, {grown:.0f} MB)\n{detail[-1500:]}", flush=True)
    process.end()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {
        "command": f"python benchmarks/packed_fuzz.py --attempts {arguments.attempts} --seed {arguments.seed}",
        "attempts": arguments.attempts,
        "files": {name: len(content) for name, content in files.items()},
        "outcomes": dict(tally.most_common()),
        "families": {family: dict(counts.most_common()) for family, counts in sorted(families.items())},
        "different_refusals": len(+refusals),
        "refusals": dict(refusals.most_common(40)),
        "slowest_s": round(slowest, 2),
        "largest_growth_mb": round(largest, 1),
        "processor_s": round(sum(who.ru_utime + who.ru_stime for who in usage)),
        "seconds": round(time.perf_counter() - started),
        "bad": bad,
    }
    write(result, arguments.output)
    sys.exit(1 if bad else 0)


def write(result, path):
    """Write the JSON and print what matters of it."""
    os.makedirs(path.parent, exist_ok=True)
    with replacing(os.fspath(path)) as temporary, open(temporary, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    for family, counts in result["families"].items():
        print(f"{family:15} {listed(counts)}")
    print(f"{result['attempts']} attempts in {result['processor_s']} s of processor time: {listed(result['outcomes'])}")
    print(f"slowest {result['slowest_s']} s, largest growth {result['largest_growth_mb']} MB, "
          f"{result['different_refusals']} different refusals")  # fmt: skip


def listed(counts):
    """Return counts as a text."""
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


if __name__ == "__main__":
    main()
