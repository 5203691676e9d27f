"""`QuantizationConfig`: what the weights of one layer become."""

import dataclasses

import keras

from keras_usm_lite.core.quantize import CODEBOOKS

BITS = (1, 2, 3, 4, 8)
SCALES = ("absmax", "mean", "mse", "learned")
FORMS = ("native", "fake", "noise")
ACTIVATIONS = (None, "dynamic", "static")


@keras.saving.register_keras_serializable(package="keras_usm_lite")
@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How a kernel `[inputs, outputs]` is quantized: `w = (code - zero_point) * scale` with integer codes.

    The defaults are the paper's: symmetric codes, one absmax scale per output channel, integer-valued operand
    multiplied first and scaled afterwards, gradient straight through the rounding.

    Args:
        bits: bits per weight: 8, 4, 3, 2 or 1. One bit is `sign(w) * mean|w|`: codebook "midrise", scale "mean".
        codebook: which integers are codes. "symmetric" (2 bits: -1, 0, 1), "full" (-2 .. 1, with "mse" or "learned":
            absmax reaches the highest code first), "midrise" (the four levels -1.5, -0.5, 0.5, 1.5; at most 4 bits),
            "asymmetric" (with an integer zero point).
        scale: "absmax" (recomputed from the kernel in every step; at one bit it is "mean", recomputed likewise), "mse"
            (least squared error; stored, refreshed by `layer.update_scale()`), "learned" (LSQ: an
            estimate, stored, times a gain that is trained; exclude "scale_gain" from the weight decay of an optimizer
            of your own, as `compile_ctc` does).
            `layer.freeze_scale()` stops any of them.
        per_tensor: one scale for the whole kernel instead of one per output channel.
        block_size: one scale per this many inputs of a channel (sub-channel quantization); None for whole channels.
        form: "native" multiplies by the integer codes and scales the product, so that what is trained is what an
            integer kernel serves; "fake" multiplies by the dequantized kernel (needed with `block_size`); "noise"
            trains with noise as wide as one integer step instead of rounding and serves as "fake".
        activations: None for float inputs, or int8 ones: "dynamic" with the range of each token, as LiteRT's integer
            kernels do at run time, "static" with ranges collected beforehand by `usm.calibrate(model, batches)`.
        stop_scale_gradient: do not let the gradient reach the largest weight through an absmax scale.
        error_loss: weight of the penalty `mean((w - w^)^2)` added to the training loss, for each use of the layer.
        kurtosis_loss: weight of the penalty `mean_c (kurtosis_c - 1.8)^2`, which asks for evenly spread weights.

    Raises:
        ValueError: a value or a combination that cannot work, with the reason.

    Source: arXiv 2312.08553, section 2; google/praxis `quantization_hparams.py`.

    Example:

    >>> QuantizationConfig.resolve("int4") == QuantizationConfig(bits=4)
    True
    >>> str(QuantizationConfig(bits=2, scale="mse"))
    'int2'
    """

    bits: int = 4
    codebook: str = "symmetric"
    scale: str = "absmax"
    per_tensor: bool = False
    block_size: int | None = None
    form: str = "native"
    activations: str | None = None
    stop_scale_gradient: bool = False
    error_loss: float = 0.0
    kurtosis_loss: float = 0.0

    def __post_init__(self):
        _check("bits", self.bits, BITS)
        object.__setattr__(self, "bits", int(self.bits))
        if self.bits == 1:  # the only one-bit code there is
            object.__setattr__(self, "codebook", "midrise")
            if self.scale == "absmax":
                object.__setattr__(self, "scale", "mean")
        _check("codebook", self.codebook, CODEBOOKS)
        _check("scale", self.scale, SCALES)
        _check("form", self.form, FORMS)
        _check("activations", self.activations, ACTIVATIONS)
        if self.scale == "mean" and self.bits > 1:
            raise ValueError(f"scale='mean' is for one bit, got bits={self.bits}. Use scale='absmax' or 'mse'.")
        if self.codebook == "midrise" and self.bits > 4:
            raise ValueError(
                f"codebook='midrise' has at most 4 bits, got bits={self.bits}. Use codebook='symmetric' at 8 bits."
            )
        if self.codebook == "asymmetric" and self.scale == "learned":
            raise ValueError("scale='learned' needs a codebook without zero point: 'symmetric', 'full' or 'midrise'.")
        if self.form == "noise" and self.scale == "learned":
            raise ValueError(
                "form='noise' trains without rounding and clipping, so a learned scale would only shrink the noise. "
                "Use scale='absmax' or 'mse' with it, or form='native' with scale='learned'."
            )
        for name in ("error_loss", "kurtosis_loss"):
            weight = getattr(self, name)
            if weight < 0:
                raise ValueError(f"{name} is the weight of a penalty and must not be negative, got {weight!r}.")
        if self.block_size is not None:
            self._check_block_size()

    def _check_block_size(self):
        if not isinstance(self.block_size, int) or self.block_size < 2:
            raise ValueError(f"block_size must be None or an integer of at least 2, got {self.block_size!r}.")
        if self.per_tensor:
            raise ValueError("block_size and per_tensor=True exclude each other; drop one of them.")
        if self.form == "native":
            raise ValueError(
                "form='native' scales the product once per output channel, which block_size does not allow. "
                "Use form='fake' with block_size."
            )

    @property
    def live(self):
        """True if the scale is recomputed from the kernel in every step; False if it is stored."""
        return self.scale in ("absmax", "mean")

    @classmethod
    def resolve(cls, value):
        """Return a config, or None, from None, "int8" / "int4" / "int3" / "int2" / "int1", a dict or a config.

        Example:

        >>> QuantizationConfig.resolve("int2").bits
        2
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls.from_config(value.get("config", value))
        shorthands = {f"int{bits}": bits for bits in BITS}
        if isinstance(value, str) and value in shorthands:
            return cls(bits=shorthands[value])
        raise ValueError(
            f"quantization={value!r} is not understood. Give None, one of {sorted(shorthands)}, or a config."
        )

    def replace(self, **changes):
        """Return a copy with some fields changed.

        Example:

        >>> QuantizationConfig().replace(bits=8).bits
        8
        """
        return dataclasses.replace(self, **changes)

    def get_config(self):
        """Return the fields as a plain dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        """Build a config from the dict of `get_config`."""
        return cls(**config)

    def __str__(self):
        return f"int{self.bits}"


def _check(name, value, allowed):
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not supported; choose one of {', '.join(map(repr, allowed))}.")
