"""`report`: what is compressed in a model, how far, and what it weighs."""

import dataclasses

import numpy as np
from keras import ops

from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.layers.compressed_kernel import FLOAT_BITS
from keras_usm_lite.packing.entropy import entropy_bits
from keras_usm_lite.packing.packed_layer import PACKED_VARIABLES
from keras_usm_lite.packing.patterns import enumerative_bits, gather_kept, mask_to_indices
from keras_usm_lite.packing.positions import position_list_bits
from keras_usm_lite.rewrite import layer_path, walk_layers

# Variables of a compressed layer that its row accounts for, or that the float model does not have.
_STATE = (*PACKED_VARIABLES, "mask_frozen", "input_norm", "input_low", "input_high")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One row: a layer that owns weights.

    Attributes:
        path: the layer's path.
        kind: its class.
        weights: weights of its kernel.
        quantization, sparsity: what was done to it, or None; "float" in a float warm-up.
        mask_made: False where the N:M mask is not made yet: the sizes are those the kernel will have.
        non_zero: share of the effective kernel's weights that are not zero (not counted where nothing is compressed).
        bits_per_weight: storage of the kernel by enumerative coding, scales included.
        archive_bits: the same with codes and masks at their zeroth-order entropy, scales included.
        position_list_bits: the same by the paper's accounting: codes and a position list, no scales.
    """

    path: str
    kind: str
    weights: int
    quantization: str | None
    sparsity: str | None
    mask_made: bool
    non_zero: float
    bits_per_weight: float
    archive_bits: float
    position_list_bits: float

    @property
    def compressed(self):
        """True if the layer multiplies by a compressed kernel."""
        return self.quantization is not None or self.sparsity is not None


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """The table that `report` returns; print it, or read `rows` and the totals.

    Attributes:
        rows: a `LayerReport` for each layer with a kernel, in model order, and one for all biases and norms together.
    """

    rows: tuple

    @property
    def weights(self):
        """All weights of the model, as many as the float model has."""
        return sum(row.weights for row in self.rows)

    @property
    def compressed_share(self):
        """Share of the weights that lie in compressed kernels."""
        return sum(row.weights for row in self.rows if row.compressed) / max(self.weights, 1)

    @property
    def float32_bytes(self):
        """The model in FP32."""
        return 4 * self.weights

    @property
    def bytes(self):
        """The model with compressed kernels and scales, everything else in FP32, without a container."""
        return sum(row.weights * row.bits_per_weight for row in self.rows) / 8

    @property
    def archive_bytes(self):
        """`bytes` with the codes and the masks of each layer at their zeroth-order entropy.

        An estimate of `save_packed(..., archive=True)`, which adds its tables and a container.
        """
        return sum(row.weights * row.archive_bits for row in self.rows) / 8

    @property
    def position_list_bytes(self):
        """The model by the paper's accounting of its kernels, everything else in FP32."""
        return sum(row.weights * row.position_list_bits for row in self.rows) / 8

    @property
    def kernel_bits_per_weight(self):
        """Bits per weight of the compressed kernels alone, scales included."""
        rows = [row for row in self.rows if row.compressed]
        return sum(row.weights * row.bits_per_weight for row in rows) / max(sum(row.weights for row in rows), 1)

    def __str__(self):
        width = max((len(row.path) for row in self.rows), default=5)
        lines = [f"{'layer':{width}}  {'weights':>11}  {'quant':>6}  {'N:M':>5}  {'nonzero':>7}  {'bits/weight':>11}"]
        for row in self.rows:
            lines.append(
                f"{row.path:{width}}  {row.weights:11,}  {row.quantization or '-':>6}  {row.sparsity or '-':>5}  "
                f"{row.non_zero:7.1%}  {row.bits_per_weight:11.3f}"
            )
        total = self.float32_bytes
        lines += [
            "",
            f"weights {self.weights:,}, {self.compressed_share:.1%} of them in compressed kernels at "
            f"{self.kernel_bits_per_weight:.3f} bits (scales included)",
            f"FP32                            {total:13,.0f} bytes",
            f"BF16                            {total / 2:13,.0f} bytes  {0.5:7.2%} of FP32",
            f"compressed, enumerative masks   {self.bytes:13,.0f} bytes  {self.bytes / max(total, 1):7.2%} of FP32",
            f"compressed, archive (entropy)   {self.archive_bytes:13,.0f} bytes  "
            f"{self.archive_bytes / max(total, 1):7.2%} of FP32 (estimate)",
            f"compressed, position lists      {self.position_list_bytes:13,.0f} bytes  "
            f"{self.position_list_bytes / max(total, 1):7.2%} of FP32 (no scales)",
        ]
        unmade = [row.path for row in self.rows if not row.mask_made]
        if unmade:
            lines.append(f"masks not made yet, sizes as if they were: {', '.join(unmade)}")
        untouched = [row.path for row in self.rows if not row.compressed]
        if untouched:
            lines.append(f"not compressed: {', '.join(untouched)}")
        return "\n".join(lines)


def report(model):
    """Return a table of every layer with weights: compression, non-zeros, bits per weight, and totals in bytes.

    Bits per weight of an N:M kernel with b-bit codes: `b N/M + log2(C(M, N)) / M + 32 scales / weights`
    (enumerative) beside the paper's `b N/M + N/M ceil(log2 M)` (position list). The archive's size is estimated from
    the layer's own codes and masks: `H(codes) N/M + H(patterns) / M + 32 scales / weights` with the zeroth-order
    entropies `H` (their upper bounds `b` and `log2(C(M, N))` where a schedule has not finished).

    Args:
        model: a built model; of a `Distiller` or `CoTrainer` its student is described.

    Returns:
        A `ModelReport`.

    Raises:
        ValueError: the model is not built.

    Source: arXiv 2312.08553 (9.4 % = 3/32 is the position-list figure of int4 + 2:4).

    Example:

    >>> import keras, keras_usm_lite as usm
    >>> model = keras.Sequential([keras.Input((1024,)), usm.QuantDense(8, "int4", sparsity="2:4", use_bias=False)])
    >>> table = report(model)
    >>> round(table.position_list_bytes / table.float32_bytes, 5)
    0.09375
    """
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so it has no weights yet. Call it on a batch, or build() it."
        )
    model = getattr(model, "student", model)
    compressed = {id(layer): layer for layer in compressed_layers(model)}
    state = {id(getattr(layer, key)) for layer in compressed.values() for key in _STATE if hasattr(layer, key)}
    rows, small = [], 0
    for layer in walk_layers(model):
        if id(layer) in compressed:
            rows.append(_compressed_row(layer))
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        own = [variable for variable in own if id(variable) not in state]
        matrices = sum(int(np.prod(variable.shape)) for variable in own if len(variable.shape) > 1)
        small += sum(int(np.prod(variable.shape)) for variable in own if len(variable.shape) < 2)
        if matrices:
            rows.append(
                LayerReport(layer_path(layer), type(layer).__name__, matrices, None, None, True, 1.0, 32, 32, 32)
            )
    if small:
        rows.append(LayerReport("(biases and norms)", "", small, None, None, True, 1.0, 32, 32, 32))
    return ModelReport(tuple(rows))


def _compressed_row(layer):
    kernel = ops.convert_to_numpy(layer.effective_kernel())
    warming_up = layer.quantization is not None and layer.active_bits == FLOAT_BITS
    bits = 32 if warming_up else layer.active_bits
    density, enumerative, positions = 1.0, 0.0, 0.0
    if layer.sparsity is not None:
        n, m = layer.sparsity.n, layer.sparsity.m
        density, enumerative, positions = n / m, enumerative_bits(n, m), position_list_bits(n, m)
    scales = 0
    if layer.quantization is not None and not warming_up:
        scales = int(np.prod(layer.kernel_scale.shape)) * (2 if layer.quantization.codebook == "asymmetric" else 1)
    scale_bits = 32 * scales / kernel.size
    code_entropy, mask_entropy = _entropies(layer, bits * density, enumerative)
    return LayerReport(
        path=layer_path(layer),
        kind=type(layer).__name__,
        weights=kernel.size,
        quantization=None if layer.quantization is None else "float" if warming_up else f"int{bits}",
        sparsity=None if layer.sparsity is None else str(layer.sparsity),
        mask_made=layer.mask_made,
        non_zero=float(np.count_nonzero(kernel)) / kernel.size,
        bits_per_weight=bits * density + enumerative + scale_bits,
        archive_bits=code_entropy + mask_entropy + scale_bits,
        position_list_bits=bits * density + positions,
    )


def _entropies(layer, code_bits, mask_bits):
    """Zeroth-order entropy of a layer's codes and of its mask, bits per weight; the bounds given where there is none.

    Nothing is known of codes in a float warm-up, nor of a mask that is not made yet.
    """
    size, mask = layer.matrix_shape[0] * layer.matrix_shape[1], None
    if layer.sparsity is not None:
        n, m = layer.sparsity.n, layer.sparsity.m
        mask = ops.convert_to_numpy(layer.mask)
        if not layer.mask_made:
            return code_bits, mask_bits
        mask_bits = entropy_bits(mask_to_indices(mask, n, m).ravel()) / size
    if layer.quantization is not None and layer.active_bits <= 8:
        codes = ops.convert_to_numpy(layer.quantized_kernel()[0])
        kept = codes if mask is None else gather_kept(codes, mask, n, m)
        code_bits = entropy_bits(kept.ravel().view(np.uint8)) / size
    return code_bits, mask_bits
