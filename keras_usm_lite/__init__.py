"""keras_usm_lite: low-bit and N:M sparse fine-tuning of speech recognisers in Keras 3 (USM-Lite)."""

from keras_usm_lite import callbacks, data, interop, optimizers
from keras_usm_lite.bootstrap import PairedBootstrap, paired_bootstrap
from keras_usm_lite.calibration import calibrate
from keras_usm_lite.compression import compress, compressed_layers, update_masks
from keras_usm_lite.decoding import beam_decode, greedy_decode
from keras_usm_lite.error_rates import ErrorRates, error_rates
from keras_usm_lite.export.bake import bake
from keras_usm_lite.export.litert import export_litert
from keras_usm_lite.export.litert_recognizer import LiteRTRecognizer
from keras_usm_lite.export.onnx import export_onnx
from keras_usm_lite.export.parity_error import ParityError
from keras_usm_lite.export.saved_model import export_saved_model
from keras_usm_lite.export.streaming import export_litert_streaming
from keras_usm_lite.export.streaming_recognizer import StreamingRecognizer
from keras_usm_lite.export.verify import verify_litert
from keras_usm_lite.layers.compressed_layer import CompressedLayer
from keras_usm_lite.layers.conformer_block import ConformerBlock
from keras_usm_lite.layers.log_mel import LogMel
from keras_usm_lite.layers.nm_sparse_dense import NMSparseDense
from keras_usm_lite.layers.quant_dense import QuantDense
from keras_usm_lite.layers.spec_augment import SpecAugment
from keras_usm_lite.model_report import report
from keras_usm_lite.models.best_rq import BestRQ
from keras_usm_lite.models.co_trainer import CoTrainer
from keras_usm_lite.models.compressed_model import CompressedModel
from keras_usm_lite.models.distiller import Distiller
from keras_usm_lite.models.usm_encoder import USMEncoder
from keras_usm_lite.models.usm_for_ctc import USMForCTC
from keras_usm_lite.one_shot import one_shot
from keras_usm_lite.packing.packed_file import PackedFileError, load_packed, save_packed
from keras_usm_lite.permutation import permute_channels
from keras_usm_lite.quantization_config import QuantizationConfig
from keras_usm_lite.sparsity_config import SparsityConfig
from keras_usm_lite.tokenizers import (
    CharTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    load_tokenizer,
    save_tokenizer,
)
from keras_usm_lite.training import compile_ctc, fit_ctc, warmup_cosine

__version__ = "0.1.0"
__all__ = [
    "BestRQ",
    "CharTokenizer",
    "CoTrainer",
    "CompressedLayer",
    "CompressedModel",
    "ConformerBlock",
    "Distiller",
    "ErrorRates",
    "LiteRTRecognizer",
    "LogMel",
    "NMSparseDense",
    "PackedFileError",
    "PairedBootstrap",
    "ParityError",
    "QuantDense",
    "QuantizationConfig",
    "SentencePieceTokenizer",
    "SparsityConfig",
    "SpecAugment",
    "StreamingRecognizer",
    "USMEncoder",
    "USMForCTC",
    "WordTokenizer",
    "bake",
    "beam_decode",
    "calibrate",
    "callbacks",
    "compile_ctc",
    "compress",
    "compressed_layers",
    "data",
    "error_rates",
    "export_litert",
    "export_litert_streaming",
    "export_onnx",
    "export_saved_model",
    "fit_ctc",
    "greedy_decode",
    "interop",
    "load_packed",
    "load_tokenizer",
    "one_shot",
    "optimizers",
    "paired_bootstrap",
    "permute_channels",
    "report",
    "save_packed",
    "save_tokenizer",
    "update_masks",
    "verify_litert",
    "warmup_cosine",
]
