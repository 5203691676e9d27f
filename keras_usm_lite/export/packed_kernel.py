"""`PackedKernel`: a kernel that a SavedModel stores in its packed bits and unpacks once, when it is loaded."""

import dataclasses
import functools
import hashlib

import numpy as np

from keras_usm_lite.core.quantize import dequantize
from keras_usm_lite.packing.packed_layer import pack_layer
from keras_usm_lite.packing.patterns import pattern_table, word_layout


class PackedKernel:
    """The effective kernel of a compressed layer as TensorFlow objects to be tracked by a SavedModel.

    The arrays of `pack_layer` go into the file, and the graph of `unpack_kernel` beside them. TensorFlow runs that
    graph when the file is loaded, so a call of the model costs what it costs with float kernels.

    Args:
        layer: a layer with a `CompressedKernel`.
        name: its path, for messages.

    Attributes:
        arrays: dict of uint8 and float32 `tf.Variable`s, what is stored.
        resource: the float32 kernel, which is not stored.

    Raises:
        ValueError: the layer cannot be packed yet, see `pack_layer`.
    """

    def __init__(self, layer, name):
        import tensorflow as tf

        entry, arrays = pack_layer(layer, name)
        self.entry = dataclasses.replace(entry, name="")  # kernels that differ in their values only share a graph
        self.arrays = {key: tf.Variable(value, trainable=False, name=key) for key, value in arrays.items()}
        self.resource = _unpacked_once()(_digest(self.entry, arrays), self._shape(), self._unpack)

    def read(self):
        """Return the effective kernel, a float32 tensor `[rows, columns]`."""
        import tensorflow as tf

        kernel = tf.raw_ops.ReadVariableOp(resource=self.resource.resource_handle, dtype=tf.float32)
        return tf.ensure_shape(kernel, self._shape())

    def _shape(self):
        return self.entry.rows, self.entry.columns

    def _unpack(self):
        return _unpack_function(self.entry)({key: variable.value() for key, variable in self.arrays.items()})


def unpack_kernel(entry, arrays):
    """Return the kernel that `pack_layer` packed, computed by plain TensorFlow operations.

    Args:
        entry: the `PackedEntry` made by `pack_layer`.
        arrays: its arrays as tensors.

    Returns:
        float32 tensor `[rows, columns]`, bit for bit the effective kernel.
    """
    import tensorflow as tf

    patterns = None if entry.n is None else _unpack_patterns(arrays["patterns"], entry)
    if not entry.quantized:
        return _matrix(_place(arrays["values"], patterns, entry), entry)
    lowest, step = entry.grid
    fields = unpack_stream(arrays["codes"], entry.bits, entry.kept_rows * entry.columns)
    codes = _matrix(_place(tf.cast(fields, tf.int32) * step + lowest, patterns, entry), entry)
    kernel = dequantize(codes, arrays["scale"], arrays.get("zero_point"))
    if patterns is None:
        return kernel
    mask = _matrix(tf.gather(pattern_table(entry.n, entry.m), patterns), entry)
    return tf.where(mask, kernel, 0.0)  # an asymmetric code of zero does not stand for zero


def unpack_stream(stream, bits, count):
    """Return the values that `pack_bits` wrote: one bit per column, `value = sum_j bit_j 2^j`.

    Args:
        stream: uint8 tensor `[ceil(count * bits / 8)]`.
        bits: bits per value, 1 to 31.
        count: number of values.

    Returns:
        Tensor `[count]`, uint8 for up to 8 bits, otherwise int32.
    """
    import tensorflow as tf

    dtype = np.uint8 if bits <= 8 else np.int32
    ones = tf.bitwise.right_shift(stream[:, None], np.arange(8, dtype=np.uint8)) & np.uint8(1)
    ones = tf.reshape(tf.reshape(ones, [-1])[: count * bits], [count, bits])
    return tf.reduce_sum(tf.cast(ones, dtype) * (1 << np.arange(bits)).astype(dtype), axis=1)


def _unpack_patterns(stream, entry):
    """Return which pattern each group has, int32 `[groups]`, column after column; see `pack_patterns`."""
    import tensorflow as tf

    groups_per_word, bits = word_layout(entry.n, entry.m)
    words = tf.cast(unpack_stream(stream, bits, -(-entry.groups // groups_per_word)), tf.int32)
    powers = np.array([entry.patterns**j for j in range(groups_per_word)], np.int32)
    return tf.reshape(words[:, None] // powers % entry.patterns, [-1])[: entry.groups]


def _place(kept, patterns, entry):
    """Put the kept values of every group where its pattern says, with zeros elsewhere."""
    import tensorflow as tf

    if patterns is None:
        return kept
    table = pattern_table(entry.n, entry.m)
    source = tf.gather((np.cumsum(table, axis=1) * table).astype(np.int32), patterns)  # 0 stands for pruned
    return tf.gather(tf.pad(tf.reshape(kept, [-1, entry.n]), [[0, 0], [1, 0]]), source, batch_dims=1)


def _matrix(stream, entry):
    """Return the matrix `[rows, columns]` that was listed column after column."""
    import tensorflow as tf

    return tf.transpose(tf.reshape(stream, [entry.columns, entry.rows]))


@functools.cache
def _unpack_function(entry):
    """Return `unpack_kernel` as one graph, which all kernels of this shape and kind share."""
    import tensorflow as tf

    return tf.function(functools.partial(unpack_kernel, entry), autograph=False)


def _digest(entry, arrays):
    """Name a kernel by its content: what has the same name in one process is the same kernel."""
    content = hashlib.sha256(repr(entry).encode())
    for name, array in arrays.items():
        content.update(name.encode() + array.tobytes())
    return content.hexdigest()


@functools.cache
def _unpacked_once():
    """Return the class of a variable that is made and filled when a SavedModel is loaded, and never stored."""
    import tensorflow as tf

    class UnpackedOnce(tf.saved_model.experimental.TrackableResource):
        def __init__(self, name, shape, unpack):
            super().__init__()
            self._name, self._shape, self._unpack = name, shape, unpack
            self._initialize()

        def _create_resource(self):
            return tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=self._shape, shared_name=self._name)

        def _initialize(self):
            tf.raw_ops.AssignVariableOp(resource=self.resource_handle, value=self._unpack())

    return UnpackedOnce
