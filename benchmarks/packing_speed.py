"""How fast kernels are packed and unpacked on one core, and how fast a packed usm_0.6b opens, with how much memory.

    python benchmarks/packing_speed.py

Packing goes from an int8 code matrix and a mask to the bytes, unpacking from the bytes to the int8 code matrix in
row-major memory; rates are MB of the float32 kernel per second. Quantization is not included. For the file, a fresh
process imports the library, then calls `usm.load_packed`. Results go to `benchmarks/results/packing_speed.json`.
"""

import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from keras_usm_lite.data.manifest import replacing
from keras_usm_lite.packing.bits import pack_bits, transposed, unpack_bits
from keras_usm_lite.packing.patterns import (
    enumerative_bits,
    gather_kept,
    indices_to_mask,
    pack_patterns,
    pattern_table,
    scatter_kept,
    unpack_patterns,
    word_layout,
)
from keras_usm_lite.packing.positions import position_list_bits

RESULT = pathlib.Path(__file__).parent / "results" / "packing_speed.json"
TARGETS = {"packed": 300, "unpacked": 500}  # MB of float32 kernel per second on one core
ROWS = COLUMNS = 4096
REPEATS = 7
CASES = [("int8 2:4", 8, (2, 4)), ("int4 2:4", 4, (2, 4)), ("int2 2:4", 2, (2, 4))]
CASES += [("int8 1:4", 8, (1, 4)), ("int4 4:8", 4, (4, 8))]
CASES += [(f"int{bits} dense", bits, None) for bits in (8, 4, 3, 2)]
PRESET, VOCABULARY = "usm_0.6b", 16384


def pack_codes(codes, bits):
    """Return the codes, column after column, shifted by `2**(bits - 1)` to be unsigned."""
    return pack_bits(transposed(codes).ravel().view(np.uint8) + np.uint8(2 ** (bits - 1)), bits)


def unpack_codes(packed, bits, rows, columns):
    """Undo `pack_codes`."""
    codes = (unpack_bits(packed, bits, rows * columns) - np.uint8(2 ** (bits - 1))).view(np.int8)
    return transposed(codes.reshape(columns, rows))


def pack(codes, mask, bits, pattern):
    """Return the packed codes and, for an N:M pattern, the packed mask."""
    if pattern is None:
        return pack_codes(codes, bits), None
    return pack_codes(gather_kept(codes, mask, *pattern), bits), pack_patterns(mask, *pattern)


def unpack(packed_codes, packed_mask, bits, pattern):
    """Return the code matrix `[ROWS, COLUMNS]`."""
    if pattern is None:
        return unpack_codes(packed_codes, bits, ROWS, COLUMNS)
    mask = unpack_patterns(packed_mask, ROWS, COLUMNS, *pattern)
    n, m = pattern
    return scatter_kept(unpack_codes(packed_codes, bits, ROWS // m * n, COLUMNS), mask, n, m)


def megabytes_per_second(function, *arguments):
    """Return the median and the best rate of several runs, and the last result."""
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function(*arguments)
        rates.append(ROWS * COLUMNS * 4 / 1e6 / (time.perf_counter() - start))
    return statistics.median(rates), max(rates), result


def measure(bits, pattern, rng):
    """Return the rates of one kind of kernel and its size; stop if it does not come back the same."""
    codes = rng.integers(1 - 2 ** (bits - 1), 2 ** (bits - 1), (ROWS, COLUMNS)).astype("int8")
    mask = None
    if pattern:
        n, m = pattern
        mask = indices_to_mask(rng.integers(0, len(pattern_table(n, m)), (ROWS // m, COLUMNS)), n, m)
        codes *= mask
    packing, best_packing, packed = megabytes_per_second(pack, codes, mask, bits, pattern)
    unpacking, best_unpacking, restored = megabytes_per_second(unpack, *packed, bits, pattern)
    np.testing.assert_array_equal(restored, codes)
    size = sum(part.size for part in packed if part is not None)
    return {
        "packed": round(packing),
        "unpacked": round(unpacking),
        "best packed": round(best_packing),
        "best unpacked": round(best_unpacking),
        "bits per weight": 8 * size / codes.size,
    }


def measure_kernels():
    """Return the rates of all kinds of kernels, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rates, rng = {}, np.random.default_rng(0)
    for name, bits, pattern in CASES:
        rates[name] = measure(bits, pattern, rng)
        print(name, rates[name], flush=True)
    os.sched_setaffinity(0, cores)
    return rates


def print_mask_bits():
    """Print how many bits per weight a mask takes in either form, and takes at least."""
    print("mask bits per weight: words of k groups in B bits | lower bound | list of positions")
    for n, m in [(1, 4), (2, 4), (4, 8), (1, 8), (2, 8), (1, 16), (8, 16)]:
        groups, bits = word_layout(n, m)
        print(
            f"{n}:{m}: k={groups}, B={bits}: {bits / groups / m:.4f} | {enumerative_bits(n, m):.4f} | "
            f"{position_list_bits(n, m):.4f}"
        )


def write(path):
    """In a child: write the file."""
    import keras_usm_lite as usm

    model = usm.USMForCTC(VOCABULARY, PRESET, quantization="int4", sparsity="2:4")
    usm.update_masks(model)
    usm.save_packed(model, path)


def load(path):
    """In a child: open the file, and print what it took."""
    import keras_usm_lite as usm

    usm.USMForCTC(9, num_layers=1)  # whatever TensorFlow does once is not part of it
    before = peak_bytes()
    start = time.perf_counter()
    model = usm.load_packed(path)
    seconds = time.perf_counter() - start
    size = sum(math.prod(variable.shape) * np.dtype(variable.dtype).itemsize for variable in model.variables)
    found = {
        "preset": PRESET,
        "what": "int4 2:4",
        "file bytes": os.path.getsize(path),
        "seconds to load_packed": seconds,
        "bytes of the model's variables": size,
        "peak bytes before": before,
        "peak bytes": peak_bytes(),
    }
    print(json.dumps({**found, "growth of the peak by bytes of the variables": (found["peak bytes"] - before) / size}))


def peak_bytes():
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_child(step, path):
    """Run `write` or `load` in a fresh process and return its last line."""
    command = [sys.executable, os.path.abspath(__file__), step, path]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    return lines[-1] if lines else None


def main():
    """Measure everything and write the result."""
    if len(sys.argv) > 1:
        {"write": write, "load": load}[sys.argv[1]](sys.argv[2])
        return
    result = {"command": "python benchmarks/packing_speed.py", "load average": os.getloadavg()}
    result["MB of float32 kernel per second on one core"] = {"targets": TARGETS, **measure_kernels()}
    print_mask_bits()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.usm")
        run_child("write", path)
        result["load average at load_packed"] = os.getloadavg()
        result["load_packed"] = json.loads(run_child("load", path))
    print(json.dumps(result["load_packed"], indent=1))
    with replacing(RESULT) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
