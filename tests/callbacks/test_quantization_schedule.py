"""Bit stages, scales and freezing inside `model.fit`, against trainings done by hand and runs that were interrupted."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.callbacks.quantization_schedule import QuantizationSchedule
from keras_usm_lite.callbacks.step_callback import StepCallback
from keras_usm_lite.layers.compressed_kernel import FLOAT_BITS

X = np.random.default_rng(0).normal(size=(12, 16)).astype("float32")
Y = np.random.default_rng(1).normal(size=(12, 4)).astype("float32")


def make_model(quantization="int4", optimizer=None, **compile_options):
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((16,)), usm.QuantDense(8, quantization), usm.QuantDense(4, quantization)])
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse", **compile_options)
    return model


def fit(model, *callbacks, epochs=1, batch_size=2):
    """Six steps per epoch."""
    return model.fit(X, Y, batch_size, epochs, verbose=0, shuffle=False, callbacks=list(callbacks)).history


def array(variable):
    return np.array(ops.convert_to_numpy(variable))


class Recorder(StepCallback):
    """Writes down what `look(model)` returns before every step, under its number."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen = look, {}

    def on_step(self, step):
        self.synchronize()
        self.seen[step] = self.look(self.model)


def record_bits(model):
    return tuple(layer.active_bits for layer in usm.compressed_layers(model))


def record_scale(model):
    return array(model.layers[0].kernel_scale)


def changes(seen):
    """The steps before which a recorded array differed from that of the step before."""
    return [step for step in seen if step - 1 in seen and not np.array_equal(seen[step], seen[step - 1])]


def test_each_stage_begins_before_its_own_step_and_layers_keep_at_least_their_own_bits():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), usm.QuantDense(8, "int8"), usm.QuantDense(4, "int2")])
    model.compile("sgd", "mse")
    recorder = Recorder(record_bits)
    fit(model, QuantizationSchedule([(0, None), (3, 8), (7, 4), (10, 2)]), recorder, epochs=2)
    expected = {step: (FLOAT_BITS, FLOAT_BITS) for step in range(3)}
    expected |= {step: (8, 8) for step in range(3, 7)}
    expected |= {step: (8, 4) for step in range(7, 10)}
    expected |= {step: (8, 2) for step in range(10, 12)}
    assert recorder.seen == expected


def test_layers_inside_nested_and_subclassed_models_follow_the_schedule():
    model = usm.compress(usm.USMForCTC(9, num_layers=1, num_mel_bins=16), {"ffn|feed_forward": ("int4", None)})
    layers = usm.compressed_layers(model)
    schedule = QuantizationSchedule([(0, 8), (5, 4)])
    schedule.set_model(model)
    schedule.on_train_begin()
    schedule.on_step(0)
    assert layers and {layer.active_bits for layer in layers} == {8}
    schedule.on_step(5)
    assert {layer.active_bits for layer in layers} == {4}


@pytest.mark.parametrize("scale", ["absmax", "mse", "learned"])
def test_a_scheduled_training_equals_one_whose_bits_are_set_by_hand(scale):
    config = usm.QuantizationConfig(bits=2, scale=scale)
    model, by_hand = make_model(config), make_model(config)
    fit(model, QuantizationSchedule([(0, 8), (2, 4), (4, 2)]))
    for step in range(6):
        if step % 2 == 0:
            for layer in by_hand.layers:
                layer.bits.assign(8.0 / 2 ** (step // 2))
                layer.update_scale()
        by_hand.train_on_batch(X[2 * step : 2 * step + 2], Y[2 * step : 2 * step + 2])
    for ours, theirs in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["absmax"])
def test_a_float_warm_up_trains_like_an_uncompressed_layer(scale):
    config = usm.QuantizationConfig(bits=2, scale=scale)
    model, plain, quantized = (make_model(c, keras.optimizers.Adam(0.02)) for c in (config, None, config))
    with pytest.warns(UserWarning, match="float instead of 2"):
        warm = fit(model, QuantizationSchedule([(0, None)]))["loss"]
    np.testing.assert_allclose(warm, fit(plain)["loss"], rtol=1e-5)
    for ours, theirs in zip(model.layers, plain.layers, strict=True):
        np.testing.assert_allclose(array(ours.kernel), array(theirs.kernel), atol=1e-6)
        np.testing.assert_allclose(array(ours.effective_kernel()), array(theirs.kernel), atol=1e-6)
    fit(quantized)  # without the schedule: another training
    assert np.abs(array(quantized.layers[0].kernel) - array(plain.layers[0].kernel)).max() > 1e-2


@pytest.mark.parametrize(
    ("codebook", "scale"),
    [("symmetric", "absmax"), ("asymmetric", "absmax"), ("asymmetric", "mse"), ("midrise", "mse"), ("full", "learned")],
)
def test_every_quantizer_starts_its_warm_up_at_the_float_kernel(codebook, scale):
    model = make_model(usm.QuantizationConfig(bits=4, codebook=codebook, scale=scale))
    schedule = QuantizationSchedule([(0, None)])
    schedule.set_model(model)
    schedule.on_train_begin()
    schedule.on_step(0)
    for layer in model.layers:
        kernel = array(layer.kernel)
        np.testing.assert_allclose(array(layer.effective_kernel()), kernel, atol=2e-7 * np.abs(kernel).max())


def test_codes_fit_the_bits_of_each_stage_and_end_ternary():
    def largest_code(model):
        return max(int(np.abs(array(layer.quantized_kernel()[0])).max()) for layer in model.layers)

    model, recorder = make_model("int2"), Recorder(largest_code)
    fit(model, QuantizationSchedule([(0, 8), (2, 4), (4, 2)]), recorder)
    assert [recorder.seen[step] for step in range(6)] == [127, 127, 7, 7, 1, 1]
    assert set(np.unique(array(model.layers[0].quantized_kernel()[0]))) == {-1, 0, 1}


def test_mse_scales_are_estimated_at_stage_starts_and_at_every_interval_and_not_otherwise():
    config = usm.QuantizationConfig(bits=4, scale="mse")
    recorder = Recorder(record_scale)
    fit(make_model(config), QuantizationSchedule([(0, 8), (7, 4)]), recorder, epochs=2)
    assert changes(recorder.seen) == [7]
    recorder = Recorder(record_scale)
    fit(make_model(config), QuantizationSchedule([(0, 8), (7, 4)], scale_interval=4), recorder, epochs=2)
    assert changes(recorder.seen) == [4, 7, 8]


def test_a_learned_scale_is_estimated_when_its_bits_change_and_left_to_training_otherwise():
    model = make_model(usm.QuantizationConfig(bits=4, scale="learned"), keras.optimizers.SGD(0.0))
    model.layers[0].kernel_scale.assign(2 * model.layers[0].kernel_scale)
    recorder = Recorder(record_scale)
    fit(model, QuantizationSchedule([(0, 4), (2, 8), (4, 4)], scale_interval=1), recorder)
    assert changes(recorder.seen) == [2, 4]
    ratio = recorder.seen[4] / recorder.seen[0]
    np.testing.assert_allclose(ratio, 0.5, rtol=1e-6)  # back at four bits, without the factor that was learned


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_frozen_scales_keep_the_value_of_the_freeze_step_while_kernels_move_on(scale):
    model = make_model(usm.QuantizationConfig(bits=4, scale=scale))
    scale_in_force = Recorder(lambda model: array(model.layers[0].quantized_kernel()[1]))
    kernel = Recorder(lambda model: array(model.layers[0].kernel))
    schedule = QuantizationSchedule([(0, 8), (3, 4)], scale_interval=1, freeze_step=7)
    fit(model, schedule, scale_in_force, kernel, epochs=2)
    assert changes(scale_in_force.seen) == [1, 2, 3, 4, 5, 6, 7]
    assert changes(kernel.seen) == list(range(1, 12))
    assert [float(array(layer.scale_frozen)) for layer in model.layers] == [1.0, 1.0]


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("epoch", "scale"), [(1, "mse"), (2, "learned"), (3, "mse"), (5, "absmax")])
def test_an_interrupted_and_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, epoch, scale):
    config = usm.QuantizationConfig(bits=2, scale=scale)
    options = {"stages": [(0, None), (4, 8), (6, 4), (8, 2)], "scale_interval": 5, "freeze_step": 12}
    # Three steps per epoch: epoch 1 begins inside the float stage, 2 with a new stage, 3 inside the last stage, 5 after
    # the freeze.
    whole = make_model(config)
    fit(whole, QuantizationSchedule(**options), epochs=6, batch_size=4)
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(config), backup, QuantizationSchedule(**options), Interrupt(epoch), epochs=6, batch_size=4)
    resumed = make_model(config)
    fit(resumed, QuantizationSchedule(**options), backup, epochs=6, batch_size=4)
    for ours, theirs in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_a_resumed_training_keeps_the_scale_that_was_frozen_before(tmp_path, scale):
    config = usm.QuantizationConfig(bits=4, scale=scale)
    options = {"stages": [(0, 4)], "scale_interval": 1, "freeze_step": 8}
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    frozen = Recorder(record_scale)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(config), backup, QuantizationSchedule(**options), frozen, Interrupt(2), epochs=3)
    resumed = make_model(config)
    fit(resumed, backup, QuantizationSchedule(**options), epochs=3)
    np.testing.assert_array_equal(record_scale(resumed), frozen.seen[9])
    assert int(array(resumed.optimizer.iterations)) == 18


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras executes single steps with torch")
def test_with_several_steps_per_execution_a_stage_begins_at_the_next_call():
    model, recorder = make_model("int4", steps_per_execution=2), Recorder(record_bits)
    fit(model, QuantizationSchedule([(0, 8), (3, 4)], freeze_step=9), recorder, epochs=2)
    assert recorder.seen == {0: (8, 8), 2: (8, 8), 4: (4, 4), 6: (4, 4), 8: (4, 4), 10: (4, 4)}
    assert float(array(model.layers[0].scale_frozen)) == 1.0


def test_a_schedule_that_joins_a_training_late_starts_in_the_stage_of_the_step_reached():
    model, recorder = make_model("int2"), Recorder(record_bits)
    fit(model)
    fit(model, QuantizationSchedule([(0, 8), (4, 4), (8, 2)]), recorder)
    assert recorder.seen == {step: (4, 4) if step < 8 else (2, 2) for step in range(6, 12)}


def test_an_unfinished_schedule_warns_and_a_finished_one_does_not():
    with pytest.warns(UserWarning, match=r"2 layers above .*quant_dense.* \(8 instead of 4\)"):
        fit(make_model("int4"), QuantizationSchedule([(0, 8), (1000, 4)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(make_model("int4"), QuantizationSchedule([(0, 8), (3, 2)]))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "pairs"),
        (8, "pairs"),
        ([8, 4], "pairs"),
        ([(0, 8, 1)], "pairs"),
        ([(5, 8)], "start at 0"),
        ([(0, 8), (0, 4)], "increasing"),
        ([(0, 8), (9, 4), (5, 2)], "increasing"),
        ([(0, 8), (2.5, 4)], "integers"),
        ([(0, 5)], "got 5"),
        ([(0, "int4")], "got 'int4'"),
        ([(0, True)], "got True"),
    ],
)
def test_stages_that_cannot_work_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        QuantizationSchedule(stages)


@pytest.mark.parametrize("options", [{"scale_interval": 0}, {"scale_interval": 1.5}, {"freeze_step": 9}])
def test_intervals_below_one_and_freezing_before_the_last_stage_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .* got {next(iter(options.values()))}"):
        QuantizationSchedule([(0, 8), (10, 4)], **options)


def test_a_model_without_quantized_layers_is_refused():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), usm.NMSparseDense(4, "2:4")])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no quantized layer"):
        fit(model, QuantizationSchedule([(0, 8)]))


def test_bits_cannot_change_under_a_scale_that_is_frozen_already():
    model = make_model("int4")
    model.layers[1].freeze_scale()
    with pytest.raises(ValueError, match="from 4 to 8 bits: its scale is frozen"):
        fit(model, QuantizationSchedule([(0, 8), (3, 4)]))


def test_a_codebook_of_four_bits_at_most_is_refused_in_a_stage_of_eight():
    with pytest.raises(ValueError, match="'midrise', of at most 4 bits, but a stage has 8. Use None"):
        fit(make_model("int1"), QuantizationSchedule([(0, 8), (3, 1)]))
    fit(make_model("int1"), QuantizationSchedule([(0, None), (1, 4), (3, 1)]))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_float_warm_up_is_finite_in_sixteen_bits(policy):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, usm.QuantDense(4, "int4", dtype=keras.DTypePolicy(policy))(inputs))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(8, 8)).astype("float32")
    exact = x @ ops.convert_to_numpy(model.layers[1].kernel)
    with pytest.warns(UserWarning, match="left 1 layers above"):
        history = model.fit(
            x, np.zeros((8, 4)), epochs=1, verbose=0, callbacks=[QuantizationSchedule([(0, None), (100, 4)])]
        )
    assert np.isfinite(history.history["loss"][0])
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(model(x), "float32")), exact, rtol=0.1, atol=0.1)
