"""One label per character, the usual choice for small data."""

import keras

from keras_usm_lite.tokenizers.vocabulary_tokenizer import VocabularyTokenizer


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class CharTokenizer(VocabularyTokenizer):
    """Turns a text into one label per character (Unicode code point), spaces included.

    Args:
        vocabulary: the characters in the order of their ids, from id 1 on; a string will do.

    Raises:
        ValueError: if the vocabulary is empty, or an entry is repeated or is not one character.

    Example:
        >>> tokenizer = CharTokenizer.from_texts(["cab", "a b"])
        >>> tokenizer.vocabulary, tokenizer.vocab_size
        ((' ', 'a', 'b', 'c'), 5)
        >>> tokenizer.encode("a cab")
        [2, 1, 4, 2, 3]
        >>> tokenizer.decode([2, 1, 4, 2, 3, 0, 0])
        'a cab'
    """

    unit = "character"
    separator = ""

    @staticmethod
    def split(text):
        """Splits a text into its characters."""
        return list(text)
