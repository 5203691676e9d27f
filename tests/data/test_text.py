"""The normalisation keeps what is spoken, drops the rest, and is stable."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.data.text import normalize_text


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Mister QUILTER,  is the\tapostle\n", "mister quilter is the apostle"),
        ("don\u2019t don\u2018t don\u201bt don\u02bct don\uff07t", "don't don't don't don't don't"),
        ("zoom_in", "zoom_in"),
        ("twenty-one \u2013 21\u00b2", "twenty one 212"),
        ("\uff26\uff55\uff4c\uff4c \ufb01ne", "full fine"),
        ("Cafe\u0301 \u00c4RGER Stra\u00dfe", "caf\u00e9 \u00e4rger stra\u00dfe"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947\u0964", "\u0928\u092e\u0938\u094d\u0924\u0947"),
        ("\u041c\u043e\u0441\u043a\u0432\u0430!", "\u043c\u043e\u0441\u043a\u0432\u0430"),
        ("a\u00a0b\u3000c", "a b c"),
        ("\u0dc1\u0dca\u200d\u0dbb\u0dd3", "\u0dc1\u0dca\u0dbb\u0dd3"),  # one Sinhala word with a joiner
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645"),  # Persian
        ("\ufeffco\u00adop\u2060erate", "cooperate"),
        ("e\u200d\u0301", "\u00e9"),
        ("a\u200bb", "a b"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_examples_are_normalised_as_documented(text, normal):
    assert normalize_text(text) == normal


def test_every_single_character_is_stable_between_two_letters():
    for code in [*range(0xD800), *range(0xE000, 0x20000)]:
        once = normalize_text(f"a{chr(code)}b")
        assert normalize_text(once) == once, hex(code)


@settings(max_examples=500)
@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalize_text(text)
    assert normalize_text(once) == once


@given(st.text())
def test_only_the_documented_characters_remain(text):
    words = normalize_text(text).split(" ")
    for character in "".join(words):
        category = unicodedata.category(character)
        assert category[0] in "LM" or category == "Nd" or character in "'_"
    assert words == [""] or "" not in words
