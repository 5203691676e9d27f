"""What BEST-RQ pre-training does to the word error rate at equal CTC training, on one corpus.

    python benchmarks/best_rq.py --data my_corpus

Two recognisers of the same seed see the same batches for the same epochs; one starts from random weights, the other
from an encoder that was pre-trained on the training audio without its transcripts. Every epoch's dev error rate is
written to results/best_rq.json; the test split is not read. One run, one seed.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import keras_usm_lite as usm
from keras_usm_lite.data.manifest import replacing

RESULT = pathlib.Path(__file__).parent / "results" / "best_rq.json"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder with train.tsv, dev.tsv, test.tsv, or the name of a corpus")
    add("--pretrain-epochs", type=int, default=6)
    add("--epochs", type=int, default=6, help="epochs of CTC training, with and without pre-training")
    add("--codebook-size", type=int, default=256)
    add("--learning-rate", type=float, default=2e-3, help="peak rate of both trainings")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def recogniser(task, seed):
    keras.utils.set_random_seed(seed)
    augmentation = {"frequency_width": 15, "time_masks": 2}
    return usm.USMForCTC(task.tokenizer.vocab_size, num_mel_bins=task.frontend.num_mel_bins, spec_augment=augmentation)


def pretrain(model, task, args):
    """Pre-train the encoder of a recogniser and return the logs of every epoch."""
    best_rq = usm.BestRQ(model.encoder, codebook_size=args.codebook_size, seed=args.seed)
    train = task.batches["train"]
    train.set_epoch(0)
    usm.compile_ctc(best_rq, args.learning_rate, args.pretrain_epochs * len(train))  # its loss gives way to the model's
    history = best_rq.fit(train, epochs=args.pretrain_epochs, shuffle=False, verbose=2)
    return history.history


def fine_tune(model, task, args):
    """Train with CTC and return the dev word error rate of every epoch."""
    train = task.batches["train"]
    usm.compile_ctc(model, args.learning_rate, args.epochs * len(train))
    history = usm.fit_ctc(model, train, task.batches["dev"], task.tokenizer, args.epochs, verbose=2)
    return history.history["val_wer"]


def main():
    args = parse_arguments()
    start = time.time()
    corpus = usm.data.open_corpus(args.data)
    task = usm.data.SpeechTask.prepare(corpus, seed=args.seed)
    from_scratch = fine_tune(recogniser(task, args.seed), task, args)
    model = recogniser(task, args.seed)
    logs = pretrain(model, task, args)
    pretrained = fine_tune(model, task, args)
    result = {
        "corpus": corpus.name,
        "arguments": {name: value for name, value in vars(args).items() if name != "data"},
        "backend": keras.backend.backend(),
        "pretraining": logs,
        "dev_wer_from_scratch": from_scratch,
        "dev_wer_pretrained": pretrained,
        "minutes": (time.time() - start) / 60,
    }
    RESULT.parent.mkdir(exist_ok=True)
    with replacing(RESULT) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
