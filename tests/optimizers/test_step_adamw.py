"""StepAdamW: AdamW to the digit until it freezes, the formula of its docstring afterwards."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.callbacks import NMPruning
from keras_usm_lite.optimizers import StepAdamW

UNITS = 8
X = np.random.default_rng(0).normal(size=(16, UNITS)).astype("float32")  # eight batches of two
Y = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")
OPTIONS = {
    "defaults": {},
    "no decay": {"weight_decay": 0.0},
    "betas": {"beta_1": 0.7, "beta_2": 0.95, "epsilon": 1e-3},
    "clipnorm": {"clipnorm": 0.1},
    "global clipnorm": {"global_clipnorm": 0.1},
    "average": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss scale": {"loss_scale_factor": 128.0},
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def network(sparsity=None):
    keras.utils.set_random_seed(0)
    hidden = usm.QuantDense(UNITS, None, sparsity=sparsity, activation="tanh", name="hidden")
    return keras.Sequential([keras.Input((UNITS,)), hidden, keras.layers.Dense(3, name="out")])


def fitted(optimizer, model=None, epochs=1, callbacks=()):
    model = model or network()
    if optimizer is not None:
        # XLA on a CPU takes seconds to compile each model.
        model.compile(optimizer, "mse", jit_compile=False if keras.backend.backend() == "tensorflow" else "auto")
    model.fit(X, Y, batch_size=2, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def applied(optimizer, steps):
    """Apply random gradients, larger ones in later steps, to two variables; return their values."""
    draw = np.random.default_rng(0)
    variables = [
        keras.Variable(draw.normal(size=shape), dtype="float32", name=name)
        for name, shape in (("kernel", (4, 2)), ("bias", (2,)))
    ]
    for step in range(steps):
        gradients = [(step + 1) * draw.normal(size=variable.shape) for variable in variables]
        optimizer.apply([ops.convert_to_tensor(gradient, "float32") for gradient in gradients], variables)
    return [array(variable) for variable in variables]


def same(arrays, others, rtol=1e-6, atol=1e-6):
    for one, other in zip(arrays, others, strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_adamw_until_it_freezes(name):
    updates = 8 // OPTIONS[name].get("gradient_accumulation_steps", 1)
    weights = applied(StepAdamW(0.05, freeze_step=updates, **OPTIONS[name]), steps=8)
    same(weights, applied(keras.optimizers.AdamW(0.05, **OPTIONS[name]), steps=8))
    early = applied(StepAdamW(0.05, freeze_step=updates // 2, **OPTIONS[name]), steps=8)
    assert np.max(np.abs(early[0] - weights[0])) > 1e-4


def test_it_is_adamw_inside_the_compiled_step_with_schedule_and_exclusions_from_decay():
    models = []
    for optimizer_class in (StepAdamW, keras.optimizers.AdamW):
        optimizer = optimizer_class(keras.optimizers.schedules.PolynomialDecay(0.1, 8), weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        models.append(fitted(optimizer))
    same(models[0].trainable_variables, models[1].trainable_variables)


def test_variables_excluded_from_decay_have_none():
    free, excluded = StepAdamW(0.05, weight_decay=0.5), StepAdamW(0.05, weight_decay=0.5)
    excluded.exclude_from_weight_decay(var_names=["bias"])
    (kernel, bias), (same_kernel, other_bias) = applied(free, 4), applied(excluded, 4)
    np.testing.assert_array_equal(kernel, same_kernel)
    np.testing.assert_array_equal(other_bias, applied(StepAdamW(0.05, weight_decay=0.0), 4)[1])
    assert np.min(np.abs(bias - other_bias)) > 1e-3


@pytest.mark.parametrize("freeze_step", [1, 3])
def test_after_freezing_it_follows_its_formula(freeze_step):
    rate, decay, beta_1, beta_2, epsilon = 0.1, 0.2, 0.8, 0.9, 1e-3
    draw = np.random.default_rng(0)
    weight = keras.Variable(draw.normal(size=(4, 2)).astype("float32"))
    optimizer = StepAdamW(rate, freeze_step, decay, beta_1, beta_2, epsilon)
    w, m, v = array(weight).astype("float64"), 0.0, 0.0
    for t in range(1, 8):
        g = draw.normal(size=(4, 2)).astype("float32") * t
        optimizer.apply([ops.convert_to_tensor(g)], [weight])
        m = beta_1 * m + (1 - beta_1) * g
        if t <= freeze_step:
            v = beta_2 * v + (1 - beta_2) * g**2
        debiased_v = v / (1 - beta_2 ** min(t, freeze_step))
        epsilon_hat = epsilon / np.sqrt(1 - beta_2 ** min(t, freeze_step))  # Keras adds epsilon before the correction
        w = w - rate * decay * w
        w = w - rate * m / (1 - beta_1**t) / (np.sqrt(debiased_v) + epsilon_hat)
        np.testing.assert_allclose(array(weight), w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(array(optimizer.second_moments[0]), v, rtol=1e-5)


def test_frozen_moment_survives_gradients_that_are_not_finite():
    weight = keras.Variable([1.0])
    optimizer = StepAdamW(0.1, freeze_step=1)
    optimizer.apply([ops.convert_to_tensor([2.0])], [weight])
    optimizer.apply([ops.convert_to_tensor([float("inf")])], [weight])
    assert float(optimizer.second_moments[0][0]) == pytest.approx(0.004)


@pytest.mark.parametrize("accumulation", [None, 2])
def test_updates_are_counted_not_batches(accumulation):
    whole, half = (
        StepAdamW(0.05, 4 // (accumulation or 1), gradient_accumulation_steps=accumulation) for _ in range(2)
    )
    applied(whole, 8)
    applied(half, 4)
    same(whole.second_moments, half.second_moments)
    longer = StepAdamW(0.05, 8, gradient_accumulation_steps=accumulation)
    applied(longer, 8)
    assert np.max(array(longer.second_moments[0])) > 1.5 * np.max(array(half.second_moments[0]))


def test_mask_learning_leaves_the_dense_second_moment_alone():
    dense = fitted(StepAdamW(0.05, freeze_step=8))
    sparse = network(usm.SparsityConfig(2, 4, gradient="ste"))
    fitted(StepAdamW(0.05, freeze_step=8), sparse, epochs=2, callbacks=[NMPruning(start_step=8)])
    assert float(np.mean(array(sparse.layers[0].mask))) == 0.5
    same(sparse.optimizer.second_moments, dense.optimizer.second_moments, atol=0)


def test_a_training_that_was_saved_and_loaded_continues_as_if_it_had_not(tmp_path):
    path = str(tmp_path / "model.keras")
    interrupted = fitted(StepAdamW(0.05, freeze_step=12, clipnorm=1.0))  # freezes after the interruption
    interrupted.save(path)
    resumed = keras.models.load_model(path)
    assert isinstance(resumed.optimizer, StepAdamW)
    assert resumed.optimizer.get_config() == interrupted.optimizer.get_config()
    uninterrupted = fitted(StepAdamW(0.05, freeze_step=12, clipnorm=1.0), epochs=2)
    same(fitted(None, resumed).trainable_variables, uninterrupted.trainable_variables)


def test_it_works_inside_a_loss_scale_optimizer():
    model = fitted(keras.optimizers.LossScaleOptimizer(StepAdamW(0.05, freeze_step=8)), epochs=2)
    plain = fitted(StepAdamW(0.05, freeze_step=8), epochs=2)
    same(model.trainable_variables, plain.trainable_variables, rtol=1e-4, atol=1e-5)


def test_values_that_cannot_work_are_refused():
    for value in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=f"freeze_step must be an integer of at least 1, got {value}"):
            StepAdamW(0.1, freeze_step=value)
    with pytest.raises(ValueError, match="weight_decay must be a number, got None"):
        StepAdamW(0.1, freeze_step=1, weight_decay=None)
