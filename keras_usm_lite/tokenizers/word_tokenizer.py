"""One label per word, for commands and other closed vocabularies."""

import keras

from keras_usm_lite.tokenizers.vocabulary_tokenizer import VocabularyTokenizer


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class WordTokenizer(VocabularyTokenizer):
    """Turns a text into one label per word; words are what white space separates.

    Args:
        vocabulary: the words in the order of their ids, from id 1 on.

    Raises:
        ValueError: if the vocabulary is empty, or an entry is repeated or is not one word.

    Example:
        >>> tokenizer = WordTokenizer.from_texts(["turn left", "turn right"])
        >>> tokenizer.vocabulary, tokenizer.vocab_size
        (('left', 'right', 'turn'), 4)
        >>> tokenizer.encode("turn left")
        [3, 1]
        >>> tokenizer.decode([3, 1, 0])
        'turn left'
    """

    unit = "word"
    separator = " "

    @staticmethod
    def split(text):
        """Splits a text into its words."""
        return text.split()
