"""A CTC recogniser from the pre-trained Moonshine encoder: the float model that a grid on a second corpus starts from.

    python benchmarks/moonshine_ctc.py --weights FOLDER --data CORPUS --output MODEL.usm   # continues if interrupted
    python benchmarks/grid.py --data CORPUS --float-model MODEL.usm --moonshine FOLDER  # then compress

First the head is trained alone, then blocks and head; the convolutions are not (`moonshine.py`). Writes the model as a
packed file and the dev error rates of all epochs to `results/moonshine_ctc_CORPUS.json`. The test split is not read.
"""

import argparse
import json
import os
import platform
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import moonshine
import numpy as np
from grid import RESULTS, checksum, commit

import keras_usm_lite as usm
from keras_usm_lite.data.manifest import replacing


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True, help="folder of weights_f32.npz")
    add("--data", required=True, help="folder or name of an English corpus")
    add("--output", required=True, help="packed file to write")
    add("--head-epochs", type=int, default=2, help="of the head alone, peak rate 0.003")
    add("--epochs", type=int, default=8, help="of blocks and head")
    add("--learning-rate", type=float, default=2e-4, help="their peak rate (default 2e-4)")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    """Train, measure on dev, write."""
    args = parse_arguments()
    start = time.time()
    keras.utils.set_random_seed(args.seed)
    weights = dict(np.load(os.path.join(args.weights, "weights_f32.npz")))
    corpus = usm.data.open_corpus(args.data)
    task = moonshine.prepare(corpus, weights, args.seed)
    model = moonshine.MoonshineForCTC(task.tokenizer.vocab_size)
    moonshine.assign(model.encoder, weights, skipped=2)
    logs = []
    for whole, epochs, rate in ((False, args.head_epochs, 3e-3), (True, args.epochs, args.learning_rate)):
        model.encoder.trainable = whole
        usm.compile_ctc(model, rate, epochs * len(task.batches["train"]), warmup=0.1)
        backup = f"{args.output}.{'whole' if whole else 'head'}.backup"
        history = usm.fit_ctc(
            model, task.batches["train"], task.batches["dev"], task.tokenizer, epochs, backup_dir=backup, verbose=2
        )
        logs.append({name: history.history[name] for name in ("loss", "val_wer", "val_cer")})
    usm.save_packed(model, args.output)
    result = {
        "command": f"python benchmarks/moonshine_ctc.py --weights FOLDER --data {corpus.name} --output MODEL.usm "
        f"--head-epochs {args.head_epochs} --epochs {args.epochs} --learning-rate {args.learning_rate} "
        f"--seed {args.seed}",
        "float_model": checksum(args.output),
        "commit": commit(),
        "versions": {"keras": keras.__version__, "python": platform.python_version()},
        "minutes_since_the_last_start": round((time.time() - start) / 60, 1),
        "head_alone": logs[0],
        "blocks_and_head": logs[1],
    }
    with replacing(os.path.join(RESULTS, f"moonshine_ctc_{corpus.name}.json")) as temporary:
        with open(temporary, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
