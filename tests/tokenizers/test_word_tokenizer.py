"""Words to labels and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.tokenizers.word_tokenizer import WordTokenizer

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1)


@settings(deadline=None)
@given(st.lists(st.lists(WORDS, min_size=1).map(" ".join), min_size=1))
def test_single_spaced_texts_it_was_built_from_come_back_unchanged(texts):
    tokenizer = WordTokenizer.from_texts(texts)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, 0, 0]) == text
        assert len(ids) == len(text.split(" "))


def test_an_unknown_word_is_named_with_the_way_out():
    with pytest.raises(ValueError, match="word 'down' in 'turn down'.*Normalise.*from_texts"):
        WordTokenizer(["turn", "up"]).encode("turn down")


def test_a_vocabulary_entry_of_two_words_is_refused():
    with pytest.raises(ValueError, match="'turn up' is not one word"):
        WordTokenizer(["turn up"])
