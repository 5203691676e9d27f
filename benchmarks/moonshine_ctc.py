"""A CTC recogniser from the pre-trained Moonshine encoder: the float model that a grid on a second corpus starts from.

    python benchmarks/moonshine_ctc.py --weights FOLDER --data CORPUS --output MODEL.usm   # continues if interrupted
    python benchmarks/grid.py --data CORPUS --float-model MODEL.usm --moonshine FOLDER  # then compress

First the new Conformer blocks and the head are trained, then everything; the convolutions are not (`moonshine.py`).
Writes the model as a packed file, matrices rounded to int8 as the original's are, and the dev error rates of all epochs
and of the file to `results/moonshine_ctc_CORPUS.json`. The test split is not read.
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
    add("--top-epochs", type=int, default=8, help="of the new blocks and the head, peak rate 0.002 (default 8)")
    add("--epochs", type=int, default=6, help="of everything, peak rate 0.0002 (default 6)")
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
    for whole, epochs, rate, warmup in ((False, args.top_epochs, 2e-3, None), (True, args.epochs, 2e-4, 0.1)):
        model.encoder.trainable = whole
        usm.compile_ctc(model, rate, epochs * len(task.batches["train"]), warmup=warmup)
        backup = f"{args.output}.{'whole' if whole else 'top'}.backup"
        history = usm.fit_ctc(
            model, task.batches["train"], task.batches["dev"], task.tokenizer, epochs, backup_dir=backup, verbose=2
        )
        logs.append({name: history.history[name] for name in ("loss", "val_wer", "val_cer")})
    usm.save_packed(model, args.output, archive=True, others="int8")
    rates = usm.error_rates(*task.transcribe(usm.load_packed(args.output).predict_on_batch, "dev"))
    result = {
        "command": f"python benchmarks/moonshine_ctc.py --weights FOLDER --data {corpus.name} --output MODEL.usm "
        f"--top-epochs {args.top_epochs} --epochs {args.epochs} --seed {args.seed}",
        "float_model": checksum(args.output),
        "commit": commit(),
        "versions": {"keras": keras.__version__, "python": platform.python_version()},
        "minutes_since_the_last_start": round((time.time() - start) / 60, 1),
        "top_and_head": logs[0],
        "everything": logs[1],
        "file": {"bytes": os.path.getsize(args.output), "dev_wer": rates.wer, "dev_cer": rates.cer},
    }
    with replacing(os.path.join(RESULTS, f"moonshine_ctc_{corpus.name}.json")) as temporary:
        with open(temporary, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
