"""Error rates against hand counts and a textbook edit distance."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.error_rates import ErrorRates, error_rates


def edit_distance(reference, hypothesis):
    row = np.arange(len(hypothesis) + 1)
    for i, symbol in enumerate(reference):
        previous, row = row, np.full(len(hypothesis) + 1, i + 1)
        for j, other in enumerate(hypothesis):
            row[j + 1] = min(previous[j] + (symbol != other), previous[j + 1] + 1, row[j] + 1)
    return int(row[-1])


TEXTS = st.lists(st.sampled_from(["a", "b", "ab", "ba"]), max_size=5).map(" ".join)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS), min_size=1, max_size=5))
def test_the_rates_are_total_edit_distance_over_total_length(pairs):
    rates = error_rates([reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs])
    word_errors = sum(edit_distance(reference.split(), hypothesis.split()) for reference, hypothesis in pairs)
    char_errors = sum(edit_distance(reference, hypothesis) for reference, hypothesis in pairs)
    words, characters = sum(len(r.split()) for r, _ in pairs), sum(len(r) for r, _ in pairs)
    assert rates.substitutions + rates.deletions + rates.insertions == word_errors
    assert (rates.words, rates.characters, rates.utterances) == (words, characters, len(pairs))
    assert rates.char_errors == char_errors
    assert rates.wer == pytest.approx(word_errors / words)
    assert rates.cer == pytest.approx(char_errors / characters)


def test_the_kinds_of_errors_are_told_apart():
    rates = error_rates(["turn the light on", "stop", "go"], ["turn light off", "stop it now", "go"])
    assert (rates.substitutions, rates.deletions, rates.insertions) == (1, 1, 2)


def test_an_empty_hypothesis_counts_every_word_as_deleted():
    assert error_rates(["one two", "three"], ["", "three"]) == ErrorRates(2 / 3, 7 / 12, 0, 2, 0, 3, 7, 12, 2)


def test_white_space_does_not_count():
    assert error_rates(["one  two\n"], [" one\ttwo"]).char_errors == 0


def test_it_prints_as_one_line():
    rates = ErrorRates(0.0742, 0.031, 123, 40, 15, 2400, 321, 10355, 592)
    assert str(rates) == (
        "WER 7.42 % (123 sub 40 del 15 ins / 2400 words), CER 3.10 % (321 errors / 10355 characters), 592 utterances"
    )


def test_it_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        error_rates(["a"], ["a"]).wer = 0.5


@pytest.mark.parametrize(
    "references, hypotheses, message",
    [
        ([], [], "no references"),
        (["a", " "], ["a", "b"], r"1 of 2 references are empty, the first is references\[1\]"),
        (["a", "b"], ["a"], "2 references but 1 hypotheses"),
        ("stop", "shop", "letter by letter; give lists of texts"),
        (["stop"], "shop", "letter by letter; give lists of texts"),
    ],
)
def test_what_has_no_error_rate_is_refused(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        error_rates(references, hypotheses)
