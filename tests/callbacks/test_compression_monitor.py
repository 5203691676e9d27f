"""What the monitor counts, against closed forms, and where its numbers end up."""

import csv
import glob
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.callbacks.compression_monitor import CompressionMonitor

X = np.random.default_rng(0).normal(size=(6, 12)).astype("float32")
Y = np.random.default_rng(1).normal(size=(6, 3)).astype("float32")
NAMES = ["mask_flips", "scale_drift", "nm_violations", "bits"]


def make_model(*layers, learning_rate=0.0):
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((12,)), *layers])
    model.compile(keras.optimizers.SGD(learning_rate), "mse")
    return model


def fit(model, *callbacks, epochs=1):
    return model.fit(X, Y, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks)).history


def array(variable):
    return np.array(ops.convert_to_numpy(variable))


class AtEpochs(keras.callbacks.Callback):
    """Calls `actions[epoch]()` at the end of an epoch."""

    def __init__(self, actions):
        super().__init__()
        self.actions = actions

    def on_epoch_end(self, epoch, logs=None):
        self.actions.get(epoch, lambda: None)()


def test_pruning_half_of_the_weights_flips_half_of_the_mask_once_and_ends_the_violations():
    model = make_model(usm.QuantDense(8, None, sparsity="2:4"), usm.QuantDense(3, "int4", sparsity="1:4"))
    pruning = usm.callbacks.NMPruning(start_step=1)
    history = fit(model, pruning, CompressionMonitor(), epochs=3)
    flips = (12 * 8 / 2 + 8 * 3 * 3 / 4) / (12 * 8 + 8 * 3)
    np.testing.assert_allclose(history["mask_flips"], [0.0, flips, 0.0], rtol=1e-12)
    # Before: three groups in each of 8 columns, and those of the int4 layer in which more than one code is not zero.
    assert history["nm_violations"][0] >= 3 * 8 + 1
    assert history["nm_violations"][1:] == [0, 0]


def test_mask_flips_are_the_share_of_changed_entries_over_all_layers_whatever_the_shapes():
    model = make_model(usm.NMSparseDense(7, "2:4"), usm.QuantDense(8), usm.NMSparseDense(3, "1:2"))
    masks = [model.layers[0].mask, model.layers[2].mask]
    rng = np.random.default_rng(3)
    values = [[rng.integers(0, 2, mask.shape).astype("float32") for mask in masks] for _ in range(2)]

    def assign(epoch):
        return lambda: [mask.assign(value) for mask, value in zip(masks, values[epoch], strict=True)]

    history = fit(model, AtEpochs({0: assign(0), 1: assign(1)}), CompressionMonitor(), epochs=3)
    steps = [[np.ones(mask.shape) for mask in masks], *values, values[-1]]
    joined = [np.concatenate([mask.ravel() for mask in step]) for step in steps]
    expected = [np.mean(old != new) for old, new in zip(joined, joined[1:], strict=False)]
    assert 0.2 < expected[1] < 0.8
    np.testing.assert_allclose(history["mask_flips"], expected, rtol=1e-12)


def test_scale_drift_is_the_median_over_layers_of_the_relative_change():
    model = make_model(usm.QuantDense(8), usm.QuantDense(8, "int2"), usm.QuantDense(3, "int8"))

    def stretch(*factors):
        for layer, factor in zip(model.layers, factors, strict=True):
            layer.kernel.assign(factor * array(layer.kernel))

    actions = {1: lambda: stretch(1.5, 1.1, 1.0), 2: lambda: stretch(0.5, 0.25, 0.75)}
    history = fit(model, AtEpochs(actions), CompressionMonitor(), epochs=3)
    np.testing.assert_allclose(history["scale_drift"], [0.0, 0.1, 0.5], rtol=1e-5)


def test_violations_count_the_groups_that_hold_too_many_non_zeros_of_the_effective_kernel():
    model = make_model(usm.NMSparseDense(3, "2:4"))
    kernel = np.ones((12, 3), "float32")
    kernel[0:2, 0] = 0.0  # exactly two of four
    kernel[4:7, 1] = 0.0  # fewer
    kernel[8, 2] = 0.0  # still one too many
    model.layers[0].kernel.assign(kernel)
    assert fit(model, CompressionMonitor())["nm_violations"] == [9 - 2]


def test_bits_are_weighted_by_weights_and_follow_the_schedule():
    model = make_model(
        usm.QuantDense(8, "int2"), usm.NMSparseDense(16, "2:4"), keras.layers.Dense(8), usm.QuantDense(3)
    )
    schedule = usm.callbacks.QuantizationSchedule([(0, None), (1, 8), (2, 2)])
    history = fit(model, schedule, CompressionMonitor(), epochs=3)
    sizes = np.array([12 * 8, 8 * 16, 8 * 3])
    expected = [np.average(bits, weights=sizes) for bits in ([32, 32, 32], [8, 32, 8], [2, 32, 4])]
    np.testing.assert_allclose(history["bits"], expected, rtol=1e-12)
    # No codes before the second epoch: the first drift is of the third, where steps of 1/127 become steps of 1 and 1/7.
    np.testing.assert_allclose(history["scale_drift"], [0.0, 0.0, np.median([127 - 1, 127 / 7 - 1])], rtol=1e-4)


def test_the_numbers_reach_the_history_and_later_callbacks_in_every_nth_epoch(tmp_path):
    path = tmp_path / "log.csv"
    model = make_model(usm.QuantDense(3, sparsity="2:4"), learning_rate=0.1)
    history = fit(model, CompressionMonitor(), keras.callbacks.CSVLogger(str(path)), epochs=2)
    rows = list(csv.DictReader(path.open()))
    for name in NAMES:
        np.testing.assert_allclose([float(row[name]) for row in rows], history[name], rtol=1e-6)
    assert all(type(value) in (int, float) for name in NAMES for value in history[name])
    history = fit(model, usm.callbacks.NMPruning(start_step=2), CompressionMonitor(every=2), epochs=5)
    assert [len(history[name]) for name in ["loss", *NAMES]] == [5, 2, 2, 2, 2]
    assert history["mask_flips"] == [0.5, 0.0]  # pruned before the first epoch of this training, looked at after two


def test_a_restored_training_is_compared_with_the_state_that_was_restored(tmp_path):
    def run(callback):
        model = make_model(usm.QuantDense(3, sparsity="2:4"), learning_rate=0.1)
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"), delete_checkpoint=False)
        return fit(model, CompressionMonitor(), usm.callbacks.NMPruning(), backup, *callback, epochs=2)

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Interrupt()])
    history = run([])
    assert len(history["loss"]) == 1
    assert history["mask_flips"] == [0.0]


def test_watching_a_training_does_not_change_it():
    def run(*callbacks):
        layers = [usm.QuantDense(8, usm.QuantizationConfig(scale="mse"), sparsity="2:4"), keras.layers.Dropout(0.3)]
        model = make_model(*layers, usm.QuantDense(3, sparsity=usm.SparsityConfig(every_step=True)), learning_rate=0.1)
        fit(model, usm.callbacks.NMPruning(start_step=1), *callbacks, epochs=3)
        return model.get_weights()

    for watched, alone in zip(run(CompressionMonitor()), run(), strict=True):
        np.testing.assert_array_equal(watched, alone)


def test_values_of_every_layer_are_readable_as_tensorboard_scalars(tmp_path):
    tf = pytest.importorskip("tensorflow")
    folder = tmp_path / "logs"
    model = make_model(usm.NMSparseDense(8, "2:4", name="first"), usm.QuantDense(3, "int4", name="second"))
    monitor = CompressionMonitor(log_dir=folder)
    fit(model, usm.callbacks.NMPruning(start_step=1), monitor, epochs=2)
    (path,) = glob.glob(str(folder / "events.out.tfevents.*"))
    read = {}
    for event in tf.compat.v1.train.summary_iterator(path):
        for value in event.summary.value:
            read[value.tag, event.step] = value.simple_value
    prefix = {layer.name: layer.path or layer.name for layer in model.layers}
    expected = {}
    for epoch, flips, violations in ((0, 0.0, 24), (1, 0.5, 0)):
        expected[f"{prefix['first']}/mask_flips", epoch] = flips
        expected[f"{prefix['first']}/nm_violations", epoch] = violations
        expected[f"{prefix['first']}/bits", epoch] = 32
        expected[f"{prefix['second']}/bits", epoch] = 4
        expected[f"{prefix['second']}/scale_drift", epoch] = 0.0
    assert read == expected
    fit(model, monitor)
    assert len(glob.glob(str(folder / "events.out.tfevents.*"))) == 2


def test_a_log_folder_without_tensorflow_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="Install tensorflow, or drop log_dir"):
        CompressionMonitor(log_dir=tmp_path)
    CompressionMonitor()


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_an_interval_below_one_epoch_is_refused(every):
    with pytest.raises(ValueError, match=f"got {every}"):
        CompressionMonitor(every=every)


def test_a_model_without_compressed_layers_is_refused():
    with pytest.raises(ValueError, match="no compressed layer"):
        fit(make_model(keras.layers.Dense(3), usm.QuantDense(3, None)), CompressionMonitor())
