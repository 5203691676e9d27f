"""NMPruning: masks at the right step, of the right weights, and the same after an interruption."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.callbacks import NMPruning

UNITS = 8
X = np.random.default_rng(0).normal(size=(16, UNITS)).astype("float32")  # eight batches of two
Y = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")


def array(tensor):
    return ops.convert_to_numpy(tensor)


class Recorder(keras.callbacks.Callback):
    """Writes down mask and kernel of every compressed layer before each step; in the list it follows NMPruning."""

    def __init__(self):
        super().__init__()
        self.masks, self.kernels, self.fades = [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        layers = usm.compressed_layers(self.model)
        self.masks.append([array(layer.mask) for layer in layers])
        self.kernels.append([array(layer.kernel) for layer in layers])
        self.fades.append([float(array(layer.mask_fade)) for layer in layers])

    def kept(self, layer=0):
        """Weights kept per group of four, before each step."""
        return [4 * float(np.mean(masks[layer])) for masks in self.masks]

    def changes(self):
        """The steps before which the mask of the first layer changed."""
        before = [np.ones_like(self.masks[0][0]), *(masks[0] for masks in self.masks)]
        return [step for step, masks in enumerate(self.masks) if np.any(masks[0] != before[step])]


def magnitude_mask(kernel, n, m=4):
    groups = np.abs(kernel).reshape(-1, m, kernel.shape[1])
    rank = np.argsort(np.argsort(-groups, axis=1), axis=1)
    return (rank < n).reshape(kernel.shape)


def network(sparsity="2:4"):
    keras.utils.set_random_seed(0)
    hidden = usm.QuantDense(UNITS, "int4", sparsity=sparsity, activation="tanh", name="hidden")
    return keras.Sequential([keras.Input((UNITS,)), hidden, keras.layers.Dense(3, name="out")])


def compiled(model, **options):
    model.compile(keras.optimizers.Adam(0.05), "mse", **options)
    return model


def trained(callback, model=None, epochs=1, **options):
    """Fit with the callback; return what was seen before each step."""
    recorder = Recorder()
    model = model or compiled(network())
    callbacks = [*options.pop("before", []), callback, recorder]
    model.fit(X, Y, batch_size=2, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **options)
    return recorder


def test_one_shot_prunes_before_the_first_step():
    seen = trained(NMPruning())
    assert seen.kept() == [2] * 8
    assert seen.changes() == [0]


@pytest.mark.parametrize("step", [3, 8, 11])
def test_the_model_is_dense_until_the_step_of_the_shot_and_the_mask_is_that_of_its_kernel(step):
    seen = trained(NMPruning(start_step=step), epochs=2, validation_data=(X, Y))
    assert seen.kept() == [4] * step + [2] * (16 - step)
    np.testing.assert_array_equal(seen.masks[step][0], magnitude_mask(seen.kernels[step][0], 2))
    assert np.any(seen.masks[step][0] != magnitude_mask(seen.kernels[0][0], 2))


def test_a_few_shots_follow_the_kernel_at_their_interval():
    model = compiled(network("1:4"))
    model.optimizer.learning_rate = 0.5  # so that the order of the kept weights changes
    model.layers[0].sparsity = usm.SparsityConfig(1, 4, gradient="ste")
    seen = trained(NMPruning(start_step=1, num_shots=3, interval=5), model, epochs=2)
    assert seen.kept() == [4] + [1] * 15
    assert seen.changes() == [1, 6, 11]
    for step in (1, 6, 11):
        np.testing.assert_array_equal(seen.masks[step][0], magnitude_mask(seen.kernels[step][0], 1))


def test_gradual_pruning_goes_through_the_milder_patterns():
    seen = trained(NMPruning(start_step=2, num_shots=3, interval=2, gradual=True), compiled(network("1:4")))
    assert seen.kept() == [4, 4, 3, 3, 2, 2, 1, 1]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch has no steps_per_execution")
def test_with_several_steps_per_execution_a_shot_comes_with_the_next_execution():
    seen = trained(NMPruning(start_step=2), compiled(network(), steps_per_execution=4), epochs=2)
    assert seen.kept() == [4, 2, 2, 2]  # before steps 0, 4, 8 and 12
    seen = trained(
        NMPruning(start_step=2, num_shots=3, interval=5, gradual=True),
        compiled(network("1:4"), steps_per_execution=4),
        epochs=2,
    )
    assert seen.kept() == [4, 3, 2, 1]


def test_accumulated_gradients_do_not_repeat_a_shot():
    model = network("1:4")
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "mse")
    seen = trained(NMPruning(num_shots=3, interval=3, gradual=True), model, epochs=2)
    assert seen.kept() == [3, 3, 3, 2, 2, 2] + [1] * 10


def test_layers_that_make_their_own_masks_begin_with_the_first_shot():
    keras.utils.set_random_seed(0)
    own = usm.QuantDense(UNITS, None, sparsity=usm.SparsityConfig(every_step=True), name="own")
    model = keras.Sequential([keras.Input((UNITS,)), own, usm.NMSparseDense(3, "1:4", name="ours")])
    seen = trained(NMPruning(start_step=4), compiled(model))
    assert seen.kept(layer=0) == [4] * 5 + [2] * 3  # seen before each step, in which the mask is made
    assert seen.kept(layer=1) == [4] * 4 + [1] * 4


def test_nested_and_subclassed_models_are_pruned():
    @keras.saving.register_keras_serializable("test_nm_pruning")
    class Wrapped(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.part = keras.Sequential([keras.layers.Dense(UNITS)])
            self.out = [keras.layers.Dense(3)]

        def call(self, x):
            return self.out[0](self.part(x))

        def get_config(self):
            return {"name": self.name}

    plain = Wrapped()
    plain(X)
    inputs = keras.Input((UNITS,))
    nested = keras.Model(inputs, network()(inputs))
    for model in (usm.compress(plain, {".": ("int4", "2:4")}), nested):
        seen = trained(NMPruning(start_step=1), compiled(model))
        for layer in range(len(seen.masks[0])):
            assert seen.kept(layer) == [4] + [2] * 7


@pytest.mark.parametrize(
    ("decay", "fades"), [("linear", [1, 0.75, 0.5, 0.25, 0, 0]), ("exponential", [*np.exp(-1.25 * np.arange(4)), 0, 0])]
)
def test_pruned_weights_fade_from_the_first_mask_on(decay, fades):
    model = compiled(network(usm.SparsityConfig(1, 4)))
    seen = trained(NMPruning(start_step=2, decay=decay, decay_steps=4), model)
    assert seen.kept() == [4, 4] + [1] * 6
    np.testing.assert_allclose([fade[0] for fade in seen.fades], [0, 0, *fades], rtol=1e-6)
    assert np.count_nonzero(array(model.layers[0].effective_kernel())) <= UNITS * UNITS / 4


def test_a_training_that_ends_before_the_weights_have_faded_warns():
    with pytest.warns(UserWarning, match="decay_steps=100 from step 0 on. The model is not sparse yet"):
        trained(NMPruning(decay="linear", decay_steps=100), compiled(network()))


@pytest.mark.parametrize("late", [{"start_step": 100}, {"num_shots": 3, "interval": 100, "gradual": True}])
def test_a_training_that_ends_before_the_last_mask_warns(late):
    with pytest.warns(UserWarning, match=r"masks denser than their N:M, such as that of '.*' \(1:4\). Train for more"):
        trained(NMPruning(**late), compiled(network(usm.SparsityConfig(1, 4))))


def test_every_step_masks_begin_where_the_second_moment_is_frozen_also_in_a_training_that_continues():
    model = compiled(network(usm.SparsityConfig(1, 4, gradient="sr_ste", every_step=True)))
    with pytest.warns(UserWarning, match="masks denser than their N:M"):
        seen = trained(NMPruning(start_step=8, freeze_step=10), model)
    assert seen.kept() == [4] * 8 and np.all(array(model.layers[0].mask) == 1)
    seen = trained(NMPruning(start_step=8, freeze_step=10), model)
    assert seen.kept() == [4] + [1] * 7 and seen.masks[2][0].tolist() == seen.masks[7][0].tolist()


def test_every_step_masks_stay_from_the_freeze_step_on():
    model = compiled(network(usm.SparsityConfig(1, 4, gradient="sr_ste", every_step=True)))
    model.optimizer.learning_rate = 0.5
    seen = trained(NMPruning(freeze_step=5), model, epochs=2)
    assert np.any(seen.masks[5][0] != seen.masks[4][0]) or np.any(seen.masks[4][0] != seen.masks[3][0])
    for masks in seen.masks[6:]:
        np.testing.assert_array_equal(masks[0], seen.masks[5][0])
    assert np.any(magnitude_mask(array(model.layers[0].kernel), 1) != seen.masks[5][0])  # it would have changed


class LinearPruning:
    """Duck of a tfmot schedule: from 0 zeros before step 2 to 75 % before step 8, every third step."""

    begin_step, end_step, frequency = 2, 8, 3

    def __call__(self, step):
        return True, 0.75 * (step - 2) / 6


def test_a_schedule_in_the_form_of_tfmot_is_followed():
    seen = trained(NMPruning(schedule=LinearPruning()), compiled(network("1:4")), epochs=2)
    assert seen.kept() == [4, 4, 4, 4, 4, 3, 3, 3] + [1] * 8
    seen = trained(NMPruning(schedule=LinearPruning()), compiled(network("2:4")), epochs=2)
    assert seen.kept()[-1] == 2  # never beyond the layer's own pattern


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_an_interrupted_fade_goes_on_where_it_was(epochs_before, tmp_path):
    def schedule():
        return NMPruning(start_step=3, decay="linear", decay_steps=16)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)

    whole = compiled(network())
    seen = trained(schedule(), whole, epochs=3)
    with pytest.warns(UserWarning, match="not sparse yet"):
        first = trained(schedule(), compiled(network()), epochs=epochs_before, before=[backup()])
    resumed = compiled(network())
    rest = trained(schedule(), resumed, epochs=3, before=[backup()])
    assert first.fades + rest.fades == seen.fades
    for new, old in zip(resumed.weights, whole.weights, strict=True):
        np.testing.assert_allclose(array(new), array(old), rtol=1e-5, atol=1e-6, err_msg=old.path)


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_an_interrupted_training_ends_with_the_same_masks_and_weights(epochs_before, tmp_path):
    def schedule():
        return NMPruning(start_step=3, num_shots=4, interval=5, gradual=True)  # steps 3, 8, 13, 18

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)

    whole = compiled(network("1:4"))
    seen = trained(schedule(), whole, epochs=3)
    assert seen.kept() == [4] * 3 + [3] * 5 + [3] * 5 + [2] * 5 + [1] * 6
    first = trained(schedule(), compiled(network("1:4")), epochs=epochs_before, before=[backup()])
    resumed = compiled(network("1:4"))
    for weight in resumed.trainable_variables:
        weight.assign(array(weight) + 1.0)  # everything must come from the backup
    rest = trained(schedule(), resumed, epochs=3, before=[backup()])
    for new, old in zip(first.masks + rest.masks, seen.masks, strict=True):
        np.testing.assert_array_equal(new[0], old[0])
    for new, old in zip(resumed.weights, whole.weights, strict=True):
        np.testing.assert_allclose(array(new), array(old), rtol=1e-5, atol=1e-6, err_msg=old.path)


def test_masks_that_are_made_are_not_made_again_when_training_goes_on():
    model = compiled(network())
    model.layers[0].sparsity = usm.SparsityConfig(2, 4, gradient="ste")
    model.optimizer.learning_rate = 0.5
    trained(NMPruning(), model)
    mask = array(model.layers[0].mask)
    seen = trained(NMPruning(), model)
    assert np.any(magnitude_mask(seen.kernels[0][0], 2) != mask)  # a shot now would be another mask
    np.testing.assert_array_equal(array(model.layers[0].mask), mask)


def test_a_shot_that_an_earlier_training_passed_by_comes_at_once():
    model = compiled(network())
    model.fit(X, Y, batch_size=2, verbose=0)  # dense, without the callback
    assert trained(NMPruning(start_step=3), model).kept() == [2] * 8


def test_a_model_without_sparse_layers_is_refused_before_training():
    for model in (
        keras.Sequential([keras.Input((UNITS,)), usm.QuantDense(3)]),
        keras.Sequential([keras.Input((UNITS,)), usm.QuantDense(3, sparsity=usm.SparsityConfig(every_step=True))]),
    ):
        compiled(model)
        before = array(model.layers[0].kernel)
        with pytest.raises(ValueError, match="no layer whose mask it could make.*sparsity='2:4'"):
            model.fit(X, Y, verbose=0, callbacks=[NMPruning()])
        np.testing.assert_array_equal(array(model.layers[0].kernel), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_step": -1}, "start_step must be an integer of at least 0, got -1"),
        ({"start_step": 2.5}, "start_step .* got 2.5"),
        ({"num_shots": 0}, "num_shots must be an integer of at least 1, got 0"),
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"interval": "10"}, "interval .* got '10'"),
        ({"decay": "cosine"}, "decay='cosine' is not known; choose one of"),
        ({"decay": "linear"}, "decay_steps must be an integer of at least 1, got 0"),
        ({"freeze_step": -1}, "freeze_step must be an integer of at least 0, got -1"),
        ({"start_step": 3, "freeze_step": 3}, "freeze_step=3 comes before any mask: the first is made at start_step=3"),
        ({"schedule": LinearPruning(), "num_shots": 2}, "schedule replaces start_step, num_shots"),
        ({"schedule": 0.5}, r"is not a tfmot pruning schedule: it lacks \['begin_step'"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        NMPruning(**arguments)


def test_averaged_weights_obey_the_masks_and_are_keras_average_of_the_kernels(tmp_path):
    model, shown, momentum = network(), Recorder(), 0.8
    model.compile(keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=momentum), "mse")
    model.fit(X, Y, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=[NMPruning(start_step=5), shown])
    hidden = model.get_layer("hidden")
    # what the optimizer averages: the latent kernels after each step, the first as it is
    steps = [kernels[0] for kernels in shown.kernels[1:]]
    average = steps[0]
    for kernel in steps[1:]:
        average = momentum * average + (1 - momentum) * kernel
    last = (array(hidden.kernel) - momentum * average) / (1 - momentum)  # not shown: nothing begins after it
    assert np.abs(last - steps[-1]).max() < 0.11, "one more step of Adam, at most 0.05 and its momentum"
    np.testing.assert_array_equal(array(hidden.mask), shown.masks[-1][0])
    codes, scale = (array(part) for part in hidden.quantized_kernel())
    kept = np.where(shown.masks[-1][0] == 1, array(hidden.kernel), 0)
    np.testing.assert_array_equal(codes, np.floor(kept / scale + 0.5))
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "averaged.usm"))
    served = array(loaded.get_layer("hidden").effective_kernel())
    np.testing.assert_array_equal(served, array(hidden.effective_kernel()))


def test_a_second_training_thaws_masks_that_the_first_one_froze():
    keras.utils.set_random_seed(0)
    own = usm.QuantDense(UNITS, None, sparsity=usm.SparsityConfig(every_step=True), name="own")
    model = keras.Sequential([keras.Input((UNITS,)), own, keras.layers.Dense(3)])
    trained(NMPruning(freeze_step=5), compiled(model))
    assert float(array(own.mask_frozen)) == 1.0
    frozen = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: frozen.append(synced(model, own)))
    compiled(model).fit(X, Y, batch_size=2, verbose=0, callbacks=[NMPruning(freeze_step=6), watch])
    assert frozen == [0.0] * 6 + [1.0] * 2


def synced(model, layer):
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    return float(array(layer.mask_frozen))


def test_what_an_interrupted_decay_has_left_is_pruned_by_a_training_without_decay():
    model = compiled(network())
    with pytest.warns(UserWarning, match="before pruned weights had faded"):
        model.fit(X, Y, batch_size=2, verbose=0, callbacks=[NMPruning(decay="linear", decay_steps=100)])
    assert float(array(model.layers[0].mask_fade)) > 0.9
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=[NMPruning()])
    assert np.mean(array(model.layers[0].effective_kernel()) != 0) <= 0.5


def test_update_masks_ends_a_decay():
    model = network()
    model.layers[0].mask_fade.assign(0.9)
    usm.update_masks(model)
    assert np.mean(array(model.layers[0].effective_kernel()) != 0) <= 0.5


@pytest.mark.parametrize("arguments", [{"decay_steps": 5}, {"gradual": True}])
def test_arguments_that_would_do_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NMPruning(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"start_step": 2, "num_shots": 3, "interval": 2, "gradual": True},
        {"start_step": 2, "decay": "linear", "decay_steps": 3},
        {"freeze_step": 6, "schedule": LinearPruning()},
    ],
)
def test_layers_that_make_their_own_masks_refuse_shots_and_decay(arguments):
    model = compiled(network(usm.SparsityConfig(every_step=True)))
    with pytest.raises(ValueError, match="All sparse layers have every_step=True"):
        trained(NMPruning(**arguments), model)


def test_a_freeze_step_without_every_step_masks_is_refused():
    with pytest.raises(ValueError, match="freeze_step=5 would do nothing"):
        trained(NMPruning(num_shots=3, interval=2, freeze_step=5), compiled(network()))


@pytest.mark.parametrize("quantization", ["int1", usm.QuantizationConfig(2, "midrise", scale="mse")])
def test_codes_without_a_zero_cannot_fade(quantization):
    hidden = usm.QuantDense(UNITS, quantization, sparsity="2:4")
    model = compiled(keras.Sequential([keras.Input((UNITS,)), hidden, keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="decay='linear' lets weights fade to zero, which codes of .* do not have"):
        trained(NMPruning(decay="linear", decay_steps=4), model)
