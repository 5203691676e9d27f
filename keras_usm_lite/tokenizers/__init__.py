"""Text to integer labels and back, with id 0 kept free for the CTC blank."""

# Importing a class registers it, and load_tokenizer finds only what is registered.
from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
from keras_usm_lite.tokenizers.io import load_tokenizer, save_tokenizer
from keras_usm_lite.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from keras_usm_lite.tokenizers.word_tokenizer import WordTokenizer

__all__ = ["CharTokenizer", "SentencePieceTokenizer", "WordTokenizer", "load_tokenizer", "save_tokenizer"]
