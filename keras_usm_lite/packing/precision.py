"""Scales and other float arrays in fewer bits than float32, each with the error it may cost."""

import ml_dtypes
import numpy as np

SCALES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SCALE_ERROR = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative
SCALE_RANGE = (2.0**-100, 2.0**100)  # no product of a scale and a code can leave float32
OTHERS = ("float32", "float16", "int8")
ROW_SCALE = ".row_scale"


def round_scale(scale, precision):
    """Return a scale in the given type, within `|rounded - scale| <= bound |scale|`.

    The bound is 0 for "float32", 2^-11 for "float16" and 2^-8 for "bfloat16": half a unit in the last place.

    Args:
        scale: float32 array of any shape.
        precision: "float32", "float16" or "bfloat16".

    Returns:
        Array of that type.

    Raises:
        ValueError: a scale that is not a usable number, or that the type cannot hold within the bound: float16 below
            2^-14 = 6.1e-5 and above 65504.

    Example:

    >>> float(round_scale(np.float32([0.1]), "float16")[0])
    0.0999755859375
    """
    check_scale(scale)
    with np.errstate(over="ignore"):
        rounded = scale.astype(SCALES[precision])
    error = np.abs(rounded.astype(np.float64) - scale)
    wrong = ~(error <= SCALE_ERROR[precision] * np.abs(scale.astype(np.float64)))
    if wrong.any():
        raise ValueError(
            f"scale {scale[wrong][0]:.3g} cannot be stored in {precision} with a relative error of at most "
            f"{SCALE_ERROR[precision]:.2g}. Choose scales='bfloat16' or 'float32'."
        )
    return rounded


def check_scale(scale):
    """Refuse a scale that is no number, zero, or so extreme that a product with a code leaves float32.

    Raises:
        ValueError: a scale whose magnitude is not within 2^-100 and 2^100.
    """
    size = np.abs(scale.astype(np.float64))
    wrong = ~((size >= SCALE_RANGE[0]) & (size <= SCALE_RANGE[1]))
    if wrong.any():
        raise ValueError(f"scale {scale[wrong][0]!s} is not a number of a magnitude between 2^-100 and 2^100.")


def stored_type(dtype, ndim, others, vectors=None):
    """Return the type in which an array is stored.

    Only float32 arrays are reduced. A vector is of the type `vectors`. Without that, it is float16 under "int8", as
    scalars always are: 8 bits would ruin a moving variance.

    Example:

    >>> stored_type("float32", 2, "int8"), stored_type("float32", 1, "int8"), stored_type("int32", 2, "float16")
    ('int8', 'float16', 'int32')
    >>> stored_type("float32", 1, "int8", vectors="int8"), stored_type("float32", 0, "int8", vectors="int8")
    ('int8', 'float16')
    """
    if dtype != "float32":
        return dtype
    if ndim == 1 and vectors:
        return vectors
    return "float16" if others == "int8" and ndim < 2 else others


def reduce(array, others, vectors=None):
    """Return the arrays that stand for one array at a chosen precision.

    * "float32": the array itself
    * "float16": rounded, `|error| <= max(2^-11 |w|, 2^-25)`
    * "int8": `round(w / s)` with one float32 `s = max|w| / 127` for each row, `|error| <= max|w| / 254`; an all-zero
      row has the scale 0. A row is what lies at one index of the first axis, or a whole vector

    Args:
        array: array of any type and shape; what `stored_type` leaves alone is returned as it is.
        others: "float32", "float16" or "int8".
        vectors: the same for an array of one axis; None: as `others`, but "float16" instead of "int8".

    Returns:
        `{"": array}`, or `{"": int8 codes, ".row_scale": float32 [rows]}`.

    Raises:
        ValueError: a value beyond 65504 where float16 is stored, or one that is not finite where int8 is.

    Example:

    >>> parts = reduce(np.float32([[1, -2], [0, 0]]), "int8")
    >>> parts[""].tolist(), parts[".row_scale"][1]
    ([[64, -127], [0, 0]], np.float32(0.0))
    """
    stored = stored_type(array.dtype.name, array.ndim, others, vectors)
    if stored == array.dtype.name:
        return {"": array}
    if stored == "float16":
        with np.errstate(over="ignore"):
            rounded = array.astype(np.float16)
        wrong = np.isfinite(array) & ~np.isfinite(rounded)
        if wrong.any():
            way_out = "vectors" if array.ndim == 1 and vectors else "others"
            raise ValueError(f"{array[wrong][0]:.6g} is beyond float16 (65504). Choose {way_out}='float32'.")
        return {"": rounded}
    if not np.isfinite(array).all():
        way_out = "vectors" if array.ndim == 1 else "others"
        raise ValueError(f"it holds values that are not finite, which int8 cannot. Choose {way_out}='float32'.")
    rows = array.reshape(1 if array.ndim == 1 else len(array), -1)
    scale = np.abs(rows).max(axis=1, initial=0) / np.float32(127)
    steps = np.where(scale == 0, np.float32(1), scale)  # 0 also for a row of subnormal numbers
    codes = np.clip(np.rint(rows / steps[:, None]), -127, 127).astype(np.int8)
    return {"": codes.reshape(array.shape), ROW_SCALE: scale}


def reduced_arrays(shape, dtype, stored):
    """Return `{suffix: (type, shape)}` of what `reduce` gives for an array of one type stored as another.

    Example:

    >>> reduced_arrays((3, 2), "float32", "int8")
    {'': ('int8', (3, 2)), '.row_scale': ('float32', (3,))}
    >>> reduced_arrays((3,), "float32", "int8")
    {'': ('int8', (3,)), '.row_scale': ('float32', (1,))}
    """
    arrays = {"": (stored, tuple(shape))}
    if stored == "int8" != dtype:
        arrays[ROW_SCALE] = ("float32", (1,) if len(shape) == 1 else tuple(shape[:1]))
    return arrays


def restore(arrays, dtype):
    """Return the array, in its own type, that `reduce` took apart.

    Raises:
        ValueError: a row scale that is not a number.
    """
    if ROW_SCALE not in arrays:
        return arrays[""].astype(dtype, copy=False)
    codes, scale = arrays[""], arrays[ROW_SCALE]
    if not np.isfinite(scale).all():
        raise ValueError("a row scale is not a number.")
    return codes.astype(np.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))
