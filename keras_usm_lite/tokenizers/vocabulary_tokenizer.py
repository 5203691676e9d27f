"""What the character and the word tokenizer share: a list of symbols, numbered from 1."""

from keras_usm_lite.tokenizers.validation import checked_texts, labels_without_blanks


class VocabularyTokenizer:
    """A tokenizer whose i-th symbol has the id i + 1; a subclass says how a text splits into symbols.

    A subclass sets `unit` (what a symbol is called in messages), `separator` (what stands between two symbols
    in a text) and `split(text) -> list[str]`.

    Args:
        vocabulary: the symbols in the order of their ids, each one once.

    Raises:
        ValueError: if the vocabulary is empty, or an entry is repeated or is not exactly one symbol.
    """

    unit = None
    separator = None

    def __init__(self, vocabulary):
        self.vocabulary = tuple(vocabulary)
        if not self.vocabulary:
            raise ValueError(f"The vocabulary is empty. Give at least one {self.unit}, or use from_texts.")
        self._ids = {}
        for symbol in self.vocabulary:
            if not isinstance(symbol, str) or self.split(symbol) != [symbol]:
                raise ValueError(f"Vocabulary entry {symbol!r} is not one {self.unit}. Split it or leave it out.")
            if symbol in self._ids:
                raise ValueError(f"Vocabulary entry {symbol!r} is there twice. Leave one of them out.")
            self._ids[symbol] = len(self._ids) + 1

    @staticmethod
    def split(text):
        """Splits a text into its symbols."""
        raise NotImplementedError

    @classmethod
    def from_texts(cls, texts):
        """Builds the tokenizer whose vocabulary is the sorted set of the symbols in `texts`.

        Args:
            texts: iterable of normalised texts.

        Returns:
            The tokenizer.

        Raises:
            ValueError: if `texts` is a single string or holds no text.
        """
        return cls(sorted({symbol for text in checked_texts(texts) for symbol in cls.split(text)}))

    @property
    def vocab_size(self):
        """Number of ids, blank included."""
        return len(self.vocabulary) + 1

    def encode(self, text):
        """Turns a text into ids.

        Args:
            text: normalised text of symbols in the vocabulary.

        Returns:
            `list[int]`, one id from 1 to `vocab_size - 1` per symbol.

        Raises:
            ValueError: if a symbol is not in the vocabulary.
        """
        try:
            return [self._ids[symbol] for symbol in self.split(text)]
        except KeyError as error:
            raise ValueError(
                f"The {self.unit} {error.args[0]!r} in {text!r} is not in the vocabulary of "
                f"{len(self.vocabulary)}. Normalise the text the way the vocabulary was, or build the "
                f"tokenizer with from_texts on texts that have this {self.unit}."
            ) from None

    def decode(self, ids):
        """Turns ids into a text, ignoring 0 (blank and padding).

        Args:
            ids: iterable of integers.

        Returns:
            The text.

        Raises:
            ValueError: if an id is outside `0..vocab_size - 1`.
        """
        return self.separator.join(self.vocabulary[i - 1] for i in labels_without_blanks(ids, self.vocab_size))

    def get_config(self):
        """Returns the JSON-serialisable arguments that rebuild this tokenizer."""
        return {"vocabulary": list(self.vocabulary)}

    @classmethod
    def from_config(cls, config):
        """Rebuilds a tokenizer from the result of `get_config`."""
        return cls(**config)
