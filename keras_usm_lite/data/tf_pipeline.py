"""The same data as tf.data pipelines, which load in parallel beside training on TensorFlow."""

import os

from keras_usm_lite.data.audio import load_audio


def to_tf_dataset(batches):
    """Turns `SpeechBatches` into a tf.data pipeline that gives the same batches in the same order.

    Batches are loaded in parallel and prefetched. A pass over the pipeline takes the order of `batches.epoch`
    and moves `batches` on to the next epoch when it starts, so each pass is shuffled anew.
    Automatic sharding is off: give each worker its own `SpeechBatches(..., shard=(index, count))`.

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


def _without_autoshard(dataset):
    import tensorflow as tf

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)
