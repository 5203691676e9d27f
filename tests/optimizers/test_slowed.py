"""slow_down: the very next step is smaller, with and without a schedule, compiled or not, and it can be saved."""

import keras
import numpy as np
import pytest

from keras_usm_lite.optimizers.slowed import Slowed, schedule_factor, set_schedule_factor, slow_down

RATES = {
    "number": lambda: 0.5,
    "schedule": lambda: keras.optimizers.schedules.PiecewiseConstantDecay([100], [0.5, 0.1]),
}


def linear(rate, scaled=False):
    """A weight whose gradient is always 1: it falls by the learning rate."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    optimizer = keras.optimizers.SGD(RATES[rate]())
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
    model.compile(optimizer, loss=lambda y, prediction: keras.ops.mean(prediction, axis=-1))
    return model


def fall_of_a_step(model):
    before = float(keras.ops.convert_to_numpy(model.layers[0].kernel)[0, 0])
    model.fit(np.ones((4, 1)), np.ones((4, 1)), batch_size=4, verbose=0)
    return before - float(keras.ops.convert_to_numpy(model.layers[0].kernel)[0, 0])


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_next_step_is_smaller_by_the_factor_also_after_a_first_one_was_compiled(rate, scaled):
    model = linear(rate, scaled)
    assert fall_of_a_step(model) == pytest.approx(0.5, abs=1e-6)
    slow_down(model, 0.5)
    assert fall_of_a_step(model) == pytest.approx(0.25, abs=1e-6)
    slow_down(model, 0.2)
    assert fall_of_a_step(model) == pytest.approx(0.05, abs=1e-6)


def test_the_factor_counts_from_the_original_schedule():
    model = linear("schedule")
    set_schedule_factor(model, 0.5)
    set_schedule_factor(model, 0.25)
    assert schedule_factor(model) == 0.25 and float(model.optimizer.learning_rate) == 0.125
    assert schedule_factor(linear("number")) == 1.0


def test_a_slowed_schedule_follows_its_schedule_and_is_saved_with_the_optimizer():
    decay = keras.optimizers.schedules.CosineDecay(0.5, 10)
    optimizer = keras.optimizers.SGD(Slowed(decay, 0.5))
    restored = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    for step in (0, 3, 10):
        assert float(restored._learning_rate(step)) == pytest.approx(0.5 * float(decay(step)))


@keras.saving.register_keras_serializable("test_slowed")
class Warm(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of a user's own, which holds another one as `Slowed` does."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, step):
        return 0.1 * self.schedule(step)


def test_a_schedule_that_holds_another_is_slowed_as_a_whole():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(Warm(keras.optimizers.schedules.CosineDecay(1.0, 100))), "mse")
    slow_down(model, 0.5)
    slow_down(model, 0.5)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.025)
