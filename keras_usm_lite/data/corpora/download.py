"""Downloads corpus archives, with a quick and clear failure where there is no network."""

import contextlib
import os
import socket
import urllib.error
import urllib.parse
import urllib.request

import keras

_PROBE_SECONDS = 5
_READ_SECONDS = 60


class CorpusUnavailable(OSError):
    """A corpus cannot be downloaded; the message says why and what to do instead."""


def download(url, cache_dir):
    """Downloads an archive once and returns its path.

    A short request comes first, so that a machine without a network learns it within seconds.

    Args:
        url: Address of the archive.
        cache_dir: Folder that the file is kept in.

    Returns:
        Path of the downloaded file in `cache_dir`.

    Raises:
        CorpusUnavailable: If the server does not answer or refuses.

    Example:

    >>> import tempfile
    >>> download("http://127.0.0.1:9/corpus.zip", tempfile.mkdtemp())  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    CorpusUnavailable: Cannot download http://127.0.0.1:9/corpus.zip
    """
    name = os.path.basename(urllib.parse.urlsplit(url).path)
    path = os.path.join(cache_dir, name)
    if os.path.exists(path):
        return path
    partial = f"{name}.partial"
    try:
        with _socket_timeout(_PROBE_SECONDS):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD")).close()
        os.makedirs(cache_dir, exist_ok=True)
        with _socket_timeout(_READ_SECONDS):
            downloaded = keras.utils.get_file(
                partial, origin=url, cache_dir=cache_dir, cache_subdir="", force_download=True
            )
    except Exception as error:  # get_file raises a bare Exception where the server fails
        raise CorpusUnavailable(
            f"Cannot download {url} ({error}); fetch it elsewhere and pass its path as `source`."
        ) from error
    os.replace(downloaded, path)
    return path


@contextlib.contextmanager
def _socket_timeout(seconds):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
