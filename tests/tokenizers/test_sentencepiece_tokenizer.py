"""Sub-words to labels and back, trained on a few sentences."""

import io

import keras
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

TEXTS = [
    "turn the kitchen light on",
    "it's hot in the kitchen now",
    "call my mother",
    "play some music",
    "naïve ß ①",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return SentencePieceTokenizer.from_texts(TEXTS, vocab_size=30, model_type=request.param)


WORDS = st.text("".join(set("".join(TEXTS)) - {" "}), min_size=1)


@settings(deadline=None)
@given(words=st.lists(WORDS))
def test_any_single_spaced_text_of_known_characters_comes_back_unchanged(tokenizer, words):
    text = " ".join(words)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, 0, 0]) == text
    assert all(0 < i < tokenizer.vocab_size for i in ids)


def test_it_has_as_many_ids_as_asked_for(tokenizer):
    assert tokenizer.vocab_size == 30
    assert sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).get_piece_size() == 29


def test_frequent_words_are_cut_into_fewer_pieces_than_characters(tokenizer):
    assert len(tokenizer.encode("the kitchen")) < len("the kitchen")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_twice_gives_the_same_bytes(model_type):
    texts = [f"{TEXTS[i % 4]} {TEXTS[i * 7 % 3]}" for i in range(300)]
    first, second = (SentencePieceTokenizer.from_texts(texts, 30, model_type) for _ in range(2))
    assert first.model == second.model


def test_a_very_long_text_is_not_left_out_of_the_training():
    tokenizer = SentencePieceTokenizer.from_texts(["a b", "a z" * 3000], vocab_size=7)
    assert tokenizer.decode(tokenizer.encode("z b")) == "z b"


def test_a_model_trained_elsewhere_will_do():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=30, minloglevel=2
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    assert tokenizer.vocab_size == 31
    assert tokenizer.decode(tokenizer.encode("call the mother")) == "call the mother"


def test_keras_can_serialise_it(tokenizer):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(tokenizer))
    assert copy.model == tokenizer.model
    assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_an_unknown_character_is_named_with_the_way_out(tokenizer):
    with pytest.raises(ValueError, match="does not know 'Z' in 'turn Z on'.*Normalise.*from_texts"):
        tokenizer.encode("turn Z on")


def test_an_id_beyond_the_pieces_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"Id 30 is outside 0\.\.29"):
        tokenizer.decode([30])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vocab_size": 5000}, "vocab_size=5000.*too high"),
        ({"vocab_size": 3}, "vocab_size=3.*smaller"),
        ({"model_type": "wordpiece"}, "'unigram', 'bpe'.*got 'wordpiece'"),
    ],
)
def test_training_that_cannot_work_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer.from_texts(TEXTS, **arguments)


@pytest.mark.parametrize(
    "model, message", [("en.model", "'en.model'.*read_bytes"), (b"", "b''"), (b"no model", "8 bytes are not")]
)
def test_what_is_not_a_model_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer(model)
