"""One training for every engine of Keras: int4 + 2:4 on many devices or hosts, the data split without overlap or loss.

    python examples/train_distributed.py --engine mirrored                     # TensorFlow: all GPUs of this machine
    python examples/train_distributed.py --engine tpu                          # TensorFlow: a TPU
    python examples/train_distributed.py --engine jax [--model-parallel 4]     # JAX: all GPUs or TPU cores of this host
    python examples/train_distributed.py --engine jax-multihost \\
        --coordinator 10.0.0.1:1234 --processes 2 --process 0                  # JAX: one such command on every host

With `--float-model float.keras` a trained model is fine-tuned instead of a new one trained.
Data, model, callbacks and optimizer are the same for all; an engine is a scope, a number of copies of the model, and
the part of the data that this process reads. On a machine without accelerators, `--cpu-devices 2` makes two devices of
its processor to try an engine with. Started again with the same --output, a run that was interrupted continues; only
weights that are split over several processes have no backup.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil

from float_model import load_float_model
from run_folder import remember_arguments

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# What may differ when a run is continued: where things are, and how many devices or processes share the work, if they
# make as many batches of it.
FREE_ARGUMENTS = (
    "data", "output", "tpu", "coordinator", "process", "processes", "model_parallel", "cpu_devices",
)  # fmt: skip
BACKENDS = {"mirrored": "tensorflow", "tpu": "tensorflow", "jax": "jax", "jax-multihost": "jax"}


def parse_arguments(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engine", required=True, choices=BACKENDS, help="what distributes the training")
    add("--data", help="folder with train.tsv, dev.tsv, test.tsv, or the name of a corpus; default: as in "
        "finetune_usm_lite.py")  # fmt: skip
    add("--float-model", help="a trained float model to fine-tune, .keras or packed .usm, the same file on every host; "
        "it decides about size, augmentation and remat itself")  # fmt: skip
    add("--preset", help="size of a new model: tiny (1M), small (10M), usm_0.6b, usm_2b (default tiny)")
    add("--epochs", type=int, default=20, help="passes over the training data (default 20)")
    add("--learning-rate", type=float, help="peak rate (default 0.002, of a given float model 0.001)")
    add("--batch-frames", type=int, default=8000, help="10 ms frames per batch, all devices together (default 8000)")
    add("--no-spec-augment", action="store_true", help="train on the features as they are")
    add("--remat", action="store_true", help="compute the inside of every block twice instead of keeping it")
    add("--model-parallel", type=int, default=1, metavar="N", help="JAX: split the weights over N devices (default 1)")
    add("--tpu", default="local", help="name of the TPU (default: the one of this virtual machine)")
    add("--coordinator", help="jax-multihost: address:port of process 0; on TPU pods it is found by itself")
    add("--processes", type=int, help="jax-multihost: number of processes; on TPU pods it is found by itself")
    add("--process", type=int, help="jax-multihost: number of this process; on TPU pods it is found by itself")
    add("--cpu-devices", type=int, metavar="N", help="use the processor of each host as N devices")
    add("--output", default="outputs/train_distributed", help="folder for model.keras and the backup")
    add("--seed", type=int, default=0, help="seed of initialisation, order and augmentation (default 0)")
    args = parser.parse_args(arguments)
    for name in ("epochs", "batch_frames", "model_parallel"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is below 1")
    args.learning_rate = args.learning_rate or (1e-3 if args.float_model else 2e-3)
    if args.float_model is None:
        args.preset = args.preset or "tiny"
        return args
    if not os.path.isfile(args.float_model):
        parser.error(f"argument --float-model: there is no file {args.float_model!r}; correct the path")
    given = [name for name in ("preset", "no_spec_augment", "remat") if getattr(args, name)]
    if given:
        parser.error(f"argument --{given[0].replace('_', '-')}: it is of a new model; leave it or --float-model out")
    return args


@dataclasses.dataclass
class Engine:
    """What differs between the ways to distribute a training.

    Attributes:
        scope: context in which the model is made.
        copies: copies of the model, on all hosts together, that share a batch.
        shard: `(index, count)`: the part of the data that this process reads.
        process: number of this process; process 0 writes the model.
        processes: how many there are.
        whole: every process can read all weights.
        static: every batch must have the same shape.
    """

    scope: contextlib.AbstractContextManager
    copies: int
    shard: tuple = (0, 1)
    process: int = 0
    processes: int = 1
    whole: bool = True
    static: bool = False


def mirrored(args):
    """A copy of the model on each device of this machine."""
    import tensorflow as tf

    devices = None
    if args.cpu_devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * args.cpu_devices)
        devices = [f"/cpu:{number}" for number in range(args.cpu_devices)]
    strategy = tf.distribute.MirroredStrategy(devices)
    return Engine(strategy.scope(), strategy.num_replicas_in_sync)


def tpu(args):
    """A copy of the model on each TPU core; XLA for TPUs wants one shape of batches."""
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(args.tpu)
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    strategy = tf.distribute.TPUStrategy(resolver)
    return Engine(strategy.scope(), strategy.num_replicas_in_sync, static=True)


def jax(args):
    """A copy of the model on each device of all processes, or, split, on each group of `--model-parallel` devices."""
    import keras

    from keras_usm_lite.distribution import conformer_layout

    devices, split = keras.distribution.list_devices(), args.model_parallel
    if len(devices) % split:
        raise SystemExit(f"--model-parallel {split} does not divide the {len(devices)} devices that there are.")
    if split == 1:
        distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    else:
        mesh = keras.distribution.DeviceMesh((len(devices) // split, split), ["batch", "model"], devices)
        distribution = keras.distribution.ModelParallel(layout_map=conformer_layout(mesh), auto_shard_dataset=False)
    if len(devices) > 1:  # with one, Keras would compile the step anew whenever something has moved to "all" devices
        keras.distribution.set_distribution(distribution)
    # Processes that hold parts of the same copy read the same part of the data.
    count = min(distribution.num_model_replicas, distribution.num_processes)
    return Engine(
        contextlib.nullcontext(),
        distribution.num_model_replicas,
        shard=(distribution.data_shard_id, count),
        process=args.process or 0,
        processes=distribution.num_processes,
        whole=split == 1 or distribution.num_processes == 1,
    )


def jax_multihost(args):
    """The same over several processes, which find one another before anything is computed."""
    import jax as runtime
    import keras

    keras.distribution.initialize(args.coordinator, args.processes, args.process)
    args.process = runtime.process_index()
    return jax(args)


ENGINES = {"mirrored": mirrored, "tpu": tpu, "jax": jax, "jax-multihost": jax_multihost}


def prepare_data(usm, engine, args):
    """Return the corpus as this process sees it: its part of every batch, in shapes that all processes share."""
    corpus = usm.data.open_corpus(args.data) if args.data else usm.data.default_corpus()
    count = engine.shard[1]
    return usm.data.SpeechTask.prepare(
        corpus,
        batch_frames=args.batch_frames // count,
        seed=args.seed,
        shard=engine.shard,
        batch_multiple=engine.copies // count,
        num_buckets=1 if engine.static else 4,
    )


def feed(usm, keras, batches, engine):
    """Return batches as the backend likes them best: a tf.data pipeline for TensorFlow."""
    if keras.backend.backend() == "jax":
        return batches
    dataset = usm.data.to_tf_dataset(batches)
    if not engine.static:
        return dataset
    import tensorflow as tf

    shapes = tf.nest.map_structure(lambda array: tf.TensorShape(array.shape), batches[0])
    return dataset.map(lambda *batch: tf.nest.map_structure(tf.ensure_shape, batch, shapes))


def read_float_model(usm, keras, task, args):
    """Return the float model, or None if there is none; its weights are whole in this process, not distributed."""
    if args.float_model is None:
        return None
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        model = load_float_model(task, args.float_model)
    finally:
        keras.distribution.set_distribution(distribution)
    if not isinstance(model, usm.USMForCTC):
        raise SystemExit(f"{args.float_model} holds a {type(model).__name__}; this script trains a USMForCTC only.")
    return model


def make_model(usm, keras, vocab_size, float_model, steps, args):
    """Return the compiled model: a new one, or one with the weights of the float model.

    The loss is the mean over all rows of a batch, empty ones included, and gradients are not clipped: both would
    otherwise depend on how TensorFlow's replicas share the rows.
    """
    compression = {"quantization": "int4", "sparsity": "2:4"}
    if float_model is not None:
        model = usm.USMForCTC.from_config(float_model.get_config() | compression)
        copy_weights(keras, float_model, model)
    else:
        model = usm.USMForCTC(
            vocab_size, args.preset, **compression, spec_augment=not args.no_spec_augment, remat=args.remat
        )
    # A trained model needs the short warm-up of a fine-tuning.
    schedule = usm.warmup_cosine(args.learning_rate, steps, warmup=None if float_model is None else 0.1)
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=1e-2, beta_2=0.98)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale_gain"])
    # tf.distribute compiles for TPUs by itself and does not for GPUs, where replicas exchange gradients in the step.
    model.compile(optimizer, keras.losses.CTC(), jit_compile=keras.backend.backend() == "jax")
    return model


def copy_weights(keras, old, new):
    """Give a model the weights of another that has the same layers, with or without masks and scales."""
    values = {weight.path.partition("/")[2]: weight for weight in old.weights}
    for weight in new.weights:
        value = values.pop(weight.path.partition("/")[2], None)
        if value is not None:
            weight.assign(keras.ops.convert_to_numpy(value))
    assert not values, f"weights without a place: {sorted(values)}"


def save(keras, model, engine, path):
    """Write the model; of several processes all give their parts of the weights, process 0 writes, all wait for it."""
    if engine.processes > 1:
        from jax.experimental.multihost_utils import process_allgather, sync_global_devices

        weights = [process_allgather(weight.value, tiled=True) for weight in model.weights]
        keras.distribution.set_distribution(None)
    if engine.process == 0:
        if engine.processes > 1:
            model = type(model).from_config(model.get_config())
            for weight, value in zip(model.weights, weights, strict=True):
                weight.assign(value)
        part = f"{path.removesuffix('.keras')}.part.keras"
        model.save(part)
        os.replace(part, path)
    if engine.processes > 1:
        sync_global_devices("the model is written")


def main(arguments=None):
    """Train and write model.keras; return the Keras history, None if the model was there already."""
    args = parse_arguments(arguments)
    path = os.path.join(args.output, "model.keras")
    if os.path.exists(path):
        print(f"{path} is there, this run is finished; for another one, give another --output, or delete the folder.")
        return None
    os.environ["KERAS_BACKEND"] = BACKENDS[args.engine]
    if args.cpu_devices:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={args.cpu_devices}"
    import keras

    import keras_usm_lite as usm
    from keras_usm_lite.distribution import check_same_data, share_backup

    keras.utils.set_random_seed(args.seed)
    os.makedirs(args.output, exist_ok=True)
    engine = ENGINES[args.engine](args)
    task = prepare_data(usm, engine, args)
    if engine.processes > 1:
        check_same_data(task, [args.float_model] if args.float_model else [])
    float_model = read_float_model(usm, keras, task, args)
    if engine.process == 0:
        batches = len(task.batches["train"])  # rate and masks follow the step; another number of devices may change it
        remember_arguments(args, task.corpus, FREE_ARGUMENTS, files=("float_model",), batches_per_epoch=batches)
    train, dev = task.batches["train"], task.batches["dev"]
    steps = args.epochs * len(train)
    with engine.scope:
        model = make_model(usm, keras, task.tokenizer.vocab_size, float_model, steps, args)
    del float_model  # its memory
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: train.set_epoch(epoch)),
        usm.callbacks.NMPruning(num_shots=5, interval=max(steps // 15, 1)),
    ]
    backup_folder = os.path.join(args.output, f"backup-{engine.process}")
    if engine.whole:
        backup = usm.callbacks.Backup(backup_folder)
        if engine.processes > 1:
            share_backup(backup)
        callbacks = [backup, *callbacks, usm.callbacks.FiniteLoss()]
    history = model.fit(
        feed(usm, keras, train, engine),
        validation_data=feed(usm, keras, dev, engine),
        epochs=args.epochs,
        shuffle=False,  # the batches are shuffled already, reproducibly
        callbacks=callbacks,
        verbose="auto" if engine.process == 0 else 0,
    )
    if engine.process == 0:
        usm.save_tokenizer(task.tokenizer, os.path.join(args.output, "tokenizer.json"))
    save(keras, model, engine, path)
    shutil.rmtree(backup_folder, ignore_errors=True)
    if engine.process == 0:
        print(f"\n{engine.copies} copies of the model trained on {engine.shard[1]} shards of the data: {path}")
    return history


if __name__ == "__main__":
    main()
