"""Tokenizer files: round trip, one step, and what is refused."""

import json

import pytest

from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
from keras_usm_lite.tokenizers.io import load_tokenizer, save_tokenizer
from keras_usm_lite.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from keras_usm_lite.tokenizers.word_tokenizer import WordTokenizer

TEXTS = ["ein größeres haus", "日本 語"]


@pytest.mark.parametrize(
    "cls, options", [(CharTokenizer, {}), (WordTokenizer, {}), (SentencePieceTokenizer, {"vocab_size": 17})]
)
def test_a_loaded_tokenizer_is_the_saved_one(cls, options, tmp_path):
    tokenizer = cls.from_texts(TEXTS, **options)
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    loaded = load_tokenizer(path)
    assert type(loaded) is cls
    assert loaded.get_config() == tokenizer.get_config()
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_the_file_says_what_it_is(tmp_path):
    save_tokenizer(CharTokenizer("ñ"), tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert content["format"] == "keras_usm_lite tokenizer"
    assert content["class"] == "keras_usm_lite>CharTokenizer"
    assert content["config"] == {"vocabulary": ["ñ"]}


def test_saving_again_replaces_the_file_and_leaves_nothing_else(tmp_path):
    for vocabulary in ("a", "b"):
        save_tokenizer(CharTokenizer(vocabulary), tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").vocabulary == ("b",)
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_failed_save_leaves_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "t.json"
    save_tokenizer(CharTokenizer("a"), path)
    with pytest.raises(UnicodeEncodeError):
        save_tokenizer(CharTokenizer("\ud800"), path)  # half a surrogate pair has no UTF-8
    assert load_tokenizer(path).vocabulary == ("a",)
    assert list(tmp_path.iterdir()) == [path]


def test_a_class_that_is_not_registered_is_refused_before_anything_is_written(tmp_path):
    class Unregistered(CharTokenizer):
        pass

    with pytest.raises(ValueError, match="Unregistered is not registered.*register_keras_serializable"):
        save_tokenizer(Unregistered("a"), tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, message",
    [
        ("no json", "is not JSON"),
        ("[]", "is not a tokenizer file"),
        ('{"vocabulary": ["a"]}', "is not a tokenizer file"),
        ('{"format": "keras_usm_lite tokenizer", "version": 9}', "version 9, this library reads version 1"),
        (
            '{"format": "keras_usm_lite tokenizer", "version": 1, "class": "my>Own", "config": {}}',
            "'my>Own'.*Import",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_with_its_path(content, message, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"t\.json.*{message}"):
        load_tokenizer(path)


def test_a_missing_file_is_reported_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        load_tokenizer(tmp_path / "nowhere.json")
