"""The paper's grid on real speech: fine-tune one float recogniser at every width and pattern, several ways and seeds.

    python benchmarks/grid.py --data CORPUS --float-model float.usm              # hours; stop and start it at will
    python benchmarks/grid.py --data CORPUS --float-model float.usm --part 1/2   # half of it, beside the other half
    python benchmarks/grid_tables.py --data CORPUS                               # tables and plot, with the test split

With `--moonshine FOLDER` the float model is one of `moonshine_ctc.py` instead of a `USMForCTC`.
This goes through `grid_plan.PLAN` in its order and appends one row for each run to `results/grid_CORPUS.jsonl`: what
was done, the error rates on dev, sizes, time, versions. What each compressed file says to the test recordings is put
away unread, in `results/grid_CORPUS/`, until `grid_tables.py` counts its errors. The protocol: benchmarks/README.md.
"""

import argparse
import dataclasses
import glob
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time

from grid_plan import (
    CONTROL,
    EPOCHS,
    LEARNING_RATE,
    MOONSHINE_EPOCHS,
    MOONSHINE_RATE,
    PLAN,
    RECIPES,
    compressed,
    file_name,
    freeze_step,
    learner_of,
    run_name,
    schedules,
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ARCHIVE_VERSION = 3  # of the packed format, set by hand: a row says what its sizes are; without it, version 2
SMALLEST = ".smallest"  # end of the name of what the smallest archive of a run says
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "benchmarks", "results")


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder or name of the corpus the float model was trained on")
    add("--float-model", required=True, help="packed file of the float recogniser every run starts from")
    add("--moonshine", help="folder of the Moonshine weights, for a float model made of them")
    add("--output", help="folder for the trained models (default outputs/grid_CORPUS)")
    add("--part", default="1/1", help="which part of the plan: 1/2 takes every second run, 2/2 the others")
    add("--only", help="one run: 'bits pattern recipe seed', such as 'int2 dense learned 0'")
    return parser.parse_args()


def selected(args, finished):
    """Return the runs of the plan that are asked for and missing."""
    part, parts = (int(number) for number in args.part.split("/"))
    missing = [run for run in PLAN[part - 1 :: parts] if run_name(*run) not in finished]
    if args.only is None:
        return missing
    if args.only not in {run_name(*run) for run in PLAN}:
        raise SystemExit(f"--only {args.only!r} is not in the plan, which has 'int4 2:4 paper 0' and others like it.")
    return [run for run in missing if run_name(*run) == args.only]


def train(usm, keras, args, folder, bits, pattern, name, seed):
    """Fine-tune one model, write its files, and return its row."""
    recipe, run, start = RECIPES[name], run_name(bits, pattern, name, seed), time.time()
    keras.utils.set_random_seed(seed)
    task, epochs, rate = prepare(usm, args, seed)
    rate, budget, epochs = rate * recipe.rate, epochs, round(epochs * recipe.share)
    origin = usm.load_packed(args.float_model)
    calibration = task.calibration_batch() if recipe.start in ("one-shot", "rounded") else None
    if recipe.late:
        origin.set_weights(trained_control(keras, folder, seed).get_weights())
    model = compressed(usm, origin, bits, pattern, recipe, calibration)
    path = os.path.join(folder, file_name(run))
    if epochs:
        batches = task.batches["train"]
        steps = epochs * len(batches)
        learner = learner_of(usm, model, origin, recipe)
        usm.compile_ctc(learner, rate, steps, warmup=0.1, freeze_step=freeze_step(recipe, steps))
        usm.fit_ctc(
            learner, batches, task.batches["dev"], task.tokenizer, epochs, verbose=2,
            callbacks=schedules(usm, recipe, bits, pattern, epochs, len(batches)),
            backup_dir=f"{path}.{commit()}.backup",
        )  # fmt: skip
    model.save(f"{path}.keras")
    dev, sizes = keep_outcomes(usm, task, model, path, os.path.join(RESULTS, f"grid_{task.corpus.name}"))
    return {
        "run": run,
        "bits": bits,
        "pattern": pattern,
        "recipe": {"name": name, **dataclasses.asdict(recipe)},
        "seed": seed,
        "epochs": epochs + budget * recipe.late,  # those of the control that it began with count
        "learning_rate": rate,
        "dev_wer": dev["archive"].wer,
        "dev_cer": dev["archive"].cer,
        **({"smallest_dev_wer": dev["smallest"].wer} if "smallest" in dev else {}),
        "bytes": sizes,
        "archive_version": ARCHIVE_VERSION,
        "bits_per_weight": usm.report(model).kernel_bits_per_weight if bits or pattern else 32.0,
        "minutes": round((time.time() - start) / 60, 1),
        "float_model": checksum(args.float_model),
        "command": f"python benchmarks/grid.py --data {task.corpus.name} --float-model float.usm "
        f"{'--moonshine FOLDER ' if args.moonshine else ''}--only '{run}'",
        "commit": commit(),
        "versions": {
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "python": platform.python_version(),
        },
    }


def trained_control(keras, folder, seed):
    """The float model that the control of a seed ended with."""
    path = os.path.join(folder, f"{file_name(run_name(*CONTROL, seed))}.keras")
    if not os.path.exists(path):
        raise SystemExit(f"{path} is missing. Train {run_name(*CONTROL, seed)!r} first; its row alone is not enough.")
    return keras.models.load_model(path)


def prepare(usm, args, seed):
    """Return the data as the float model hears it, and the epochs and peak rate of its fine-tuning."""
    corpus = usm.data.open_corpus(args.data)
    if not args.moonshine:
        return usm.data.SpeechTask.prepare(corpus, seed=seed), EPOCHS, LEARNING_RATE
    import moonshine
    import numpy as np

    weights = dict(np.load(os.path.join(args.moonshine, "weights_f32.npz")))
    return moonshine.prepare(corpus, weights, seed), MOONSHINE_EPOCHS, MOONSHINE_RATE


def keep_outcomes(usm, task, model, path, folder):
    """Write every form of a model and what its archives say to the test recordings.

    The error rates are those of the archives as they lie on disk.

    Returns:
        `({kind of archive: error rates on dev}, bytes of every form)`.
    """
    paths = written(usm, task, model, path)
    os.makedirs(folder, exist_ok=True)
    dev = {}
    for kind, end in (("archive", ""), ("smallest", SMALLEST)):
        if kind in paths:
            loaded = usm.load_packed(paths[kind])
            dev[kind] = usm.error_rates(*task.transcribe(loaded.predict_on_batch, "dev"))
            _, unread = task.transcribe(loaded.predict_on_batch, "test")
            with open(os.path.join(folder, f"{os.path.basename(path)}{end}.json"), "w") as file:
                json.dump(unread, file, indent=0)
    sizes = {kind: os.path.getsize(file) for kind, file in paths.items()}
    return dev, {**sizes, "float32": usm.report(model).float32_bytes}


def written(usm, task, model, path):
    """Write every form of a model; return their paths."""
    exported = model
    if not isinstance(task.frontend, usm.LogMel):
        import moonshine

        exported = moonshine.functional(model)
    return packed_files(usm, model, path) | {"tflite": usm.export_litert(exported, f"{path}.tflite")}


def packed_files(usm, model, path):
    """Write the packed files of a model; return their paths.

    The archive is entropy-coded, with float16 scales, other matrices in int8 and vectors in float16 (of a float model:
    everything exact). The smallest archive, of quantized models, has bfloat16 scales and trainable vectors in int8.
    """
    files = {"packed": usm.save_packed(model, f"{path}.usm")}
    if all(layer.quantization is None for layer in usm.compressed_layers(model)):
        return files | {"archive": usm.save_packed(model, f"{path}.archive.usm", archive=True)}
    for kind, reduced in (("archive", {"scales": "float16"}), ("smallest", {"scales": "bfloat16", "vectors": "int8"})):
        files[kind] = usm.save_packed(model, f"{path}.{kind}.usm", archive=True, others="int8", **reduced)
    return files


def belongs_to(folder, float_model):
    """Keep the runs of one float model in a folder: those that go on from a control would take that of another."""
    path = os.path.join(folder, "float_model.txt")
    if not os.path.exists(path):
        with open(path, "w") as file:
            file.write(float_model)
    with open(path) as file:
        if file.read() != float_model:
            raise SystemExit(f"{folder} holds the trained models of another float model. Give another --output.")


def checksum(path):
    """First digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def commit():
    """The version of this code, or None outside a repository."""
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def read_rows(path):
    """The finished runs."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def main():
    """Train what is missing."""
    args = parse_arguments()
    import keras

    import keras_usm_lite as usm

    corpus = usm.data.open_corpus(args.data).name
    folder = args.output or os.path.join(ROOT, "outputs", f"grid_{corpus}")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(RESULTS, f"grid_{corpus}.jsonl")
    rows = read_rows(path)
    if any(row["float_model"] != checksum(args.float_model) for row in rows):
        raise SystemExit(f"{path} holds runs of another float model. Move it away to start anew.")
    belongs_to(folder, checksum(args.float_model))
    for run in selected(args, {row["run"] for row in rows}):
        print(f"== {run_name(*run)}", flush=True)
        row = train(usm, keras, args, folder, *run)
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        # A finished backup would be taken for the same run made again, whatever has changed since.
        for backup in glob.glob(os.path.join(folder, f"{file_name(row['run'])}.*backup")):
            shutil.rmtree(backup)
        print(f"== {row['run']}: dev WER {row['dev_wer']:.2%}, {row['minutes']} min", flush=True)
        keras.utils.clear_session()


if __name__ == "__main__":
    main()
