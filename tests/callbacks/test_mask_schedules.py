"""The arithmetic of mask schedules: which step, how dense, how faded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_usm_lite.callbacks.mask_schedules import Shots, TfmotSchedule, fade, structure_decay
from keras_usm_lite.sparsity_config import SparsityConfig


@pytest.mark.parametrize(
    ("pattern", "shots", "kept"),
    [("1:4", 3, [3, 2, 1]), ("2:4", 2, [3, 2]), ("2:4", 4, [3, 3, 3, 2]), ("1:8", 4, [7, 4, 2, 1]), ("1:4", 1, [1])],
)
def test_the_gradual_sequence_starts_below_dense_and_ends_at_the_pattern(pattern, shots, kept):
    schedule = Shots(num_shots=shots, interval=7, gradual=True)
    assert [schedule.kept(SparsityConfig.resolve(pattern), 7 * shot) for shot in range(shots)] == kept


@given(st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))))
def test_structure_decay_halves_what_is_kept_until_the_pattern(pattern):
    n, m = pattern
    kept = structure_decay(n, m)
    assert kept[0] == m - 1 and kept[-1] == n and kept == sorted(set(kept), reverse=True)
    assert all(after >= before // 2 for before, after in zip(kept, kept[1:], strict=False))


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 9), st.integers(0, 200))
def test_the_latest_shot_is_the_last_of_all_shots_that_have_come(start, shots, interval, step):
    due = [start + shot * interval for shot in range(shots) if start + shot * interval <= step]
    assert Shots(start, shots, interval).latest(step) == (due[-1] if due else None)


class Tfmot:
    def __init__(self, begin_step, end_step, frequency, zeros):
        self.begin_step, self.end_step, self.frequency, self.zeros = begin_step, end_step, frequency, zeros

    def __call__(self, step):
        return (step - self.begin_step) % self.frequency == 0, self.zeros


@given(st.integers(0, 50), st.integers(-1, 90), st.integers(1, 9), st.integers(0, 200))
def test_the_latest_tfmot_step_is_the_last_one_at_which_tfmot_would_prune(begin, end, frequency, step):
    end = end if end < 0 else max(begin, end)
    schedule = TfmotSchedule(Tfmot(begin, end, frequency, 0.5))
    due = [s for s in range(begin, step + 1) if (end < 0 or s <= end) and (s - begin) % frequency == 0]
    assert schedule.latest(step) == (due[-1] if due else None)


@pytest.mark.parametrize(
    ("zeros", "pattern", "kept"),
    [(0.0, "1:4", 4), (0.5, "1:4", 2), (0.6, "1:4", 2), (0.75, "1:4", 1), (0.9, "1:4", 1), (0.75, "2:4", 2)],
)
def test_tfmot_counts_zeros_and_a_group_is_never_pruned_more_than_asked(zeros, pattern, kept):
    assert TfmotSchedule(Tfmot(0, -1, 1, zeros)).kept(SparsityConfig.resolve(pattern), 0) == kept


@given(st.sampled_from(["linear", "exponential"]), st.integers(1, 100), st.integers(0, 200))
def test_a_fade_falls_from_one_to_zero_and_never_rises(kind, total, steps):
    assert fade(kind, 0, total) == 1.0 and fade(kind, total, total) == 0.0
    assert 0.0 <= fade(kind, steps + 1, total) <= fade(kind, steps, total) <= 1.0


def test_nothing_fades_without_a_decay():
    assert fade(None, 0, 10) == 0.0
