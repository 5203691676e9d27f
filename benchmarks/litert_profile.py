"""Where the time of a `.tflite` file goes: preset "small" taken apart, each part timed as a file of its own.

    python benchmarks/litert_profile.py

Ten seconds of audio, one thread, median CPU time of interleaved calls, float and int4 kernels, random weights. What the
parts take beside their projections is float arithmetic in both files: no weight format makes it faster.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "examples"))
SAMPLES, FRAMES, STEPS, BINS, VOCABULARY = 160_000, 997, 250, 80, 64  # samples, 10 ms frames, 40 ms frames
WIDTHS = {"float": None, "int4": "int4"}


def parts(usm, keras, size, quantization):
    """Return `{part: (shape of the input, layer, how often the model holds it, names of its projections)}`."""
    dim, layers = size["dim"], size["num_layers"]
    block = usm.ConformerBlock(size["num_heads"], size["kernel_size"], quantization=quantization)
    subsampling = usm.USMEncoder(**size, quantization=quantization).subsampling
    steps = (STEPS, dim)
    flat = (STEPS, BINS // 4 * size["subsampling_channels"])

    def dense(units):
        return usm.QuantDense(units, quantization)

    return {
        "front end": ((SAMPLES,), usm.LogMel(BINS), 1, []),
        "subsampling": ((FRAMES, BINS), subsampling, 1, ["flat to d"]),
        "feed-forward": (steps, block.ffn_start, 2 * layers, ["d to 4d", "4d to d"]),
        "attention": (steps, block.attention, layers, 4 * ["d to d"]),
        "light convolution": (steps, block.conv, layers, ["d to 2d", "d to d"]),
        "norms between them": (steps, keras.layers.LayerNormalization(), 2 * layers, []),
        "head": (steps, keras.layers.Dense(VOCABULARY), 1, []),
        "d to d": (steps, dense(dim), 0, []),
        "d to 2d": (steps, dense(2 * dim), 0, []),
        "d to 4d": (steps, dense(4 * dim), 0, []),
        "4d to d": ((STEPS, 4 * dim), dense(dim), 0, []),
        "flat to d": (flat, dense(dim), 0, []),
    }


def milliseconds(paths, repeats):
    """Return the median CPU time of one call of each file, `{key: (path, shape)}`, the files taking turns."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    draw = np.random.default_rng(0)
    interpreters, times = {}, {key: [] for key in paths}
    for key, (path, shape) in paths.items():
        interpreter = interpreters[key] = Interpreter(path, num_threads=1)
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, (1, *shape))
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, 0.1 * draw.normal(size=(1, *shape)).astype("float32"))
        interpreter.invoke()
    for _ in range(repeats):
        for key, interpreter in interpreters.items():
            start = time.process_time()
            interpreter.invoke()
            times[key].append(1000 * (time.process_time() - start))
    return {key: statistics.median(values) for key, values in times.items()}


def export(usm, keras, preset, folder):
    """Write the files; return `{(width, part): (path, shape)}` and `{part: (how often, its projections)}`."""
    paths, counts = {}, {}
    for width, quantization in WIDTHS.items():
        for number, (part, (shape, layer, count, inside)) in enumerate(parts(usm, keras, preset, quantization).items()):
            inputs = keras.Input(shape)
            path = os.path.join(folder, f"{width}-{number}.tflite")
            paths[width, part] = usm.export_litert(keras.Model(inputs, layer(inputs)), path), shape
            counts[part] = count, inside
        model = usm.USMForCTC(VOCABULARY, **preset, quantization=quantization)
        path = os.path.join(folder, f"{width}.tflite")
        paths[width, "whole file"] = usm.export_litert(model, path, sample_rate_input=16_000), (SAMPLES,)
    return paths, counts


def rows(times, counts):
    """Return `[(part, how often, {width: milliseconds})]`: all calls of each part, of its projections, and the rest."""
    table, projections = [], dict.fromkeys(WIDTHS, 0.0)
    for part, (count, inside) in counts.items():
        if count:
            table.append((part, count, {width: count * times[width, part] for width in WIDTHS}))
        if inside:
            spent = {width: count * sum(times[width, name] for name in inside) for width in WIDTHS}
            table.append((f"  of it {len(inside)} projections", count, spent))
            projections = {width: projections[width] + spent[width] for width in WIDTHS}
    total = {width: sum(values[width] for part, _, values in table if not part.startswith(" ")) for width in WIDTHS}
    table.append(("all parts", 1, total))
    table.append(("  of it projections", 1, projections))
    table.append(("  of it everything else", 1, {width: total[width] - projections[width] for width in WIDTHS}))
    table.append(("whole file", 1, {width: times[width, "whole file"] for width in WIDTHS}))
    return table


def main():
    """Measure, print the table and write it to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="timed calls of each file, interleaved (default 25)")
    args = parser.parse_args()
    import keras
    from finetune_usm_lite import write_json

    import keras_usm_lite as usm
    from keras_usm_lite.models.presets import preset

    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths, counts = export(usm, keras, preset("small"), folder)
        table = rows(milliseconds(paths, args.repeats), counts)
    print(f"\n{'part':28} {'times':>5} {'float ms':>9} {'int4 ms':>9} {'ratio':>6}")
    for part, count, values in table:
        ratio = values["float"] / values["int4"]
        print(f"{part:28} {count:5} {values['float']:9.2f} {values['int4']:9.2f} {ratio:6.2f}")
    result = {
        "command": "python benchmarks/litert_profile.py",
        "repeats": args.repeats,
        "rows": [{"part": part.strip(), "times": count, **values} for part, count, values in table],
    }
    write_json(os.path.join(ROOT, "benchmarks", "results", "litert_profile.json"), result)


if __name__ == "__main__":
    main()
