"""The weight errors known for Gaussian and Laplacian weights, reproduced to two digits by our quantizers.

Each entry is `||W - W^||^2 / ||W||^2` for i.i.d. weights [1536, 256], one scale per channel (or per block of inputs);
"clip" scales every channel's absmax by the one factor that is best for the whole matrix, with the lowest code in use.
"""

import numpy as np
import pytest
from keras import ops

from keras_usm_lite.core.nm_mask import nm_mask
from keras_usm_lite.core.quantize import dequantize, quantize
from keras_usm_lite.core.scales import absmax_scale, mean_scale, to_blocks

# draw, bits -> absmax; clip and its factor; absmax per block of 128, 64, 32 inputs
DENSE = {
    ("gauss", 4): (0.0220, 0.0123, 0.67, 0.0140, 0.0117, 0.0095),
    ("gauss", 3): (0.1194, 0.0421, 0.51, 0.0759, 0.0636, 0.0515),
    ("gauss", 2): (0.7796, 0.1522, 0.29, 0.592, 0.517, 0.433),
    ("laplace", 4): (0.0513, 0.0256, 0.60, 0.0256, 0.0198, 0.0146),
    ("laplace", 3): (0.2367, 0.0744, 0.42, 0.126, 0.099, 0.075),
    ("laplace", 2): (0.8306, 0.2115, 0.22, 0.614, 0.526, 0.429),
}
# draw, pattern -> pruned only; then int4 absmax, int4 clip, int2 absmax, int2 clip, sign times mean magnitude
SPARSE = {
    ("gauss", (2, 4)): (0.1320, 0.1430, 0.1389, 0.7802, 0.2336, 0.2947),
    ("gauss", (1, 4)): (0.3819, 0.3874, 0.3857, 0.7944, 0.4409, 0.4638),
    ("gauss", (4, 8)): (0.1028, 0.1137, 0.1098, 0.7796, 0.2028, 0.2488),
    ("laplace", (2, 4)): (0.0798, 0.1083, 0.0954, 0.8307, 0.2466, 0.3727),
    ("laplace", (1, 4)): (0.2805, 0.2940, 0.2893, 0.8340, 0.3909, 0.4578),
}
TOLERANCE = {"gauss": 0.003, "laplace": 0.035}  # heavy tails: the largest weight of a channel differs between draws


@pytest.fixture(scope="module")
def weights():
    draw = np.random.default_rng(1)
    made = {"gauss": draw.normal(size=(1536, 256)), "laplace": draw.laplace(size=(1536, 256))}
    return {name: kernel.astype("float32") for name, kernel in made.items()}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def error(kernel, bits, mask=None, factor=None, block_size=None):
    """Relative error at absmax, or at absmax of the "full" codebook times a factor."""
    blocks = array(to_blocks(kernel if mask is None else kernel * mask, block_size))
    codebook = "symmetric" if factor is None else "full"
    scale, _ = absmax_scale(blocks, bits, codebook)
    scale = array(scale) * np.float32(factor or 1.0)
    restored = dequantize(quantize(blocks, scale, bits=bits, codebook=codebook), scale)
    return np.sum((kernel - array(restored).reshape(kernel.shape)) ** 2) / np.sum(kernel**2)


def best_clip(kernel, bits, near, mask=None):
    """Least error over the factors around the known one, and the factor."""
    factors = np.round(np.arange(near - 0.05, near + 0.06, 0.01), 2)
    errors = [error(kernel, bits, mask, factor) for factor in factors]
    return min(errors), factors[int(np.argmin(errors))]


@pytest.mark.parametrize(("draw", "bits"), DENSE)
def test_dense_weights_have_the_known_errors(weights, draw, bits):
    absmax, clip, factor, *blocks = DENSE[draw, bits]
    tolerance = TOLERANCE[draw]
    assert error(weights[draw], bits) == pytest.approx(absmax, rel=tolerance)
    found, at = best_clip(weights[draw], bits, factor)
    assert found == pytest.approx(clip, rel=tolerance) and at == pytest.approx(factor, abs=0.011)
    measured = [error(weights[draw], bits, block_size=size) for size in (128, 64, 32)]
    assert measured == pytest.approx(blocks, rel=max(tolerance, 0.01))


@pytest.mark.parametrize(("draw", "pattern"), SPARSE)
def test_sparse_weights_have_the_known_errors(weights, draw, pattern):
    kernel = weights[draw]
    mask = array(nm_mask(np.abs(kernel), *pattern))
    pruned = kernel * mask
    scale, _ = mean_scale(pruned, mask=mask)
    sign = np.where(pruned >= 0, 1, -1) * mask * array(scale)
    size = np.sum(kernel**2)
    measured = [
        np.sum((kernel - pruned) ** 2) / size,
        error(kernel, 4, mask),
        best_clip(kernel, 4, 0.67 if draw == "gauss" else 0.6, mask)[0],
        error(kernel, 2, mask),
        best_clip(kernel, 2, 0.35 if draw == "gauss" else 0.26, mask)[0],
        np.sum((kernel - sign) ** 2) / size,
    ]
    assert measured == pytest.approx(SPARSE[draw, pattern], rel=TOLERANCE[draw])


def test_two_bits_send_nine_of_ten_gaussian_weights_to_zero_at_absmax(weights):
    scale, _ = absmax_scale(weights["gauss"], 2)
    codes = array(quantize(weights["gauss"], scale, bits=2))
    assert np.mean(codes == 0) == pytest.approx(0.92, abs=0.02)
