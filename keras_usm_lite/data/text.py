"""The normal form of transcripts, for training and for scoring alike."""

import re
import unicodedata

# Left and right single quotation mark, reversed quotation mark, modifier letter apostrophe.
# Of the characters that only say how others are shown (soft hyphen, joiners, marks of direction), this one ends a word.
_ZERO_WIDTH_SPACE = "\u200b"
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc", "'"))


def normalize_text(text):
    """Reduces a text to what is spoken: lower-case words separated by single spaces.

    In this order: format characters (soft hyphens, joiners and the like) go, a zero-width space becomes a space;
    Unicode NFKC; lower case (and NFKC again, since lower-casing can undo it); typographic
    apostrophes become `'`; everything but letters, combining marks, decimal digits, `'` and `_` becomes a
    space; runs of spaces become one; spaces at the ends go. Normalising twice changes nothing more. Nothing
    applies it for you: texts of manifests are taken as they stand, and `SpeechTask.prepare` warns if it would change
    some.

    Args:
        text: Any string.

    Returns:
        The normalised string, possibly empty.

    Example:
    >>> normalize_text("  Don\u2019t PANIC \u2014 it\u2019s only 3 o'clock!")
    "don't panic it's only 3 o'clock"
    """
    text = text.replace(_ZERO_WIDTH_SPACE, " ")
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = unicodedata.normalize("NFKC", text).lower()
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    return re.sub(" +", " ", "".join(c if _is_kept(c) else " " for c in text)).strip(" ")


def _is_kept(character):
    category = unicodedata.category(character)
    return category[0] in "LM" or category == "Nd" or character in "'_"
