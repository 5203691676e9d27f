"""`PackedVariable`: what a packed file says about a variable that is no part of a compressed kernel."""

import dataclasses
import math

from keras_usm_lite.packing.precision import reduced_arrays

# Names of the types in safetensors.
TYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
MAX_AXES = 32  # of a variable; a shape of millions of axes would take minutes to multiply


@dataclasses.dataclass(frozen=True)
class PackedVariable:
    """The description of one variable in the header of a packed file. Every field is checked on construction.

    Attributes:
        name: name of its array.
        shape: shape of the variable.
        dtype: type of the variable.
        stored: type of the array; another one than `dtype` only for float32 stored in "float16" or "int8".

    Raises:
        ValueError: a field that cannot be.
    """

    name: str
    shape: tuple
    dtype: str
    stored: str

    def __post_init__(self):
        axes = isinstance(self.shape, (tuple, list)) and len(self.shape) <= MAX_AXES
        whole = axes and all(type(size) is int and 0 <= size < 2**63 for size in self.shape)
        if not whole or not isinstance(self.name, str):
            raise ValueError(f"variable {self.name!r} cannot have the shape {self.shape!r}.")
        object.__setattr__(self, "shape", tuple(self.shape))
        reduced = self.dtype == "float32" and (self.stored == "float16" or self.stored == "int8" and self.shape)
        if self.dtype not in TYPES or not (self.stored == self.dtype or reduced):
            raise ValueError(f"variable {self.name!r} cannot have dtype={self.dtype!r} and stored={self.stored!r}.")

    @property
    def elements(self):
        """Number of elements."""
        return math.prod(self.shape)

    def arrays(self):
        """Return `{suffix of the name: (type, shape)}` of the arrays that stand for the variable."""
        return reduced_arrays(self.shape, self.dtype, self.stored)
