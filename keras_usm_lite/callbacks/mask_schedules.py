"""When masks are made, how dense they are, and how fast what they prune fades: the arithmetic of `NMPruning`."""

import dataclasses
import math

FADES = (None, "linear", "exponential")


def structure_decay(n, m):
    """Return the non-zeros per group on the way to n:m: `m - 1, m / 2, m / 4, ...`, as far as they exceed `n`, and `n`.

    Source: SdGf, arXiv 2209.07617, section 3.

    Example:

    >>> structure_decay(1, 4), structure_decay(2, 4), structure_decay(1, 8)
    ([3, 2, 1], [3, 2], [7, 4, 2, 1])
    """
    halves = dict.fromkeys([m - 1, *(m >> power for power in range(1, m.bit_length()))])
    return [*(kept for kept in halves if kept > n), n]


@dataclasses.dataclass(frozen=True)
class Shots:
    """`num_shots` masks, one every `interval` steps from `start_step` on.

    With `gradual`, early shots prune less: they go through `structure_decay(n, m)`, in slots of equal length.

    Example:

    >>> from keras_usm_lite import SparsityConfig
    >>> shots = Shots(start_step=10, num_shots=3, interval=5, gradual=True)
    >>> [shots.latest(step) for step in (9, 10, 14, 15, 99)]
    [None, 10, 10, 15, 20]
    >>> [shots.kept(SparsityConfig(n=1, m=4), step) for step in (10, 15, 20)]
    [3, 2, 1]
    """

    start_step: int = 0
    num_shots: int = 1
    interval: int = 1
    gradual: bool = False

    @property
    def first(self):
        """The step before which the first mask is made."""
        return self.start_step

    def latest(self, step):
        """The last step up to `step` before which a mask is made, or None."""
        if step < self.start_step:
            return None
        shot = min((step - self.start_step) // self.interval, self.num_shots - 1)
        return self.start_step + shot * self.interval

    def kept(self, sparsity, due):
        """Non-zeros per group of the mask made before step `due`."""
        if not self.gradual or self.num_shots == 1:
            return sparsity.n
        sequence, shot = structure_decay(sparsity.n, sparsity.m), (due - self.start_step) // self.interval
        return sequence[shot * (len(sequence) - 1) // (self.num_shots - 1)]


@dataclasses.dataclass(frozen=True)
class TfmotSchedule:
    """A pruning schedule of tensorflow-model-optimization, such as `PolynomialDecay` or `ConstantSparsity`.

    It is known by what it can do: attributes `begin_step`, `end_step` (-1: never) and `frequency`, and a call
    `schedule(step) -> (should_prune, sparsity)`. Its sparsity is the share of *zeros*; a group of `m` keeps
    `ceil(m (1 - sparsity))` weights, and never fewer than the layer's own `n`.

    Example:

    >>> class Constant:
    ...     begin_step, end_step, frequency = 10, 20, 5
    ...     def __call__(self, step):
    ...         return True, 0.25
    >>> from keras_usm_lite import SparsityConfig
    >>> schedule = TfmotSchedule(Constant())
    >>> [schedule.latest(step) for step in (9, 16, 99)], schedule.kept(SparsityConfig(n=2, m=4), 15)
    ([None, 15, 20], 3)
    """

    schedule: object

    def __post_init__(self):
        missing = [name for name in ("begin_step", "end_step", "frequency") if not hasattr(self.schedule, name)]
        if missing or not callable(self.schedule):
            raise ValueError(
                f"schedule={self.schedule!r} is not a tfmot pruning schedule: it lacks {missing or 'a call'}. Give one "
                "such as tfmot.sparsity.keras.PolynomialDecay, or leave it out and use num_shots, interval, gradual."
            )

    @property
    def first(self):
        """The step before which the first mask is made."""
        return int(self.schedule.begin_step)

    def latest(self, step):
        """The last step up to `step` before which a mask is made, or None."""
        begin, end = self.first, int(self.schedule.end_step)
        if step < begin:
            return None
        last = step if end < 0 else min(step, end)
        return begin + (last - begin) // int(self.schedule.frequency) * int(self.schedule.frequency)

    def kept(self, sparsity, due):
        """Non-zeros per group of the mask made before step `due`."""
        _, zeros = self.schedule(due)
        return max(sparsity.n, min(sparsity.m, math.ceil(sparsity.m * (1.0 - float(zeros)) - 1e-6)))


def fade(kind, steps, total):
    """Return beta, what is left of a pruned weight `steps` training steps after its mask was made.

    linear: `max(0, 1 - steps / total)`; exponential: `exp(-5 steps / total)`, and 0 from `total` on (where it would be
    under 1 %).

    Source: decaying masks, arXiv 2209.07617, section 3.

    Example:

    >>> [fade("linear", steps, 4) for steps in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    >>> round(fade("exponential", 2, 4), 4), fade("exponential", 4, 4)
    (0.0821, 0.0)
    """
    if kind is None or steps >= total:
        return 0.0
    return 1.0 - steps / total if kind == "linear" else math.exp(-5.0 * steps / total)
