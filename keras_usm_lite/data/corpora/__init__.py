"""Corpora: what is needed to get from a recording archive, or from nothing, to manifests for training."""

from keras_usm_lite.data.corpora.catalogue import default_corpus, open_corpus, prepare_corpus
from keras_usm_lite.data.corpora.corpus import Corpus
from keras_usm_lite.data.corpora.download import CorpusUnavailable

__all__ = ["Corpus", "CorpusUnavailable", "default_corpus", "open_corpus", "prepare_corpus"]
