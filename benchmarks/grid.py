"""The paper's grid on real speech: fine-tune one float recogniser at every width and pattern, several ways and seeds.

    python benchmarks/grid.py train --data CORPUS --float-model float.usm   # hours; stop and start it at will
    python benchmarks/grid.py table --data CORPUS --float-model float.usm   # the test split

`train` goes through `PLAN` in its order and appends one row for each run to `results/grid_CORPUS.jsonl`: what was done,
the error rates on dev, time, versions. What each model says to the test recordings is put away unread, in
`results/grid_CORPUS/`, until `table` counts its errors.
A change is relative to the float model fine-tuned for as long with the same seed. The protocol: benchmarks/README.md.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import subprocess
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "benchmarks", "results")
LEFT_OUT = {"depthwise|subsampling/conv": (None, None)}
EPOCHS, LEARNING_RATE = 10, 1e-3
KINDS = ("packed", "archive", "tflite")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a compressed copy is made and fine-tuned.

    Attributes:
        scale, codebook: of `QuantizationConfig`.
        start: "float" weights, or those that `permute_channels` and `one_shot` make of them, masks included.
        pruning: "few" magnitude shots in the first third of the training (the paper's way), "gradual" (structure decay
            in the first half), "every step" (SR-STE), or "none" (masks stay as the start made them).
        distill: weight of the divergence from the float model.
    """

    scale: str = "absmax"
    codebook: str = "symmetric"
    start: str = "float"
    pruning: str = "few"
    distill: float = 0.0


RECIPES = {
    "paper": Recipe(),
    "distilled": Recipe(distill=1.0),
    "mse": Recipe(scale="mse", distill=1.0),
    "learned": Recipe(scale="learned", distill=1.0),
    "learned full": Recipe(scale="learned", codebook="full", distill=1.0),
    "learned midrise": Recipe(scale="learned", codebook="midrise", distill=1.0),
    "compensated": Recipe(scale="mse", start="one-shot", pruning="none", distill=1.0),
    "gradual": Recipe(pruning="gradual", distill=1.0),
    "every step": Recipe(pruning="every step", distill=1.0),
}
CONTROL = (None, None, "paper")  # the float model, fine-tuned for as long
# (bits, pattern, recipe, seed), most telling first.
PLAN = [
    (*CONTROL, 0),
    (4, "2:4", "paper", 0),
    (2, None, "paper", 0),
    (4, "1:4", "paper", 0),
    (2, None, "learned midrise", 0),
    (4, "1:4", "gradual", 0),
    (4, "2:4", "distilled", 0),
    (2, None, "learned full", 0),
    (4, "1:4", "compensated", 0),
    (2, None, "compensated", 0),
    (4, "1:4", "every step", 0),
    (2, "2:4", "learned full", 0),
    (2, "2:4", "compensated", 0),
    *((*cell, seed) for seed in (1, 2) for cell in (
        CONTROL, (4, "2:4", "paper"), (4, "2:4", "distilled"), (2, None, "paper"), (4, "1:4", "paper"))),
    *itertools.product((8, 4, 3, 2), (None, "4:8", "2:4", "1:4"), ("paper",), (0, 1, 2)),
]  # fmt: skip


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=("train", "table"))
    add("--data", required=True, help="folder or name of the corpus the float model was trained on")
    add("--float-model", required=True, help="packed file of the float recogniser every run starts from")
    add("--output", help="folder for the trained models (default outputs/grid_CORPUS)")
    add("--only", help="in `train`: 'bits pattern recipe seed' of one run, such as '2 dense learned-full 0'")
    return parser.parse_args()


def run_name(bits, pattern, recipe, seed):
    """Name of a run in files and on the command line."""
    width = "float" if bits is None else f"int{bits}"
    return f"{width} {pattern or 'dense'} {recipe.replace(' ', '-')} {seed}"


def file_name(run):
    """The name without what file systems dislike."""
    return run.replace(" ", "_").replace(":", "_")


def compressed(usm, float_model, bits, pattern, recipe, calibration):
    """Return the copy that will be fine-tuned."""
    if bits is None and pattern is None:
        return usm.compress(float_model, {**LEFT_OUT, "encoder/": (None, None)})
    quantization = bits and usm.QuantizationConfig(bits, scale=recipe.scale, codebook=recipe.codebook)
    sparsity = pattern and usm.SparsityConfig.resolve(pattern)
    if pattern and recipe.pruning == "every step":
        sparsity = sparsity.replace(every_step=True, gradient="sr_ste")
    model = usm.compress(float_model, {**LEFT_OUT, "encoder/": (quantization, sparsity)})
    if recipe.start == "one-shot":
        if pattern:
            usm.permute_channels(model)
        usm.one_shot(model, calibration)
    return model


def pruning_callbacks(usm, recipe, pattern, steps):
    """Return what makes the masks while training."""
    if pattern is None or recipe.pruning == "none":
        return []
    if recipe.pruning == "gradual":
        return [usm.callbacks.NMPruning(num_shots=5, interval=max(steps // 10, 1), gradual=True)]
    if recipe.pruning == "every step":
        return [usm.callbacks.NMPruning(freeze_step=2 * steps // 3)]
    return [usm.callbacks.NMPruning(num_shots=5, interval=max(steps // 15, 1))]


def train(usm, keras, args, folder, bits, pattern, name, seed):
    """Fine-tune one model, save it, and return its row."""
    from post_training_grid import calibration_batch

    recipe, start = RECIPES[name], time.time()
    keras.utils.set_random_seed(seed)
    task = usm.data.SpeechTask.prepare(usm.data.open_corpus(args.data), seed=seed)
    float_model = usm.load_packed(args.float_model)
    calibration = calibration_batch(task, 128, 300) if recipe.start == "one-shot" else None
    model = compressed(usm, float_model, bits, pattern, recipe, calibration)
    batches = task.batches["train"]
    steps = EPOCHS * len(batches)
    learner = usm.Distiller(model, float_model, kl_weight=recipe.distill) if recipe.distill else model
    usm.compile_ctc(learner, LEARNING_RATE, steps)
    path = os.path.join(folder, file_name(run_name(bits, pattern, name, seed)))
    history = usm.fit_ctc(
        learner, batches, task.batches["dev"], task.tokenizer, EPOCHS,
        callbacks=pruning_callbacks(usm, recipe, pattern, steps), backup_dir=f"{path}.backup", verbose=2,
    ).history  # fmt: skip
    keep_outcome(usm, task, model, run_name(bits, pattern, name, seed))
    return {
        "run": run_name(bits, pattern, name, seed),
        "bits": bits,
        "pattern": pattern,
        "recipe": {"name": name, **dataclasses.asdict(recipe)},
        "seed": seed,
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "dev_wer": history["val_wer"][-1],
        "dev_cer": history["val_cer"][-1],
        "minutes": round((time.time() - start) / 60, 1),
        "float_model": checksum(args.float_model),
        "command": f"python benchmarks/grid.py train --only '{run_name(bits, pattern, name, seed)}'",
        "commit": commit(),
        "versions": {
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "python": platform.python_version(),
        },
    }


def checksum(path):
    """First digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def commit():
    """The version of this code, or None outside a repository."""
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def read_rows(path, float_model):
    """The finished runs; refuses a file of another float model."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    if any(row["float_model"] != float_model for row in rows):
        raise SystemExit(f"{path} holds runs of another float model. Move it away to start anew.")
    return rows


def keep_outcome(usm, task, model, run):
    """Write what a model says to the test recordings, and the bytes of its files, for `table` to look at."""
    _, texts = task.transcribe(model.predict_on_batch, "test")
    with tempfile.TemporaryDirectory() as files:
        paths = {
            "packed": usm.save_packed(model, os.path.join(files, "model.usm")),
            "archive": usm.save_packed(model, os.path.join(files, "archive.usm"), archive=True),
            "tflite": usm.export_litert(model, os.path.join(files, "model.tflite")),
        }
        sizes = {kind: os.path.getsize(path) for kind, path in paths.items()}
    folder = os.path.join(RESULTS, f"grid_{task.corpus.name}")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{file_name(run)}.json"), "w") as file:
        json.dump({"bytes": {**sizes, "float32": usm.report(model).float32_bytes}, "texts": texts}, file, indent=0)


def read_outcomes(rows, corpus):
    """Return `{run: (texts, bytes)}` as `keep_outcome` wrote them."""
    found = {}
    for row in rows:
        with open(os.path.join(RESULTS, f"grid_{corpus}", f"{file_name(row['run'])}.json")) as file:
            outcome = json.load(file)
        found[row["run"]] = outcome["texts"], outcome["bytes"]
    return found


def table(usm, rows, found, references):
    """Return the rows of the table: seeds pooled, changes against the controls of the same seeds."""
    lines = []
    cells = {}
    for row in rows:
        cells.setdefault((row["bits"], row["pattern"], row["recipe"]["name"]), []).append(row)
    for (bits, pattern, recipe), runs in cells.items():
        seeds = [row["seed"] for row in runs if run_name(*CONTROL, row["seed"]) in found]
        texts = [text for seed in seeds for text in found[run_name(bits, pattern, recipe, seed)][0]]
        control = [text for seed in seeds for text in found[run_name(*CONTROL, seed)][0]]
        sizes = found[runs[0]["run"]][1]
        line = {
            "bits": bits, "pattern": pattern, "recipe": recipe, "seeds": seeds,
            "dev_wer": sum(row["dev_wer"] for row in runs) / len(runs),
            "test_wer": usm.error_rates(references * len(seeds), texts).wer, "bytes": sizes,
        }  # fmt: skip
        if texts != control:
            change = usm.paired_bootstrap(references * len(seeds), control, texts)
            line |= {"relative_change": change.relative_change, "interval": [change.low, change.high]}
        lines.append(line)
    return lines


def as_markdown(corpus, lines):
    """The table for readers."""
    text = [
        f"Fine-tuned for {EPOCHS} epochs on {corpus}; test WER over the seeds; relative change against the float model "
        "fine-tuned for as long with the same seeds, 95 % interval of 10,000 paired draws. The way of a cell is chosen "
        "on dev.",
        "",
        "| bits | N:M | recipe | seeds | dev WER | test WER | relative change | packed | archive | .tflite |",
        "|---|---|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for line in lines:
        change, size = "-", line["bytes"]
        if "interval" in line:
            change = "{:+.1%} ({:+.1%} to {:+.1%})".format(line["relative_change"], *line["interval"])
        parts = " | ".join(f"{size[kind]:,} ({size[kind] / size['float32']:.1%})" for kind in KINDS)
        text.append(
            f"| {line['bits'] or 'float'} | {line['pattern'] or 'dense'} | {line['recipe']} | {len(line['seeds'])} | "
            f"{line['dev_wer']:.2%} | {line['test_wer']:.2%} | {change} | {parts} |"
        )
    return "\n".join(text) + "\n"


def main():
    """Train what is missing, or write the table of what is there."""
    args = parse_arguments()
    import keras

    import keras_usm_lite as usm
    from keras_usm_lite.data.manifest import replacing

    corpus = usm.data.open_corpus(args.data).name
    folder = args.output or os.path.join(ROOT, "outputs", f"grid_{corpus}")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(RESULTS, f"grid_{corpus}.jsonl")
    rows = read_rows(path, checksum(args.float_model))
    if args.task == "table":
        task = usm.data.SpeechTask.prepare(usm.data.open_corpus(args.data))
        references = [utterance.text for utterance in task.utterances["test"]]
        lines = table(usm, rows, read_outcomes(rows, corpus), references)
        for suffix, content in ((".md", as_markdown(corpus, lines)), (".json", json.dumps(lines, indent=1) + "\n")):
            with replacing(path.replace(".jsonl", suffix)) as temporary, open(temporary, "w") as file:
                file.write(content)
        print(as_markdown(corpus, lines))
        return
    for run in PLAN:
        if run_name(*run) in {row["run"] for row in rows} or args.only not in (None, run_name(*run)):
            continue
        print(f"== {run_name(*run)}", flush=True)
        rows.append(train(usm, keras, args, folder, *run))
        with open(path, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"== {run_name(*run)}: dev WER {rows[-1]['dev_wer']:.2%}, {rows[-1]['minutes']} min", flush=True)
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
