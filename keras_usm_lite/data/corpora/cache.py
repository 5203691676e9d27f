"""Where prepared corpora and downloads are kept, and how folders are written all or nothing."""

import contextlib
import glob
import os
import shutil
import tempfile
import time

ABANDONED = 3600  # seconds after which a temporary folder belongs to no running process


def cache_home(cache_dir=None):
    """Returns the cache folder: `cache_dir`, else `$KERAS_USM_LITE_HOME`, else `~/.cache/keras_usm_lite`.

    Example:

    >>> import os
    >>> cache_home("/data/cache") == os.path.abspath("/data/cache")
    True
    """
    chosen = cache_dir or os.environ.get("KERAS_USM_LITE_HOME") or "~/.cache/keras_usm_lite"
    return os.path.abspath(os.path.expanduser(os.fspath(chosen)))


@contextlib.contextmanager
def replacing_folder(folder):
    """Yields a new temporary folder that becomes `folder` when the block succeeds and vanishes when it fails.

    What a process that was killed left of it is removed by the next that writes the same folder an hour later.

    Args:
        folder: The folder to write; one that exists already is replaced.

    Example:

    >>> import os, tempfile
    >>> folder = os.path.join(tempfile.mkdtemp(), "corpus")
    >>> with replacing_folder(folder) as temporary:
    ...     open(os.path.join(temporary, "train.tsv"), "w").close()
    ...     os.path.exists(folder)
    False
    >>> os.listdir(folder)
    ['train.tsv']
    """
    parent, name = os.path.split(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    _remove_abandoned(os.path.join(parent, f".{name}-"))
    temporary = tempfile.mkdtemp(prefix=f".{name}-", suffix=".partial", dir=parent)
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        if os.path.exists(folder):
            # A folder cannot be renamed onto a full one, so the old one steps aside into the new one's name.
            old = tempfile.mkdtemp(prefix=f".{name}-", suffix=".old", dir=parent)
            aside = os.path.join(old, name)
            try:
                os.replace(folder, aside)
                os.replace(temporary, folder)
            except BaseException:
                if os.path.exists(aside):
                    os.replace(aside, folder)
                os.rmdir(old)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_abandoned(prefix):
    """Removes temporary folders in which nobody has written for an hour: their process was killed."""
    for folder in glob.glob(f"{glob.escape(prefix)}*.partial"):
        with contextlib.suppress(OSError):
            inside = [os.path.join(path, name) for path, _, names in os.walk(folder) for name in (".", *names)]
            if time.time() - max(map(os.path.getmtime, inside)) > ABANDONED:
                shutil.rmtree(folder)
