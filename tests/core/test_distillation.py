"""Divergence and distance against closed forms in float64 numpy."""

import numpy as np
import pytest
from keras import ops

from keras_usm_lite.core.distillation import hidden_mse, posterior_kl

DRAW = np.random.default_rng(0)
TEACHER, STUDENT = 3 * DRAW.normal(size=(2, 2, 5, 4))  # [batch 2, frames 5, tokens 4]
WEIGHTS = np.array([[1, 1, 1, 0, 0], [2, 1, 0, 0, 0.5]])


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def divergences(teacher, student):
    p, q = softmax(teacher), softmax(student)
    return (p * np.log(p / q)).sum(axis=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_the_mean_divergence_of_the_softened_posteriors(temperature):
    expected = temperature**2 * divergences(TEACHER / temperature, STUDENT / temperature)
    assert float(posterior_kl(TEACHER, STUDENT, temperature)) == pytest.approx(expected.mean(), rel=1e-4)
    weighted = posterior_kl(TEACHER, STUDENT, temperature, WEIGHTS)
    assert float(weighted) == pytest.approx((WEIGHTS * expected).sum() / WEIGHTS.sum(), rel=1e-4)


def test_a_hot_softmax_compares_the_logits_themselves():
    centred = [logits - logits.mean(axis=-1, keepdims=True) for logits in (TEACHER, STUDENT)]
    expected = 0.5 * np.square(centred[0] - centred[1]).mean()
    assert float(posterior_kl(TEACHER, STUDENT, temperature=300.0)) == pytest.approx(expected, rel=0.05)


def test_kl_of_equal_logits_is_zero_and_does_not_see_a_constant():
    assert float(posterior_kl(TEACHER, TEACHER)) == 0.0
    assert float(posterior_kl(TEACHER, TEACHER + 5.0)) == pytest.approx(0.0, abs=1e-6)


def test_frames_on_which_both_are_certain_of_the_blank_add_nothing():
    blank = np.broadcast_to([0.0, -1e4, -1e4, -1e4], (2, 3, 4))
    padded = [np.concatenate([logits, blank], axis=1) for logits in (TEACHER, STUDENT)]
    diluted = float(posterior_kl(*padded))
    assert diluted == pytest.approx(divergences(TEACHER, STUDENT).sum() / 16, rel=1e-4)  # of 2 x 8 frames
    real = np.repeat([[1] * 5 + [0] * 3], 2, axis=0)
    assert float(posterior_kl(*padded, weights=real)) == pytest.approx(float(posterior_kl(TEACHER, STUDENT)), rel=1e-5)


def test_without_a_real_frame_both_are_zero():
    nothing = np.zeros((2, 5))
    assert float(posterior_kl(TEACHER, STUDENT, weights=nothing)) == 0.0
    assert float(hidden_mse(TEACHER, STUDENT, nothing)) == 0.0


def test_half_precision_logits_are_compared_in_float32():
    teacher, student = (ops.cast(logits, "bfloat16") for logits in (TEACHER, STUDENT))
    rounded = [ops.convert_to_numpy(ops.cast(logits, "float32")).astype("float64") for logits in (teacher, student)]
    assert float(posterior_kl(teacher, student)) == pytest.approx(divergences(*rounded).mean(), rel=1e-4)


def test_different_numbers_of_tokens_are_refused():
    with pytest.raises(ValueError, match="teacher scores 4 tokens and the student 3"):
        posterior_kl(TEACHER, STUDENT[..., :3])


def test_hidden_distance_is_relative_to_the_teacher():
    expected = np.square(STUDENT - TEACHER).mean() / np.square(TEACHER).mean()
    assert float(hidden_mse(TEACHER, STUDENT)) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_mse(7 * TEACHER, 7 * STUDENT)) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_mse(TEACHER, np.zeros_like(STUDENT))) == 1.0
    assert float(hidden_mse(TEACHER, TEACHER)) == 0.0


def test_hidden_states_without_weight_are_not_compared():
    weighted = [(WEIGHTS[..., None] * np.square(x)).sum() for x in (STUDENT - TEACHER, TEACHER)]
    assert float(hidden_mse(TEACHER, STUDENT, WEIGHTS)) == pytest.approx(weighted[0] / weighted[1], rel=1e-5)
    elsewhere = np.where(WEIGHTS[..., None] == 0, 99.0, STUDENT)
    assert float(hidden_mse(TEACHER, elsewhere, WEIGHTS)) == pytest.approx(weighted[0] / weighted[1], rel=1e-5)
