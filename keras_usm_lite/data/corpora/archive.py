"""Turns what the user has, a folder or an archive of it, into a folder."""

import gzip
import os
import tarfile
import zipfile
import zlib


def as_folder(source, unpack_to):
    """Returns `source` itself if it is a folder, else unpacks the archive and returns `unpack_to`.

    Args:
        source: Path of a folder, or of a `.zip`, `.tar` or `.tar.gz` file.
        unpack_to: Folder for the contents of an archive.

    Raises:
        FileNotFoundError: If `source` does not exist.
        ValueError: If `source` is a file of another kind, or damaged.

    Example:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> as_folder(folder, unpack_to="/not/used") == folder
    True
    """
    if os.path.isdir(source):
        return source
    if not os.path.exists(source):
        raise FileNotFoundError(f"There is no folder or archive {source!r}; give the path of an existing one.")
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                archive.extractall(unpack_to)
        else:
            with tarfile.open(source) as archive:
                archive.extractall(unpack_to, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{source!r} cannot be unpacked ({error}); give a folder or an intact .zip, .tar or .tar.gz file."
        ) from error
    return unpack_to
