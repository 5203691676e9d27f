"""Text and id checks: what passes, and what the refusals say."""

import numpy as np
import pytest

from keras_usm_lite.tokenizers.validation import checked_texts, labels_without_blanks


def test_a_generator_of_texts_is_read_once_into_a_list():
    assert checked_texts(text for text in ("a", "", "b")) == ["a", "", "b"]


@pytest.mark.parametrize(
    "texts, message",
    [
        ("yes", r"single string 'yes'. Use \['yes'\]"),
        (["yes", 3], r"texts\[1\].*3"),
        ([], "0 blank"),
        ([" ", ""], "2 blank"),
    ],
)
def test_a_string_a_number_and_nothing_are_refused_as_texts(texts, message):
    with pytest.raises(ValueError, match=message):
        checked_texts(texts)


def test_blanks_go_wherever_they_stand_and_labels_become_python_integers():
    labels = labels_without_blanks(np.array([0, 2, 0, 1, 0], dtype="int32"), vocab_size=3)
    assert labels == [2, 1]
    assert all(type(label) is int for label in labels)


@pytest.mark.parametrize("label", [-1, 3])
def test_an_id_out_of_range_is_named_with_the_range(label):
    with pytest.raises(ValueError, match=rf"Id {label} is outside 0\.\.2"):
        labels_without_blanks([1, label], vocab_size=3)
