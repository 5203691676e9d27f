"""`CompressedKernel`: the state and the arithmetic order (mask, then quantize) shared by every compressed layer."""

import warnings

import keras
from keras import ops

from keras_usm_lite.core.activations import input_range, quantize_inputs
from keras_usm_lite.core.matrix_view import MatrixView
from keras_usm_lite.core.nm_mask import nm_mask, nm_violations
from keras_usm_lite.core.quantize import (
    WIDEST_BITS,
    dequantize,
    expand_scale,
    learned_scale_factor,
    quantize,
    scale_gradient,
    straight_through,
    train_codes,
)
from keras_usm_lite.core.regularizers import kurtosis_error, quantization_error
from keras_usm_lite.core.scales import estimate_scale
from keras_usm_lite.layers.kernel_kinds import fit_problem
from keras_usm_lite.quantization_config import QuantizationConfig
from keras_usm_lite.sparsity_config import SparsityConfig

# A learned scale may fall to this share of its estimate. At zero the channel would be lost.
SMALLEST_GAIN = 1 / 16
# At this many bits the integer step is below the resolution of float32: the float warm-up of a bit schedule.
FLOAT_BITS = 24


class CompressedKernel:
    """Mixin for a Keras layer that owns one `kernel` and multiplies by its compressed form.

    A layer of your own mixes it in and calls `resolve_compression` in `__init__` and `_build_compression` in `build`;
    `QuantDense` is the example.

    ```
    masked    = kernel * (mask + (1 - mask) * fade)            N:M, groups along the inputs
    codes     = clip(round(masked / scale + zero_point))       integers of `bits` bits
    effective = (codes - zero_point) * scale                   what the forward pass multiplies by
    ```

    State, all float32, saved with the layer and never touched by an optimizer unless it says so:

    * `mask` `[inputs, outputs]`: 1 kept, 0 pruned. All ones until `update_mask()`.
    * `mask_fade` scalar: what is left of a pruned weight (0, except during mask decay).
    * `bits` scalar: bits in force now (a schedule may start above the configured number).
    * `kernel_scale`, `kernel_zero_point` `[groups, outputs]`: the stored scale. "mse" always uses it, "learned" until
      frozen `kernel_scale * scale_gain`; "absmax" and "mean" follow the kernel until frozen.
    * `scale_gain` `[groups, outputs]`, with a learned scale: 1 at first, the only trainable variable here.
    * `scale_frozen` scalar: 1 after `freeze_scale()` or `load_packed`: the stored scale holds whatever the kernel does.
    * `mask_frozen` scalar, with every-step masks: 1 once the mask is to stay.
    * `input_norm` `[inputs]`, with activation-weighted scores, and `input_low`, `input_high`, with static int8
      activations: what `calibrate` has seen of the inputs.

    The host class calls `resolve_compression` in `__init__` and `_build_compression` after its kernel exists, and
    creates the kernel with `autocast=False`: masks and scales are computed in float32 whatever the policy.
    """

    def _build_compression(self):
        """Create the state; the kernel exists already."""
        problem = fit_problem(self.kernel_kind, self.kernel_view, self.quantization, self.sparsity)
        if problem is not None:
            raise ValueError(f"Layer {self.name!r} {problem}.")
        rows, columns = self.matrix_shape
        if self.sparsity is not None:
            self.mask = self._add_state("mask", (rows, columns), "ones")
            self.mask_fade = self._add_state("mask_fade", (), "zeros")
            if self.sparsity.every_step:
                self.mask_frozen = self._add_state("mask_frozen", (), "zeros")
            if self.sparsity.score == "activation":
                self.input_norm = self._add_state("input_norm", (rows,), "ones")
        if self.quantization is None:
            return
        block_size = self.quantization.block_size
        self.bits = self._add_state("bits", (), _constant(self.quantization.bits))
        if self.quantization.form == "noise":
            self.seed_generator = keras.random.SeedGenerator()
        self.scale_frozen = self._add_state("scale_frozen", (), "zeros")
        if self.quantization.activations == "static":
            self.input_low = self._add_state("input_low", (), "zeros")
            self.input_high = self._add_state("input_high", (), "zeros")
        groups = 1 if block_size is None else rows // block_size
        shape = (groups, 1 if self.quantization.per_tensor else columns)
        learned = self.quantization.scale == "learned"
        self.kernel_scale = self._add_state("kernel_scale", shape, self._initial(0))
        if learned:
            self.scale_gain = self._add_state("scale_gain", shape, "ones", trainable=True)
        if self.quantization.codebook == "asymmetric":
            self.kernel_zero_point = self._add_state("kernel_zero_point", shape, self._initial(1))

    def _add_state(self, name, shape, initializer, trainable=False):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype="float32",
            trainable=trainable,
            autocast=False,
            aggregation="mean" if trainable else "only_first_replica",
            constraint=_large_enough if trainable else None,
        )

    def _initial(self, index):
        """Initializer: scale (0) or zero point (1) of the initial dense kernel, also when Keras initializes late."""
        bits, layout = self.quantization.bits, self._scale_layout()
        method = self.quantization.scale if self.quantization.live else "mse"
        return lambda shape, dtype=None: estimate_scale(self.kernel_matrix(), method=method, bits=bits, **layout)[index]

    def load_own_variables(self, store):
        """Load the state; tell where the layer goes on at another width than it was made for."""
        super().load_own_variables(store)
        if self.quantization is not None and self.active_bits != self.quantization.bits:
            wanted, loaded = self.quantization.bits, self.active_bits
            warnings.warn(
                f"Weights in force at {loaded} bits were loaded into layers made for {wanted}, which go on at {loaded} "
                f"until callbacks.QuantizationSchedule changes them; with [(0, {wanted})] when training begins.",
                stacklevel=2,
            )

    @property
    def active_bits(self):
        """Bits per weight in force now, an int (32 for a layer that is not quantized)."""
        return 32 if self.quantization is None else int(ops.convert_to_numpy(self.bits))

    kernel_kind = "dense"

    @property
    def kernel_view(self):
        """The `MatrixView` of the kernel; a matrix already, unless the host class says otherwise."""
        return MatrixView(tuple(self.kernel.shape), (0,), (1,))

    @property
    def matrix_shape(self):
        """The pair `(inputs, outputs)`: shape of the kernel as a matrix."""
        return self.kernel_view.rows, self.kernel_view.columns

    def kernel_matrix(self):
        """The latent float32 kernel as a matrix `[inputs, outputs]`."""
        return self.kernel_view.to_matrix(ops.cast(ops.convert_to_tensor(self.kernel), "float32"))

    def assign_matrix(self, matrix):
        """Set the latent kernel from a matrix `[inputs, outputs]`."""
        self.kernel.assign(self.kernel_view.from_matrix(ops.convert_to_tensor(matrix, "float32")))

    def masked_kernel(self):
        """The latent kernel with pruned weights removed, float32 `[inputs, outputs]`."""
        kernel = self.kernel_matrix()
        if self.sparsity is None:
            return kernel
        pruned = kernel * ops.maximum(self.mask, self.mask_fade)  # mask + (1 - mask) fade, for masks of 0 and 1
        return pruned if self.sparsity.gradient == "hard" else straight_through(kernel, pruned)

    def effective_kernel(self):
        """The float32 kernel the forward pass multiplies by: masked, then quantized. Differentiable."""
        if self.quantization is None:
            return self.masked_kernel()
        return dequantize(*self._train_codes())

    def quantized_kernel(self):
        """Return `(codes, scale)` or `(codes, scale, zero_point)` with `effective_kernel() == dequantize(...)`.

        Codes are int8 `[inputs, outputs]`; scale and zero point are float32 `[groups, outputs]` (`[1, 1]` per tensor).

        Raises:
            ValueError: the layer is not quantized, or is still in a float warm-up.
        """
        if self.quantization is None or self.active_bits > 8:
            raise ValueError(
                f"Layer {self.name!r} holds no integer codes: quantization={self.quantization}, bits in force "
                f"{self.active_bits}. Set quantization, or finish the bit schedule first."
            )
        masked = self.masked_kernel()
        scale, zero_point = self._scale(masked)
        codes = quantize(masked, scale, zero_point, bits=self.active_bits, codebook=self.quantization.codebook)
        if self.quantization.codebook == "midrise" and self.sparsity is not None:
            codes = codes * ops.maximum(self.mask, ops.sign(self.mask_fade))
        codes = ops.cast(codes, "int8")
        return (codes, scale) if zero_point is None else (codes, scale, zero_point)

    @property
    def mask_made(self):
        """False for a sparse layer whose mask still keeps more than N of M, True for all others."""
        return self.sparsity is None or not int(nm_violations(self.mask, self.sparsity.n, self.sparsity.m))

    def mask_scores(self):
        """Importance of each weight: `|w|`, or `|w_ij| ||x_i||` with activation-weighted scores (Wanda)."""
        scores = ops.abs(ops.stop_gradient(self.kernel_matrix()))
        if self.sparsity.score == "activation":
            scores = scores * ops.expand_dims(ops.convert_to_tensor(self.input_norm), -1)
        return scores

    def update_mask(self, n=None, m=None):
        """Recompute the N:M mask from the scores of the current latent kernel.

        Args:
            n, m: a milder pattern than the configured one, for schedules that prune step by step.

        Returns:
            The number of mask entries that changed.

        Raises:
            ValueError: the layer is not sparse.
        """
        if self.sparsity is None:
            raise ValueError(f"Layer {self.name!r} has sparsity=None: it has no mask to update.")
        new = nm_mask(self.mask_scores(), n or self.sparsity.n, m or self.sparsity.m)
        flips = int(ops.sum(ops.cast(ops.not_equal(new, self.mask), "int32")))
        self.mask.assign(new)
        self.mask_fade.assign(0.0)
        self.update_scale(only=("mse",))
        return flips

    def update_scale(self, only=("mse", "learned")):
        """Re-estimate a stored scale, least squared error over the surviving weights, unless it is frozen."""
        if self.quantization is None or self.quantization.scale not in only:
            return
        if ops.convert_to_numpy(self.scale_frozen):
            return
        mask = self.mask if self.sparsity is not None else None
        scale, zero_point = estimate_scale(
            self.masked_kernel(), mask, method="mse", bits=self.active_bits, **self._scale_layout()
        )
        self.kernel_scale.assign(scale)
        if self.quantization.scale == "learned":
            self.scale_gain.assign(ops.ones_like(scale))
        if zero_point is not None:
            self.kernel_zero_point.assign(zero_point)

    def freeze_scale(self):
        """Keep the scale of this moment from now on, whatever happens to the kernel."""
        if self.quantization is not None:
            self.set_frozen_scale(*self._scale(self.masked_kernel()))

    def set_frozen_scale(self, scale, zero_point=None):
        """Set the scale (and zero point) and keep them from now on."""
        self.kernel_scale.assign(ops.convert_to_numpy(scale))  # two variables must not share a buffer on JAX
        if self.quantization.scale == "learned":
            self.scale_gain.assign(ops.ones(self.scale_gain.shape))  # the scale has it in it
        if zero_point is not None:
            self.kernel_zero_point.assign(zero_point)
        self.scale_frozen.assign(1.0)

    def _refresh_mask_in_step(self):
        """Every-step sparsity: make the mask inside the compiled training step."""
        if self.sparsity is not None and self.sparsity.every_step:
            new = nm_mask(self.mask_scores(), self.sparsity.n, self.sparsity.m)
            frozen = ops.convert_to_tensor(self.mask_frozen)
            self.mask.assign(frozen * self.mask + (1.0 - frozen) * new)

    def _add_penalties(self):
        """Add the losses of the training step that depend on the kernel alone."""
        self._add_pruned_decay()
        config = self.quantization
        if config is not None and config.error_loss:
            self.add_loss(config.error_loss * quantization_error(self.masked_kernel(), self.effective_kernel()))
        if config is not None and config.kurtosis_loss:
            self.add_loss(config.kurtosis_loss * kurtosis_error(self.kernel_matrix()))

    def noisy_kernel(self):
        """The masked kernel with uniform noise of one integer step on every surviving weight, for training.

        `w + s u` with `u` uniform in [-1/2, 1/2]: rounding as the gradient sees it on average (arXiv 2305.15536).
        """
        masked = self.masked_kernel()
        scale, _ = self._scale(masked)
        half = 1.0 if self.quantization.codebook == "midrise" else 0.5  # midrise levels are two scales apart
        noise = keras.random.uniform(masked.shape, -half, half, dtype="float32", seed=self.seed_generator)
        if self.sparsity is not None:
            noise = noise * self.mask
        return masked + noise * expand_scale(scale, masked.shape[0])

    def forward_kernel(self, training=False):
        """The float32 kernel of this forward pass: the effective one, or the noisy one while training with noise."""
        noise = training and self.quantization is not None and self.quantization.form == "noise"
        return self.noisy_kernel() if noise else self.effective_kernel()

    def forward_inputs(self, inputs, axes=(-1,)):
        """The inputs as an int8 kernel sees them, if activations are quantized; `axes` hold one token.

        Static ranges that are not calibrated yet (low = high = 0) leave the inputs as they are.
        """
        mode = None if self.quantization is None else self.quantization.activations
        if mode is None:
            return inputs
        if mode == "dynamic":
            return quantize_inputs(inputs, *input_range(inputs, axes))
        low, high = ops.convert_to_tensor(self.input_low), ops.convert_to_tensor(self.input_high)
        return ops.where(high > low, quantize_inputs(inputs, low, high), inputs)

    def _add_pruned_decay(self):
        """SR-STE's decay of pruned weights: a loss whose value is zero and whose gradient is `lambda (1 - mask) w`."""
        if self.sparsity is not None and self.sparsity.gradient == "sr_ste":
            pruned = (1.0 - ops.stop_gradient(self.mask)) * self.kernel_matrix()
            penalty = 0.5 * self.sparsity.sr_ste_decay * ops.sum(ops.square(pruned))
            self.add_loss(penalty - ops.stop_gradient(penalty))

    def _train_codes(self):
        masked = self.masked_kernel()
        scale, zero_point = self._scale(masked)
        # In a float warm-up codes are huge and scales tiny; a power of two, exact, keeps both within 16-bit floats.
        shift = ops.power(2.0, ops.maximum(ops.convert_to_tensor(self.bits) - WIDEST_BITS, 0.0))
        scale, zero_point = scale * shift, None if zero_point is None else zero_point / shift
        codes = train_codes(
            masked,
            scale,
            zero_point,
            bits=ops.convert_to_tensor(self.bits),
            codebook=self.quantization.codebook,
            mask=None if self.sparsity is None else ops.maximum(self.mask, ops.sign(self.mask_fade)),
            clip_gradient=self.quantization.scale == "learned",
        )
        return codes, scale, zero_point

    def _scale(self, masked):
        asymmetric = self.quantization.codebook == "asymmetric"
        stored = ops.convert_to_tensor(self.kernel_scale)
        stored_zero = ops.convert_to_tensor(self.kernel_zero_point) if asymmetric else None
        frozen = ops.convert_to_tensor(self.scale_frozen) > 0
        if self.quantization.scale == "learned":
            return ops.where(frozen, stored, self._learned_scale(stored)), None
        if not self.quantization.live:
            return stored, stored_zero
        if self.quantization.stop_scale_gradient:
            masked = ops.stop_gradient(masked)
        bits = ops.convert_to_tensor(self.bits)
        mask = self.mask if self.sparsity is not None else None
        live, live_zero = estimate_scale(
            masked, mask, method=self.quantization.scale, bits=bits, **self._scale_layout()
        )
        return ops.where(frozen, stored, live), ops.where(frozen, stored_zero, live_zero) if asymmetric else None

    def _learned_scale(self, stored):
        """`stored * scale_gain`; what reaches the gain is LSQ's gradient of the scale.

        Adam moves a variable by about its learning rate, whatever its size and the gradient's: a small scale would
        leap, or end at zero and lose its channel. A gain, 1 at first, changes by as many per cent as the rate.
        """
        rows, columns = self.matrix_shape
        shared = rows * columns // (stored.shape[0] * stored.shape[1])
        factor = learned_scale_factor(shared, self.bits, self.quantization.codebook)
        return stored * scale_gradient(self.scale_gain, factor / stored)

    def _scale_layout(self):
        config = self.quantization
        return {"codebook": config.codebook, "per_tensor": config.per_tensor, "block_size": config.block_size}


def resolve_compression(layer, quantization, sparsity):
    """Set `layer.quantization` and `layer.sparsity` from configs, shorthands, dicts or None."""
    layer.quantization = QuantizationConfig.resolve(quantization)
    layer.sparsity = SparsityConfig.resolve(sparsity)


def compression_config(layer):
    """Return a layer's `quantization` and `sparsity` as plain dicts, for its `get_config`."""
    return {
        "quantization": None if layer.quantization is None else layer.quantization.get_config(),
        "sparsity": None if layer.sparsity is None else layer.sparsity.get_config(),
    }


def _large_enough(gain):
    return ops.maximum(gain, SMALLEST_GAIN)


def _constant(value):
    return lambda shape, dtype=None: ops.full(shape, float(value), dtype=dtype)
