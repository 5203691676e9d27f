"""`SparsityConfig`: which weights of one layer stay."""

import dataclasses
import numbers
import re

import keras

GRADIENTS = ("hard", "ste", "sr_ste")
SCORES = ("magnitude", "activation")
MAX_M = 16


@keras.saving.register_keras_serializable(package="keras_usm_lite")
@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """N:M sparsity of a kernel `[inputs, outputs]`: at most `n` non-zeros in every `m` consecutive inputs.

    The layer starts dense (its mask is all ones); a mask is made by `layer.update_mask()`, usually from the callback
    `callbacks.NMPruning`, which holds the schedule.

    N:M counts non-zeros here, as in the paper and on NVIDIA hardware. tfmot's `sparsity_m_by_n` counts zeros: our
    1:4 is tfmot's (3, 4).

    Args:
        n: non-zeros kept per group, `1 <= n < m`.
        m: group size along the reduction axis, at most 16.
        gradient: what a pruned weight receives. "hard": nothing (the paper); "ste": the gradient as if it had not been
            pruned; "sr_ste": that, plus a decay `sr_ste_decay * w` of pruned weights only, which steadies the mask.
        every_step: make the mask anew in every training step, inside the compiled step (SR-STE's way), instead of
            only when a callback asks for it.
        sr_ste_decay: lambda of SR-STE.
        score: what makes a weight worth keeping. "magnitude": `|w|`; "activation": `|w_ij| ||x_i||_2` (Wanda), with the
            norm of input `i` over calibration data, which `usm.calibrate(model, batches)` collects (until then 1).

    Raises:
        ValueError: a value that cannot work, with the reason.

    Source: arXiv 2312.08553, section 2; SR-STE: arXiv 2102.04010, equation 8;
    Wanda: arXiv 2306.11695, section 3.

    Example:

    >>> SparsityConfig.resolve("2:4") == SparsityConfig(n=2, m=4)
    True
    >>> str(SparsityConfig(n=4, m=8))
    '4:8'
    """

    n: int = 2
    m: int = 4
    gradient: str = "hard"
    every_step: bool = False
    sr_ste_decay: float = 2e-4
    score: str = "magnitude"

    def __post_init__(self):
        whole = all(isinstance(value, numbers.Integral) and not isinstance(value, bool) for value in (self.n, self.m))
        if not whole or not 1 <= self.n < self.m <= MAX_M:
            raise ValueError(
                f"N:M sparsity keeps n of m weights with 1 <= n < m <= {MAX_M}, got n={self.n!r}, m={self.m!r}. "
                "N counts non-zeros; for a dense layer use sparsity=None."
            )
        object.__setattr__(self, "n", int(self.n))  # also of NumPy's integers, which JSON cannot hold
        object.__setattr__(self, "m", int(self.m))
        for name, allowed in (("gradient", GRADIENTS), ("score", SCORES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; choose one of {allowed}.")
        if self.sr_ste_decay < 0:
            raise ValueError(f"sr_ste_decay must not be negative, got {self.sr_ste_decay!r}.")

    @classmethod
    def resolve(cls, value):
        """Return a config, or None, from None, "n:m", a dict or a config.

        Example:

        >>> SparsityConfig.resolve("1:4").n
        1
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls.from_config(value.get("config", value))
        match = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
        if match:
            return cls(n=int(match[1]), m=int(match[2]))
        raise ValueError(
            f"sparsity={value!r} is not understood. Give None, 'non-zeros:group' such as '2:4', or a SparsityConfig."
        )

    def replace(self, **changes):
        """Return a copy with some fields changed.

        Example:

        >>> SparsityConfig().replace(n=1).n
        1
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
        return f"{self.n}:{self.m}"
