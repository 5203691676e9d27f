"""The same data as tf.data pipelines, which load in parallel beside training on TensorFlow."""

import contextlib
import itertools
import os

from keras_usm_lite.data.audio import load_audio
from keras_usm_lite.data.manifest import replacing

READ_TOGETHER = 4  # files that `record_dataset` reads at a time
SHUFFLED = 256  # utterances of each of them that it shuffles at a time


def to_tf_dataset(batches):
    """Turns `SpeechBatches` into a tf.data pipeline that gives the same batches in the same order.

    Batches are loaded in parallel and prefetched. A pass over the pipeline takes the order of `batches.epoch`
    and moves `batches` on to the next epoch when it starts, so each pass is shuffled anew.
    Automatic sharding is off: give each worker its own `SpeechBatches(..., shard=(index, count))`.
    The pipeline loads in this Python process; for one that can run elsewhere, see `record_dataset`.

    Args:
        batches: A `SpeechBatches`.

    Returns:
        A `tf.data.Dataset` of known cardinality with elements `(x, y, sample_weight)`, see `SpeechBatches`.
        Batch size and number of frames are None in the element spec, since they differ between batches.

    Example:
    >>> import numpy as np
    >>> from keras_usm_lite.data.speech_batches import SpeechBatches
    >>> class Silence(list):
    ...     num_frames = property(lambda self: np.array([len(f) for f in self]))
    >>> features = Silence(np.zeros((n, 2), "float32") for n in (5, 7, 30))
    >>> dataset = to_tf_dataset(SpeechBatches(features, [[1], [2, 2], [3]], batch_frames=32, num_buckets=2))
    >>> sorted(x["features"].shape.as_list() for x, y, sample_weight in dataset)
    [[1, 32, 2], [4, 8, 2]]
    """
    import tensorflow as tf

    def plan():
        epoch = batches.epoch
        batches.set_epoch(epoch + 1)
        yield from batches.plan(epoch)

    def load_arrays(bucket, indices):
        x, y, sample_weight = batches.make_batch(bucket, indices)
        return x["features"], x["lengths"], y, sample_weight

    def load(bucket, indices):
        types = (tf.float32, tf.int32, tf.int32, tf.float32)
        arrays = tf.numpy_function(load_arrays, (bucket, indices), types, stateful=False)
        shapes = ((None, None, batches.feature_size), (None,), (None, batches.label_size), (None,))
        features, lengths, y, sample_weight = map(tf.ensure_shape, arrays, shapes)
        return {"features": features, "lengths": lengths}, y, sample_weight

    indices_spec = (tf.TensorSpec((), tf.int64), tf.TensorSpec((None,), tf.int64))
    dataset = tf.data.Dataset.from_generator(plan, output_signature=indices_spec)
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))
    return _without_autoshard(dataset.prefetch(tf.data.AUTOTUNE))


def record_dataset(batches, folder, num_files=16):
    """Writes the utterances of `SpeechBatches` to TFRecord files and makes a tf.data pipeline that reads them.

    The pipeline of `to_tf_dataset` loads in the Python process that made it. This one consists of TensorFlow's own
    operations and of paths, so it can run elsewhere, for example on the workers of a tf.data service.
    Batches have the shapes of `batches.bucket_shapes`, and every utterance is in one of them once a pass. Which ones
    are together is drawn anew in each pass, from 1,024 utterances at a time. The passes follow from TensorFlow's
    global seed, not from the epoch: a training that is continued begins with the first pass again.

    A service in the mode "distributed_epoch" divides the files among its workers. Each of them fills up its own last
    batches with empty rows, so there may be a few batches more, and their number is not known beforehand.

    Args:
        batches: A `SpeechBatches`; of a shard, the utterances of the shard.
        folder: Where `utterances-*.tfrecord` are written, those before replaced. Who reads the pipeline needs it
            under the same path.
        num_files: Number of files, at least that of the service's workers.

    Returns:
        A `tf.data.Dataset` with the elements of `to_tf_dataset(batches)`.

    Raises:
        ValueError: `num_files` is below 1.
        OSError: The folder cannot be made.
        tf.errors.OpError: A file cannot be written; files of an earlier call are intact.

    Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from keras_usm_lite.data.speech_batches import SpeechBatches
    >>> class Silence(list):
    ...     num_frames = property(lambda self: np.array([len(f) for f in self]))
    >>> features = Silence(np.zeros((n, 2), "float32") for n in (5, 7, 30))
    >>> batches = SpeechBatches(features, [[1], [2, 2], [3]], batch_frames=32, num_buckets=2)
    >>> dataset = record_dataset(batches, tempfile.mkdtemp())
    >>> sorted(x["features"].shape.as_list() for x, y, sample_weight in dataset)
    [[1, 32, 2], [4, 8, 2]]
    """
    import tensorflow as tf

    if num_files < 1:
        raise ValueError(f"num_files is {num_files}; allowed are integers of at least 1.")
    names = [f"utterances-{number:05d}-of-{num_files:05d}.tfrecord" for number in range(num_files)]
    paths = [os.path.join(folder, name) for name in names]
    os.makedirs(folder, exist_ok=True)
    _write_records(batches, paths)
    sizes, lengths = (tf.constant(numbers, tf.int64) for numbers in zip(*batches.bucket_shapes, strict=True))

    def read(path, seed):
        def shuffle(records):
            return tf.random.experimental.stateless_shuffle(records, (seed, 0))

        # Behind `Dataset.shuffle`, group_by_window would give every worker of a service all files (TensorFlow 2.21).
        return tf.data.TFRecordDataset(path).batch(SHUFFLED).map(shuffle).unbatch()

    def parse(record):
        columns = {
            "features": tf.io.FixedLenFeature((), tf.string),
            "y": tf.io.FixedLenFeature((batches.label_size,), tf.int64),
        }
        row = tf.io.parse_single_example(record, columns)
        features = tf.reshape(tf.io.decode_raw(row["features"], tf.float32), (-1, batches.feature_size))
        return {"features": features, "lengths": tf.shape(features)[0]}, tf.cast(row["y"], tf.int32), 1.0

    def find_bucket(x, y, sample_weight):
        return tf.searchsorted(lengths, tf.cast(x["lengths"][None], tf.int64), out_type=tf.int64)[0]

    def make_batch(bucket, utterances):
        def fill(rows):  # with empty ones
            missing = sizes[bucket] - tf.shape(rows, tf.int64)[0]
            return tf.pad(rows, [(0, missing)] + [(0, 0)] * (rows.shape.rank - 1))

        shapes = {"features": (lengths[bucket], batches.feature_size), "lengths": ()}, (batches.label_size,), ()
        padded = utterances.padded_batch(sizes[bucket], shapes)
        return padded.map(lambda *batch: tf.nest.map_structure(fill, batch))

    seeds = tf.data.Dataset.random(rerandomize_each_iteration=True)
    dataset = tf.data.Dataset.zip(tf.data.Dataset.from_tensor_slices(paths), seeds).interleave(read, READ_TOGETHER)
    dataset = dataset.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.group_by_window(find_bucket, make_batch, window_size_func=lambda bucket: sizes[bucket])
    return _without_autoshard(dataset.prefetch(tf.data.AUTOTUNE))


def audio_dataset(utterances, sample_rate=16000):
    """Makes a tf.data pipeline of raw audio and transcripts, decoded in parallel, in the given order.

    Args:
        utterances: List of `Utterance`.
        sample_rate: Samples per second of the audio.

    Returns:
        A `tf.data.Dataset` with elements `(audio, text)`: float32 `[n]` in [-1, 1] and a string scalar.

    Raises:
        tf.errors.InvalidArgumentError: On iteration, an audio file cannot be read (see `load_audio`).

    Example:
    >>> import os, tempfile
    >>> import numpy as np
    >>> from keras_usm_lite.data.audio import write_wav
    >>> from keras_usm_lite.data.manifest import Utterance
    >>> path = os.path.join(tempfile.mkdtemp(), "a.wav")
    >>> write_wav(path, np.zeros(1600))
    >>> for audio, text in audio_dataset([Utterance(path, 0.1, "hm", "anna")]):
    ...     print(audio.shape, text.numpy().decode())
    (1600,) hm
    """
    import tensorflow as tf

    def decode(path):
        return load_audio(os.fsdecode(path), sample_rate)

    def load(path, text):
        audio = tf.numpy_function(decode, (path,), tf.float32, stateful=False)
        return tf.ensure_shape(audio, (None,)), text

    paths = tf.constant([os.fsencode(u.path) for u in utterances], dtype=tf.string)
    texts = tf.constant([u.text for u in utterances], dtype=tf.string)
    dataset = tf.data.Dataset.from_tensor_slices((paths, texts))
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return _without_autoshard(dataset.prefetch(tf.data.AUTOTUNE))


def _write_records(batches, paths):
    """Deals the utterances of the first epoch, in its order, to the files."""
    import tensorflow as tf

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(replacing(path)) for path in paths]
        writers = itertools.cycle([stack.enter_context(tf.io.TFRecordWriter(file)) for file in files])
        for bucket, indices in batches.plan(0):
            x, y, _ = batches.make_batch(bucket, indices)
            for features, length, labels in zip(x["features"], x["lengths"][: len(indices)], y, strict=False):
                columns = {
                    "features": tf.train.Feature(bytes_list={"value": [features[:length].astype("<f4").tobytes()]}),
                    "y": tf.train.Feature(int64_list={"value": labels}),
                }
                next(writers).write(tf.train.Example(features={"feature": columns}).SerializeToString())


def _without_autoshard(dataset):
    import tensorflow as tf

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)
