"""`PackedEntry`: what a packed file says about one compressed layer, and which arrays follow from it."""

import dataclasses
import math

from keras_usm_lite.core.quantize import CODEBOOKS, code_range
from keras_usm_lite.packing.bits import packed_size
from keras_usm_lite.packing.patterns import MAX_M, patterns_size
from keras_usm_lite.packing.positions import positions_size
from keras_usm_lite.packing.precision import SCALES, reduced_arrays

CODERS = ("range", "zstd")  # of an archive; such a stream has the length that its symbols need


@dataclasses.dataclass(frozen=True)
class PackedEntry:
    """The description of one layer in the header of a packed file. Every field is checked on construction.

    Attributes:
        name: prefix of the layer's arrays.
        rows, columns: shape of the kernel as a matrix `[inputs, outputs]`.
        bits: bits of a code, 1 to 8; 32 if the layer is not quantized.
        codebook, scale_shape: of the codes and of their scale `[groups, outputs]`; None if not quantized.
        n, m: weights kept of every `m` consecutive rows; None if the layer is dense.
        codes: how the codes are stored, "bits", "range" or "zstd"; None if not quantized.
        masks: how the mask is stored, "enumerative", "positions", "range" or "zstd"; None if dense.
        scales: type of the stored scale, "float32", "float16" or "bfloat16"; None if not quantized.
        values: type of the stored weights of a layer that is not quantized, "float32", "float16" or "int8".

    Raises:
        ValueError: a field that cannot be, by itself or beside the others.
    """

    name: str
    rows: int
    columns: int
    bits: int
    codebook: str | None = None
    scale_shape: tuple | None = None
    n: int | None = None
    m: int | None = None
    codes: str | None = None
    masks: str | None = None
    scales: str | None = None
    values: str | None = None

    def __post_init__(self):
        self._require("name", isinstance(self.name, str))
        self._require("rows", _is_whole(self.rows, 1))
        self._require("columns", _is_whole(self.columns, 1))
        self._require("bits", _is_whole(self.bits, 1, 8) or _is_whole(self.bits, 32, 32))
        if self.quantized:
            self._check_codes()
            self._require("values", self.values is None)
        else:
            self._require("values", self.values in ("float32", "float16", "int8"))
            for field in ("codebook", "scale_shape", "codes", "scales"):
                self._require(field, getattr(self, field) is None)
        if self.n is not None:
            self._require("m", _is_whole(self.m, 2, MAX_M) and self.rows % self.m == 0)
            self._require("n", _is_whole(self.n, 1, self.m - 1))
            self._require("masks", self.masks in ("enumerative", "positions", *CODERS))
        else:
            self._require("m", self.m is None)
            self._require("masks", self.masks is None)

    def _check_codes(self):
        self._require("codebook", self.codebook in CODEBOOKS)
        self._require("bits", code_range(self.bits, self.codebook)[1] <= 127)
        self._require("codes", self.codes in ("bits", *CODERS))
        self._require("scales", self.scales in SCALES)
        shape = self.scale_shape
        self._require("scale_shape", isinstance(shape, (tuple, list)) and len(shape) == 2)
        object.__setattr__(self, "scale_shape", tuple(shape))
        groups, outputs = shape
        self._require("scale_shape", _is_whole(groups, 1) and self.rows % groups == 0)
        self._require("scale_shape", _is_whole(outputs, 1) and outputs in (1, self.columns))

    def _require(self, field, holds):
        if not holds:
            raise ValueError(f"layer {self.name!r} cannot have {field}={getattr(self, field)!r} in {self}.")

    @property
    def quantized(self):
        """True if the layer has codes, False if it has float values."""
        return self.bits != 32

    @property
    def kept_rows(self):
        """Weights that are stored of each column."""
        return self.rows if self.n is None else self.rows // self.m * self.n

    @property
    def grid(self):
        """The pair `(lowest code, distance of two codes)`."""
        lowest, _ = code_range(self.bits, self.codebook)
        return lowest, 2 if self.codebook == "midrise" else 1

    @property
    def alphabet(self):
        """Number of different codes."""
        lowest, highest = code_range(self.bits, self.codebook)
        return (highest - lowest) // self.grid[1] + 1

    @property
    def mask_key(self):
        """Name of the array that holds the mask."""
        return "positions" if self.masks == "positions" else "patterns"

    @property
    def elements(self):
        """Elements of the variables that a layer may have: kernel, mask, scale, frozen scale, zero point, 3 flags."""
        scale = 0 if self.scale_shape is None else self.scale_shape[0] * self.scale_shape[1]
        return self.rows * self.columns * (1 if self.n is None else 2) + 3 * scale + 3

    def arrays(self):
        """Return `{array name: (type, shape)}` that the entry demands; the shape of an archive's stream is None."""
        arrays = {}
        if self.n is not None:
            arrays[self.mask_key] = ("uint8", None if self.masks in CODERS else (self.plain_size(self.mask_key),))
        if not self.quantized:
            shape = (self.columns, self.kept_rows)
            parts = reduced_arrays(shape, "float32", self.values)
            return arrays | {f"values{suffix}": part for suffix, part in parts.items()}
        arrays["codes"] = ("uint8", None if self.codes in CODERS else (self.plain_size("codes"),))
        arrays["scale"] = (self.scales, self.scale_shape)
        if self.codebook == "asymmetric":
            arrays["zero_point"] = ("float32", self.scale_shape)
        return arrays

    def plain_size(self, key):
        """Bytes of the codes, patterns or positions when no coder is used."""
        if key == "codes":
            return packed_size(self.kept_rows * self.columns, self.bits)
        size = {"patterns": patterns_size, "positions": positions_size}[key]
        return size(self.rows, self.columns, self.n, self.m)

    @property
    def groups(self):
        """Number of groups of `m` weights in the kernel."""
        return self.rows // self.m * self.columns

    @property
    def patterns(self):
        """Number of patterns that a group may have."""
        return math.comb(self.m, self.n)


def _is_whole(number, lowest, highest=math.inf):
    return isinstance(number, int) and not isinstance(number, bool) and lowest <= number <= highest
