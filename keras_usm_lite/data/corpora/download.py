"""Downloads corpus archives, with a quick and clear failure where there is no network."""

import contextlib
import os
import socket
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile

import keras

_PROBE_SECONDS = 5
_READ_SECONDS = 60


class CorpusUnavailable(OSError):
    """A corpus cannot be downloaded; the message says why and what to do instead."""


def download(url, cache_dir):
    """Downloads an archive once and returns its path.

    A short request comes first, so that a machine without a network learns it within seconds. What is no archive, such
    as the login page of a network, is not kept. Processes that start together do not disturb each other.

    Args:
        url: Address of the archive.
        cache_dir: Folder that the file is kept in.

    Returns:
        Path of the downloaded file in `cache_dir`.

    Raises:
        CorpusUnavailable: If the server does not answer, refuses, or sends something else than a zip or tar file.

    Example:

    >>> import tempfile
    >>> download("http://127.0.0.1:9/corpus.zip", tempfile.mkdtemp())  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    CorpusUnavailable: Cannot download http://127.0.0.1:9/corpus.zip
    """
    name = os.path.basename(urllib.parse.urlsplit(url).path)
    path = os.path.join(cache_dir, name)
    if _is_archive(path):
        return path
    partial = f"{name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS).close()
        os.makedirs(cache_dir, exist_ok=True)
        with _socket_timeout(_READ_SECONDS):
            downloaded = keras.utils.get_file(
                partial, origin=url, cache_dir=cache_dir, cache_subdir="", force_download=True
            )
    except Exception as error:  # get_file raises a bare Exception where the server fails
        raise CorpusUnavailable(
            f"Cannot download {url} ({error}); fetch it elsewhere and pass its path as `source`."
        ) from error
    if not _is_archive(downloaded):
        os.remove(downloaded)
        raise CorpusUnavailable(
            f"Cannot download {url} (what the server sent is no zip or tar file, perhaps a login page); fetch it "
            "elsewhere and pass its path as `source`."
        )
    os.replace(downloaded, path)
    return path


def _is_archive(path):
    return os.path.isfile(path) and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


@contextlib.contextmanager
def _socket_timeout(seconds):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
