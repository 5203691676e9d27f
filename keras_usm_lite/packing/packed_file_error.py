"""`PackedFileError`: why a packed file cannot be read."""


class PackedFileError(ValueError):
    """A packed file that is damaged, foreign, newer than this library, or does not fit its own description."""
