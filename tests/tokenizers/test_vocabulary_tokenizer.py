"""What the character and the word tokenizer have in common."""

import keras
import pytest

from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
from keras_usm_lite.tokenizers.word_tokenizer import WordTokenizer

TOKENIZERS = pytest.mark.parametrize("cls", [CharTokenizer, WordTokenizer])


@TOKENIZERS
def test_ids_count_from_one_in_sorted_order_whatever_the_order_of_the_texts(cls):
    tokenizer = cls.from_texts(["c a", "b"])
    assert list(tokenizer.vocabulary) == sorted(tokenizer.vocabulary)
    assert cls.from_texts(["b", "a c"]).vocabulary == tokenizer.vocabulary
    assert [tokenizer.encode(symbol) for symbol in tokenizer.vocabulary if symbol.strip()][-1] == [
        tokenizer.vocab_size - 1
    ]


@TOKENIZERS
def test_a_given_vocabulary_keeps_its_order(cls):
    tokenizer = cls(["z", "a"])
    assert (tokenizer.encode("z"), tokenizer.encode("a"), tokenizer.vocab_size) == ([1], [2], 3)


@TOKENIZERS
def test_nothing_encodes_to_nothing_and_blanks_decode_to_nothing(cls):
    tokenizer = cls(["a"])
    assert tokenizer.encode("") == []
    assert tokenizer.decode([0, 0]) == ""


@TOKENIZERS
def test_keras_can_serialise_it(cls):
    tokenizer = cls(["é", "a"])
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(tokenizer))
    assert type(copy) is cls
    assert copy.vocabulary == tokenizer.vocabulary


@TOKENIZERS
@pytest.mark.parametrize(
    "vocabulary, message",
    [
        ([], "empty"),
        (["a", "b", "a"], "'a' is there twice"),
        (["a", ""], "'' is not one"),
        ([1], "1 is not one"),
    ],
)
def test_a_bad_vocabulary_is_refused_with_the_entry_at_fault(cls, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        cls(vocabulary)
