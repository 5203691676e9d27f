"""`NamedArrays`: the arrays of a file of version 2, each under its own name."""

from keras_usm_lite.packing.array_demand import check_expansion, checksum
from keras_usm_lite.packing.packed_file_error import PackedFileError
from keras_usm_lite.packing.packed_variable import TYPES


class NamedArrays:
    """Every array is a tensor of the container; one is copied out of the file when it is asked for.

    Args:
        file: an open safetensors file.
        names: of its tensors, without the description.
        demands: `{name: ArrayDemand}` of all arrays that must be there.
        description: the parts of the file's description.

    Raises:
        PackedFileError, ValueError, TypeError: names, types, shapes or checksums are not those that are demanded.
    """

    PARTS = ("crc32",)  # of the description, beside those of every file

    def __init__(self, file, names, demands, description):
        self._file = file
        if set(names) != set(demands):
            missing, extra = sorted(set(demands) - set(names)), sorted(set(names) - set(demands))
            raise PackedFileError(f"arrays are missing: {missing[:5]}; arrays that nothing describes: {extra[:5]}.")
        for name, crc in zip(sorted(names), description["crc32"], strict=True):
            self._check_type(name, demands[name])
            if checksum(self[name]) != crc:
                raise PackedFileError(f"the array {name!r} is damaged (checksum mismatch).")

    def __getitem__(self, name):
        return self._file.get_tensor(name)

    def _check_type(self, name, demand):
        view = self._file.get_slice(name)
        found, size = view.get_dtype(), tuple(view.get_shape())
        if found != TYPES[demand.dtype] or (size != demand.shape if demand.shape is not None else len(size) != 1):
            raise PackedFileError(
                f"the array {name!r} has type {found} and shape {size}, expected {TYPES[demand.dtype]} and "
                f"{'one axis' if demand.shape is None else demand.shape}."
            )
        if demand.shape is None:
            check_expansion(name, size[0], demand.plain_size)
