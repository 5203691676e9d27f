"""`Slowed` and `slow_down`: lower the learning rate of an optimizer, whether it follows a schedule or not."""

import keras
from keras.optimizers.schedules import LearningRateSchedule


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class Slowed(LearningRateSchedule):
    """Another schedule times a factor: `factor * schedule(step)`.

    Args:
        schedule: a Keras learning rate schedule.
        factor: what its rates are multiplied by.

    Example:

    >>> decay = keras.optimizers.schedules.CosineDecay(0.5, 100)
    >>> float(Slowed(decay, 0.5)(0))
    0.25
    """

    def __init__(self, schedule, factor):
        self.schedule = schedule
        self.factor = factor

    def __call__(self, step):
        """Return the rate of an update."""
        return self.factor * self.schedule(step)

    def get_config(self):
        """Return the constructor's arguments."""
        return {"schedule": keras.optimizers.schedules.serialize(self.schedule), "factor": self.factor}

    @classmethod
    def from_config(cls, config):
        """Rebuild the schedule inside."""
        return cls(keras.optimizers.schedules.deserialize(config["schedule"]), config["factor"])


def slow_down(model, factor):
    """Multiply the learning rate of a compiled model, or its whole schedule, by a factor.

    A rate that is a variable is assigned. A schedule is replaced by a `Slowed` one, and since a compiled training step
    has the old schedule in it, the next step is compiled anew.

    Args:
        model: a compiled model.
        factor: what the rate is multiplied by.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.5), "mse")
    >>> slow_down(model, 0.5)
    >>> float(model.optimizer.learning_rate)
    0.25
    """
    optimizer = _inner(model)
    if isinstance(optimizer._learning_rate, LearningRateSchedule):
        set_schedule_factor(model, schedule_factor(model) * factor)
    else:
        optimizer.learning_rate = factor * float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def schedule_factor(model):
    """Return by how much the schedule of a model was slowed down; 1 if it was not, or if there is none.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.5, 100)), "mse")
    >>> slow_down(model, 0.5)
    >>> slow_down(model, 0.5)
    >>> schedule_factor(model), float(model.optimizer.learning_rate)
    (0.25, 0.125)
    """
    schedule = _inner(model)._learning_rate
    return schedule.factor if isinstance(schedule, Slowed) else 1.0


def set_schedule_factor(model, factor):
    """Slow the schedule of a model down by a factor counted from the original schedule; see `slow_down`.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.5, 100)), "mse")
    >>> set_schedule_factor(model, 0.5)
    >>> set_schedule_factor(model, 0.5)
    >>> float(model.optimizer.learning_rate)
    0.25
    """
    if factor != schedule_factor(model):
        optimizer = _inner(model)
        schedule = optimizer._learning_rate
        optimizer.learning_rate = Slowed(schedule.schedule if isinstance(schedule, Slowed) else schedule, factor)
        model.make_train_function(force=True)


def _inner(model):
    """The optimizer inside loss scaling, or the optimizer."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)
