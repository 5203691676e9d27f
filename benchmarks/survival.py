"""Kill a training at random moments and start it again: does it end bit for bit like one that was left alone?

    python benchmarks/survival.py --kills 24                    # usm.fit_ctc with backup_dir
    python benchmarks/survival.py --kills 8 --backup keras      # keras.callbacks.BackupAndRestore instead
    python benchmarks/survival.py --kills 6 --backup keras --spare-writing
    KERAS_BACKEND=jax python benchmarks/survival.py --kills 8

A child process trains a small recogniser at int4 + 2:4 with pruning and quantization schedules, SpecAugment and dropout
on one CPU, with determinism on. SIGKILL comes in turn at a random moment of the training and while a file of the backup
is being written. The next child continues, be it from the state at the very end; when one is done, its weights, masks,
scales, random states, optimizer, learning rate and metrics are compared with those of the undisturbed training, and
another training begins, until the kills are used up. The tally is added to `benchmarks/results/survival.json`.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import tempfile
import time

import numpy as np

EPOCHS = 6
RESULTS = pathlib.Path(__file__).parent / "results" / "survival.json"


class RandomFeatures(list):
    """Noise of 40 to 80 frames."""

    def __init__(self, rng, count):
        super().__init__(rng.normal(size=(n, 80)).astype("float32") for n in rng.integers(40, 80, count))
        self.num_frames = np.array([len(features) for features in self])


def train(folder, backup):
    """In the child: train, or continue, and write the final state to `result.npz`."""
    log = os.open(folder / "child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import keras

    import keras_usm_lite as usm

    keras.utils.set_random_seed(0)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    int4 = usm.QuantizationConfig(bits=4, scale="learned")
    model = usm.USMForCTC(
        9, quantization=int4, sparsity="2:4", num_layers=1, dim=32, num_heads=2, subsampling_channels=8, dropout=0.1
    )
    rng = np.random.default_rng(0)
    labels = [rng.integers(1, 9, size=5).tolist() for _ in range(48)]
    batches = usm.data.SpeechBatches(RandomFeatures(rng, 48), labels, batch_frames=480, num_buckets=2)
    dev = usm.data.SpeechBatches(RandomFeatures(rng, 8), labels[:8], batch_frames=960, num_buckets=1, shuffle=False)
    steps = EPOCHS * len(batches)
    usm.compile_ctc(model, 1e-2, steps)
    callbacks = [
        usm.callbacks.NMPruning(start_step=3, num_shots=4, interval=steps // 6 + 1),
        usm.callbacks.QuantizationSchedule([(0, None), (steps // 4, 8), (steps // 2, 4)]),
        keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: beat(folder)),
    ]
    if backup == "keras":
        callbacks.append(keras.callbacks.BackupAndRestore(folder / "backup"))
    backup_dir = folder / "backup" if backup == "usm" else None
    history = usm.fit_ctc(
        model, batches, dev, usm.CharTokenizer("abcdefgh"), EPOCHS, callbacks, backup_dir, verbose=0
    ).history
    arrays = {"learning_rate": keras.ops.convert_to_numpy(model.optimizer.learning_rate), "steps": steps}
    for number, variable in enumerate([*model.variables, *model.optimizer.variables]):
        arrays[f"{number} {variable.path.replace('/', '.')}"] = keras.ops.convert_to_numpy(variable)
    for name, values in history.items():
        arrays[f"logs {name}"] = np.array(values)
    np.savez(folder / "part.npz", **arrays)
    os.replace(folder / "part.npz", folder / "result.npz")


def beat(folder):
    """Tell the parent that a batch begins."""
    with open(folder / "beats", "ab") as file:
        file.write(b".")


def sizes(folder, pattern="*"):
    """Return the sizes of the files in a folder by name; none if it is not there."""
    found = {}
    for path in folder.glob(pattern):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:
            continue
    return found


def wait_for_random_moment(child, folder, steps):
    """Wait until the child has begun a random number of batches, and a little more."""
    wanted = sizes(folder).get("beats", 0) + random.randint(0, steps // 3)
    while child.is_alive() and sizes(folder).get("beats", 0) < wanted:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.1))


def wait_for_writing(child, folder):
    """Wait until a file of the backup appears or changes its size for the first, second or third time."""
    for _ in range(random.randint(1, 3)):
        before = sizes(folder / "backup")
        time.sleep(random.uniform(0, 0.02))
        while child.is_alive() and not sizes(folder / "backup").items() - before.items():
            time.sleep(0.0005)


def survive(reference, backup, kills, spare_writing, folder, start):
    """Run trainings until so many kills are used up; return the tally."""
    steps = int(reference["steps"])
    tally = {"kills": 0, "kills while writing": 0, "trainings": 0, "starts": 0, "equal": 0, "unequal": 0, "stuck": 0}
    reasons = set()
    while tally["kills"] < kills:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tally["trainings"] += 1
        while True:
            leftovers = sizes(folder / "backup", "*.tmp")
            child = start(folder, backup)
            tally["starts"] += 1
            if tally["kills"] < kills:
                writing = tally["starts"] % 2 == 0 and not spare_writing
                wait_for_writing(child, folder) if writing else wait_for_random_moment(child, folder, steps)
                child.kill()
            child.join()
            if child.exitcode == -9:
                tally["kills"] += 1
                half_written = sizes(folder / "backup", "*.tmp").keys() - leftovers.keys()
                tally["kills while writing"] += bool(half_written) if backup == "usm" else writing
                print(f"kill {tally['kills']} after {sizes(folder).get('beats', 0)} batches", flush=True)
                continue
            if child.exitcode:
                tally["stuck"] += 1
                reasons.add((folder / "child.log").read_text().strip().splitlines()[-1])
            else:
                differing = compare(np.load(folder / "result.npz"), reference, backup)
                tally["unequal" if differing else "equal"] += 1
                reasons |= differing
            break
    return {**tally, "what differed or failed": sorted(reasons)[:12]}


def compare(result, reference, backup):
    """Return the names of what is not bit for bit equal; Keras keeps no history, so of its logs only the last."""
    last = slice(-1, None) if backup == "keras" else slice(None)
    differing = set(result) ^ set(reference)
    for name in set(result) & set(reference):
        part = last if name.startswith("logs") else ...
        if result[name][part].tobytes() != reference[name][part].tobytes():
            differing.add(name)
    return differing


def main():
    """Train undisturbed, then disturbed, and write the tally."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--backup", choices=("usm", "keras"), default="usm", help="callback (default usm)")
    parser.add_argument("--spare-writing", action="store_true", help="aim no kill at the writing of the backup")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default 0)")
    args = parser.parse_args()
    from keras_usm_lite.data.manifest import replacing

    random.seed(args.seed)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")  # forks a process that has imported everything, and run nothing
    context.set_forkserver_preload(["keras_usm_lite"])

    def start(folder, backup):
        child = context.Process(target=train, args=(folder, backup))
        child.start()
        return child

    begun = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = pathlib.Path(scratch, "undisturbed")
        undisturbed.mkdir()
        start(undisturbed, None).join()
        reference = dict(np.load(undisturbed / "result.npz"))
        print(f"undisturbed: {reference['steps']} steps, {time.time() - begun:.0f} s", flush=True)
        disturbed = pathlib.Path(scratch, "disturbed")
        tally = survive(reference, args.backup, args.kills, args.spare_writing, disturbed, start)
    tally["seconds"] = round(time.time() - begun)
    name = f"{os.environ.get('KERAS_BACKEND', 'tensorflow')}, {args.backup}"
    name += ", writing spared" if args.spare_writing else ""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with replacing(RESULTS) as temporary:
        pathlib.Path(temporary).write_text(json.dumps({**results, name: tally}, indent=1) + "\n")
    print(name, json.dumps(tally, indent=1))


if __name__ == "__main__":
    main()
