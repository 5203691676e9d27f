"""`CompressionMonitor`: what masks, scales and bits did during an epoch."""

import dataclasses
import importlib.util
import time

import keras
import numpy as np
from keras import ops

from keras_usm_lite.callbacks.step_callback import require_built
from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.core.nm_mask import nm_violations
from keras_usm_lite.rewrite import layer_path


class CompressionMonitor(keras.callbacks.Callback):
    """Log the state of the compression at the end of an epoch, beside the loss; the training is not touched.

    * `mask_flips`: share of the mask entries of all sparse layers that changed since the last look (the sparse
      architecture divergence, as a share)
    * `scale_drift`: `mean|s - s_old| / mean|s_old|` of the quantization scales `s` since the last look, median over the
      layers that had integer codes both times (0 if none had)
    * `nm_violations`: groups of M weights of the effective kernels that hold more than N non-zeros; 0 once pruned
    * `bits`: bits in force, mean over the weights of the compressed kernels; 32 in a float warm-up and for kernels that
      are only sparse

    The first look is taken before the first training step. Keras hands one `logs` dict from callback to callback, so
    put this one *before* those that read it, such as `CSVLogger`.

    Args:
        every: measure in epochs whose number, counted from 1, is a multiple of this. As with `validation_freq`, the
            logs of the epochs in between have no such entries.
        log_dir: None, or a folder for the values of each single layer as TensorBoard scalars
            "<layer path>/<name>" over epochs; needs TensorFlow installed, with any backend.

    Raises:
        ValueError: `every` below 1, or a model without compressed layers.
        ImportError: `log_dir` without TensorFlow.

    Source: sparse architecture divergence: arXiv 2102.04010.

    Example:

    >>> import keras_usm_lite as usm
    >>> model = keras.Sequential([keras.Input((8,)), usm.QuantDense(2, "int4", sparsity="2:4")])
    >>> model.compile("sgd", "mse")
    >>> callbacks = [usm.callbacks.NMPruning(), CompressionMonitor()]
    >>> history = model.fit(np.ones((4, 8)), np.ones((4, 2)), verbose=0, callbacks=callbacks).history
    >>> history["mask_flips"], history["nm_violations"], history["bits"]
    ([0.5], [0], [4.0])
    """

    def __init__(self, every=1, log_dir=None):
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1 epoch, got {every!r}.")
        if log_dir is not None and importlib.util.find_spec("tensorflow") is None:
            raise ImportError(
                f"log_dir={str(log_dir)!r} asks for TensorBoard files, which need TensorFlow, and it is not installed. "
                "Install tensorflow, or drop log_dir: the epoch's logs do without."
            )
        self.every = every
        self.log_dir = log_dir

    def on_train_begin(self, logs=None):
        """Find the compressed layers and forget an earlier training."""
        require_built(self.model)
        self._layers = compressed_layers(self.model)
        if not self._layers:
            raise ValueError(
                "CompressionMonitor found no compressed layer. Use it on a model made by usm.compress, or drop it."
            )
        self._seen = None
        self._events = None if self.log_dir is None else _EventFile(self.log_dir)

    def on_epoch_begin(self, epoch, logs=None):
        """Take the first look, after every callback that restores weights has done so."""
        if self._seen is None:
            self._seen = [_Look.at(layer) for layer in self._layers]

    def on_epoch_end(self, epoch, logs=None):
        """Add the totals to `logs`, and each layer's values to the TensorBoard file."""
        if (epoch + 1) % self.every:
            return
        looks = [_Look.at(layer) for layer in self._layers]
        rows = [_measure(*triple) for triple in zip(self._layers, self._seen, looks, strict=True)]
        self._seen = looks
        if logs is not None:
            logs.update(_totals(rows, [float(np.prod(layer.kernel.shape)) for layer in self._layers]))
        if self._events is not None:
            paths = [layer_path(layer) for layer in self._layers]
            self._events.write(
                epoch, {f"{p}/{name}": v for p, row in zip(paths, rows, strict=True) for name, v in row.items()}
            )

    def on_train_end(self, logs=None):
        """Close the TensorBoard file."""
        if self._events is not None:
            self._events.close()


@dataclasses.dataclass(frozen=True)
class _Look:
    """What the next look is compared with, in host memory: the mask in one bit per weight, and the scale."""

    mask: np.ndarray | None
    scale: np.ndarray | None

    @classmethod
    def at(cls, layer):
        mask = None if layer.sparsity is None else np.packbits(ops.convert_to_numpy(layer.mask) != 0)
        scale = ops.convert_to_numpy(layer.quantized_kernel()[1]) if _bits(layer) <= 8 else None
        return cls(mask, None if scale is None else np.array(scale))


def _measure(layer, old, new):
    """Return the values of one layer, those that it has."""
    values = {"bits": _bits(layer)}
    if layer.sparsity is not None:
        values["mask_flips"] = int(np.unpackbits(old.mask ^ new.mask).sum()) / int(np.prod(layer.mask.shape))
        violations = nm_violations(layer.effective_kernel(), layer.sparsity.n, layer.sparsity.m)
        values["nm_violations"] = int(ops.convert_to_numpy(violations))
    if old.scale is not None and new.scale is not None:
        values["scale_drift"] = float(np.mean(np.abs(new.scale - old.scale)) / np.mean(np.abs(old.scale)))
    return values


def _totals(rows, sizes):
    def mean(name):
        having = [(row[name], size) for row, size in zip(rows, sizes, strict=True) if name in row]
        return sum(value * size for value, size in having) / max(sum(size for _, size in having), 1.0)

    drifts = [row["scale_drift"] for row in rows if "scale_drift" in row]
    return {
        "mask_flips": mean("mask_flips"),
        "scale_drift": float(np.median(drifts)) if drifts else 0.0,
        "nm_violations": sum(row.get("nm_violations", 0) for row in rows),
        "bits": mean("bits"),
    }


def _bits(layer):
    return layer.active_bits if layer.active_bits <= 8 else 32


class _EventFile:
    """A file of scalars for TensorBoard.

    Written record by record, because `tf.summary` would start TensorFlow's devices, and with them take the memory of a
    GPU that another backend computes on.
    """

    def __init__(self, folder):
        import tensorflow as tf

        self._event, self._summary = tf.compat.v1.Event, tf.compat.v1.Summary
        tf.io.gfile.makedirs(str(folder))
        self._file = tf.io.TFRecordWriter(tf.io.gfile.join(str(folder), f"events.out.tfevents.{time.time_ns()}"))
        self._append(file_version="brain.Event:2")

    def write(self, step, scalars):
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(step=step, summary=self._summary(value=values))

    def close(self):
        self._file.close()

    def _append(self, **fields):
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()
