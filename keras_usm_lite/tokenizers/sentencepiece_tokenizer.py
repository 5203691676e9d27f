"""Sub-word labels learned from text with the sentencepiece package."""

import base64
import io

import keras

from keras_usm_lite.tokenizers.validation import checked_texts, labels_without_blanks

_MODEL_TYPES = ("unigram", "bpe")


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class SentencePieceTokenizer:
    """Turns a text into SentencePiece sub-words; piece `i` of the model has the id `i + 1`.

    Any trained model will do: `SentencePieceTokenizer(pathlib.Path("my.model").read_bytes())`. The "unknown"
    piece that every SentencePiece model has keeps an id, but `encode` never produces it.

    Source: T. Kudo and J. Richardson, "SentencePiece: A simple and language independent subword tokenizer and
    detokenizer for Neural Text Processing", EMNLP 2018 (demonstrations).

    Args:
        model: the bytes of a SentencePiece model file.

    Raises:
        ValueError: if `model` is not the content of a SentencePiece model.

    Example:
        >>> tokenizer = SentencePieceTokenizer.from_texts(["the cat sat", "the mat"], vocab_size=11)
        >>> tokenizer.vocab_size
        11
        >>> tokenizer.decode(tokenizer.encode("the cat") + [0, 0])
        'the cat'
    """

    def __init__(self, model):
        import sentencepiece

        if not isinstance(model, bytes) or not model:
            raise ValueError(
                f"model must be the bytes of a SentencePiece model, got {model!r:.60}. "
                "Read the .model file with pathlib.Path(path).read_bytes()."
            )
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"These {len(model)} bytes are not a SentencePiece model ({error}). "
                "Read them from a .model file or train one with from_texts."
            ) from error

    @classmethod
    def from_texts(cls, texts, vocab_size=256, model_type="unigram"):
        """Trains a SentencePiece model; the same texts in the same order give the same model.

        Every character of `texts` gets into the vocabulary, and the text is taken as it is, without any
        Unicode normalisation of SentencePiece's own.

        Args:
            texts: iterable of normalised texts.
            vocab_size: number of ids wanted, with the blank and the "unknown" piece.
            model_type: `"unigram"` or `"bpe"`.

        Returns:
            The tokenizer.

        Raises:
            ValueError: if there is no text, the model type is not known, or the texts do not allow a
                vocabulary of this size.
        """
        import sentencepiece

        if model_type not in _MODEL_TYPES:
            raise ValueError(f"model_type must be one of {_MODEL_TYPES}, got {model_type!r}.")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(checked_texts(texts)),
                model_writer=model,
                vocab_size=vocab_size - 1,
                model_type=model_type,
                character_coverage=1.0,
                normalization_rule_name="identity",
                bos_id=-1,
                eos_id=-1,
                max_sentence_length=2**20,  # longer texts would be left out, their characters with them
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"SentencePiece cannot learn vocab_size={vocab_size} ids from these texts: {error} "
                "The limit it names is without the blank, so add 1. Change vocab_size or give more text."
            ) from error
        return cls(model.getvalue())

    @property
    def vocab_size(self):
        """Number of ids, blank included."""
        return self._processor.GetPieceSize() + 1

    def encode(self, text):
        """Turns a text into ids.

        Args:
            text: normalised text; runs of spaces count as one.

        Returns:
            `list[int]`, ids from 1 to `vocab_size - 1`.

        Raises:
            ValueError: if the text has characters the model does not know.
        """
        pieces = self._processor.Encode(text, out_type=int)
        if self._processor.unk_id() in pieces:
            surface = self._processor.Encode(text, out_type=str)[pieces.index(self._processor.unk_id())]
            raise ValueError(
                f"The SentencePiece model does not know {surface!r} in {text!r}. Normalise the text the way "
                "the training texts were, or train with from_texts on texts that have it."
            )
        return [piece + 1 for piece in pieces]

    def decode(self, ids):
        """Turns ids into a text, ignoring 0 (blank and padding).

        Args:
            ids: iterable of integers.

        Returns:
            The text.

        Raises:
            ValueError: if an id is outside `0..vocab_size - 1`.
        """
        return self._processor.Decode([i - 1 for i in labels_without_blanks(ids, self.vocab_size)])

    def get_config(self):
        """Returns the JSON-serialisable arguments that rebuild this tokenizer, the model in base64."""
        return {"model": base64.b64encode(self.model).decode("ascii")}

    @classmethod
    def from_config(cls, config):
        """Rebuilds a tokenizer from the result of `get_config`."""
        return cls(base64.b64decode(config["model"]))
