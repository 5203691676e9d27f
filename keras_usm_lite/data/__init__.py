"""Data: manifests, audio, features, batches, and corpora that prepare themselves."""

from keras_usm_lite.data.audio import AudioError, load_audio
from keras_usm_lite.data.corpora import Corpus, CorpusUnavailable, default_corpus, open_corpus, prepare_corpus
from keras_usm_lite.data.feature_cache import FeatureCache
from keras_usm_lite.data.manifest import ManifestError, Utterance, check_utterances, read_manifest, write_manifest
from keras_usm_lite.data.speech_batches import SpeechBatches
from keras_usm_lite.data.speech_task import SpeechTask
from keras_usm_lite.data.text import normalize_text
from keras_usm_lite.data.tf_pipeline import audio_dataset, record_dataset, to_tf_dataset

__all__ = [
    "AudioError",
    "Corpus",
    "CorpusUnavailable",
    "FeatureCache",
    "ManifestError",
    "SpeechBatches",
    "SpeechTask",
    "Utterance",
    "audio_dataset",
    "check_utterances",
    "default_corpus",
    "load_audio",
    "normalize_text",
    "open_corpus",
    "prepare_corpus",
    "read_manifest",
    "record_dataset",
    "to_tf_dataset",
    "write_manifest",
]
