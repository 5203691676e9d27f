"""Which layers can be compressed, and what stands in the way."""

import keras
import pytest

import keras_usm_lite as usm
from keras_usm_lite.core.matrix_view import MatrixView
from keras_usm_lite.layers.kernel_kinds import WRAPPABLE, fit_problem, layer_kind

MATRIX = MatrixView((24, 6), (0,), (1,))


def test_every_wrappable_layer_has_a_kind():
    made = {
        keras.layers.EinsumDense: keras.layers.EinsumDense("ab,bc->ac", 3),
        keras.layers.Embedding: keras.layers.Embedding(3, 3),
    }
    kinds = {kind.__name__: layer_kind(made.get(kind) or kind(4, 3)) for kind in WRAPPABLE if kind not in made}
    kinds |= {kind.__name__: layer_kind(layer) for kind, layer in made.items()}
    assert kinds == {
        "EinsumDense": "einsum",
        "Embedding": "embedding",
        "Conv1D": "convolution",
        "Conv2D": "convolution",
        "Conv3D": "convolution 3d",
        "DepthwiseConv1D": "depthwise",
        "DepthwiseConv2D": "depthwise",
    }


@pytest.mark.parametrize("kind", ["dense", "einsum", "convolution", "depthwise", "embedding"])
def test_every_kind_can_be_quantized(kind):
    assert fit_problem(kind, MATRIX, usm.QuantizationConfig(4), None) is None


@pytest.mark.parametrize("kind", ["convolution", "batched einsum"])
def test_norms_of_inputs_are_for_kernels_whose_rows_are_inputs(kind):
    activation = usm.SparsityConfig(2, 4, score="activation")
    assert "score='magnitude'" in fit_problem(kind, MatrixView((8, 5), (0,), (1,)), None, activation)
    assert fit_problem("einsum", MatrixView((8, 5), (0,), (1,)), None, activation) is None


def test_a_convolution_needs_whole_groups_within_one_tap():
    taps = MatrixView((3, 4, 5), (0, 1), (2,))
    assert fit_problem("convolution", taps, None, usm.SparsityConfig(2, 4)) is None
    assert "4 inputs per tap" in fit_problem("convolution", taps, None, usm.SparsityConfig(3, 6))
    assert fit_problem("dense", MATRIX, None, usm.SparsityConfig(3, 6)) is None
