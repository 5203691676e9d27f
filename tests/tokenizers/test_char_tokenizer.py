"""Characters to labels and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1).filter(lambda texts: any(text.strip() for text in texts)))
def test_texts_it_was_built_from_come_back_unchanged(texts):
    tokenizer = CharTokenizer.from_texts(texts)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, 0, 0]) == text
        assert len(ids) == len(text)
        assert all(0 < i < tokenizer.vocab_size for i in ids)


def test_an_unknown_character_is_named_with_the_way_out():
    with pytest.raises(ValueError, match="character 'ñ' in 'se ñor'.*Normalise.*from_texts"):
        CharTokenizer("esor ").encode("se ñor")


def test_a_vocabulary_entry_of_two_characters_is_refused():
    with pytest.raises(ValueError, match="'ab' is not one character"):
        CharTokenizer(["ab"])
