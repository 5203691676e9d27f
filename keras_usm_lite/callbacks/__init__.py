"""Callbacks: they hold time. Layers hold the state that they change."""

from keras_usm_lite.callbacks.backup import Backup
from keras_usm_lite.callbacks.compression_monitor import CompressionMonitor
from keras_usm_lite.callbacks.finite_loss import FiniteLoss, NonFiniteError
from keras_usm_lite.callbacks.nm_pruning import NMPruning
from keras_usm_lite.callbacks.quantization_schedule import QuantizationSchedule
from keras_usm_lite.callbacks.wer import WordErrorRate

__all__ = [
    "Backup",
    "CompressionMonitor",
    "FiniteLoss",
    "NMPruning",
    "NonFiniteError",
    "QuantizationSchedule",
    "WordErrorRate",
]
