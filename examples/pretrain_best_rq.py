"""BEST-RQ: pre-train an encoder on the training audio of a corpus without looking at its transcripts.

    python examples/pretrain_best_rq.py --data my_corpus       # a folder with train.tsv, dev.tsv, test.tsv
    python examples/finetune_usm_lite.py --data my_corpus --pretrained outputs/pretrain_best_rq/encoder.weights.h5

A run that was interrupted continues where it was when started again with the same arguments; a finished one stays.
"""

import argparse
import os
import shutil

from run_folder import remember_arguments

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def parse_arguments(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with train.tsv, dev.tsv, test.tsv, or the name of a corpus; default: as in "
        "finetune_usm_lite.py")  # fmt: skip
    add("--epochs", type=int, default=20, help="passes over the training audio (default 20)")
    add("--learning-rate", type=float, default=2e-3, help="peak rate (default 0.002)")
    add("--batch-frames", type=int, default=4000, help="10 ms frames per training batch (default 4000)")
    add("--preset", default="tiny", help="model size: tiny (1M), small (10M), ... (default tiny)")
    add("--codebooks", type=int, default=16, help="codes to predict per 40 ms (default 16)")
    add("--codebook-size", type=int, default=256, help="values of each code (default 256)")
    add("--output", default="outputs/pretrain_best_rq", help="folder for encoder.weights.h5")
    add("--seed", type=int, default=0, help="seed of initialisation, codes, order and masks (default 0)")
    args = parser.parse_args(arguments)
    for name in ("epochs", "batch_frames", "codebooks", "codebook_size"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is below 1")
    return args


def pretrain(usm, keras, corpus, args, path):
    """Pre-train, or continue, and write the weights of the encoder, all or nothing; then the backup can go."""
    from keras_usm_lite.models.presets import preset

    keras.utils.set_random_seed(args.seed)
    task = usm.data.SpeechTask.prepare(corpus, batch_frames=args.batch_frames, seed=args.seed)
    train = task.batches["train"]
    encoder = usm.USMEncoder(**preset(args.preset))
    encoder.build((None, None, task.frontend.num_mel_bins))
    model = usm.BestRQ(encoder, args.codebooks, args.codebook_size, seed=args.seed)
    usm.compile_ctc(model, args.learning_rate, args.epochs * len(train))  # its loss gives way to the model's own
    backup_folder = os.path.join(args.output, "backup")
    model.fit(
        train,
        epochs=args.epochs,
        shuffle=False,  # the batches are shuffled already, reproducibly
        validation_data=task.batches["dev"],
        callbacks=[
            usm.callbacks.Backup(backup_folder),
            keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: train.set_epoch(epoch)),
            usm.callbacks.FiniteLoss(),
        ],
    )
    part = os.path.join(args.output, "part.weights.h5")
    keras.saving.save_weights(encoder, part)
    os.replace(part, path)
    shutil.rmtree(backup_folder)


def main(arguments=None):
    """Pre-train and write the weights of the encoder, unless they are there."""
    args = parse_arguments(arguments)
    import keras

    import keras_usm_lite as usm

    os.makedirs(args.output, exist_ok=True)
    corpus = usm.data.open_corpus(args.data) if args.data else usm.data.default_corpus()
    remember_arguments(args, corpus, free=("data", "output"))
    path = os.path.join(args.output, "encoder.weights.h5")
    if os.path.exists(path):
        print("\nThis run is finished; for another one, give another --output, or delete the folder.")
    else:
        pretrain(usm, keras, corpus, args, path)
    print(f"\nencoder: {path}\nnext: python examples/finetune_usm_lite.py --preset {args.preset} --pretrained {path}")


if __name__ == "__main__":
    main()
