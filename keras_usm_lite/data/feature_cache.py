"""Features computed once, kept in one file, read back through a memory map."""

import contextlib
import copy
import glob
import json
import os
import time
import warnings
import zlib

import keras
import numpy as np

from keras_usm_lite.data.audio import AudioError, load_audio
from keras_usm_lite.data.manifest import replacing

ABANDONED = 3600  # seconds after which a temporary file belongs to no running build


class FeatureCache:
    """The features of a list of utterances, computed on first use and read from disk afterwards.

    The frames of all utterances lie one after the other in `path`, as raw little-endian numbers of type
    `dtype`; `path + ".json"` names the utterances in order, their frame counts, the key, the size and the
    CRC-32 checksum. If key, type, utterances (path and duration, size and time of the file) and checksum agree, the
    file is used as it is, otherwise it is built anew; a damaged file is reported with a warning first. Building
    streams to disk and the files get their names only when complete, so an interrupted build leaves nothing behind;
    what one left that was killed is removed by the next build of the same file.

    A recording that cannot be read, that `extract` refuses with an `AudioError`, or that is much shorter than its
    manifest says (cut off, or with a duration in another unit) has no frames and is listed in `problems`;
    `SpeechBatches` does not take it, see `select`. Each opening tries these recordings again, and builds the cache anew
    when one of them has been repaired.

    Args:
        utterances: List of `Utterance`.
        extract: Function from float32 audio `[n]` to features `[frames, bins]`, `frames >= 1`.
        path: Path of the data file; its folder is made if missing.
        key: String that names the feature settings. Change it whenever `extract` changes.
        sample_rate: Samples per second of the audio that `extract` takes.
        dtype: Stored type, "float16" or "float32".
        verbose: 1 shows a progress bar while building, 0 shows nothing.

    Attributes:
        num_frames: Frame counts of the utterances, int64 `[len(cache)]`; 0 where the recording is broken.
        problems: Dict from the positions of broken recordings to what is wrong with them.

    Raises:
        ValueError: No utterances, another `dtype`, or features of a wrong shape or not finite in `dtype`.
        OSError: The files cannot be written, for example because the disk is full.

    Example:
    >>> import os, tempfile
    >>> from keras_usm_lite.data.audio import write_wav
    >>> from keras_usm_lite.data.manifest import Utterance
    >>> folder = tempfile.mkdtemp()
    >>> write_wav(os.path.join(folder, "a.wav"), np.zeros(1600))
    >>> utterances = [Utterance(os.path.join(folder, "a.wav"), 0.1, "hm", "anna")]
    >>> extract = lambda audio: audio.reshape(-1, 160)
    >>> cache = FeatureCache(utterances, extract, os.path.join(folder, "cache.bin"), "raw-160", verbose=0)
    >>> len(cache), cache[0].shape, cache.num_frames.tolist()
    (1, (10, 160), [10])
    """

    def __init__(self, utterances, extract, path, key, sample_rate=16000, dtype="float16", verbose=1):
        if not utterances:
            raise ValueError("There are no utterances to cache features of; pass at least one.")
        if dtype not in ("float16", "float32"):
            raise ValueError(f'dtype is {dtype!r}; allowed are "float16" and "float32".')
        self._path = os.path.abspath(path)
        self._sample_rate = sample_rate
        self._settings = {
            "key": f"{key} at {sample_rate} Hz",
            "dtype": dtype,
            "utterances": [[u.path, float(u.duration), *_version(u.path)] for u in utterances],
        }
        index = self._open()
        if index is None or any(self._is_sound(utterances[k], extract) for k, _ in index["problems"]):
            index = self._build(utterances, extract, verbose)
        self.num_frames = np.array(index["num_frames"], dtype=np.int64)
        self._offsets = np.cumsum(self.num_frames) - self.num_frames
        self.problems = dict(index["problems"])
        shape, stored = (int(self.num_frames.sum()), index["bins"]), np.dtype(dtype).newbyteorder("<")
        # There is no memory map of an empty file.
        self._data = np.memmap(self._path, stored, mode="r", shape=shape) if shape[0] else np.empty(shape, stored)

    def __len__(self):
        return len(self.num_frames)

    def __getitem__(self, index):
        """Returns the features of one utterance, float32 `[frames, bins]`."""
        index = range(len(self))[index]
        start = self._offsets[index]
        return np.array(self._data[start : start + self.num_frames[index]], dtype=np.float32)

    def select(self, indices):
        """Returns the same cache with only some of its utterances, in the given order.

        Args:
            indices: Positions of the utterances, list of int.
        """
        chosen = copy.copy(self)
        chosen.num_frames, chosen._offsets = self.num_frames[indices], self._offsets[indices]
        chosen.problems = {new: self.problems[old] for new, old in enumerate(indices) if old in self.problems}
        return chosen

    @property
    def _index_path(self):
        return self._path + ".json"

    def _open(self):
        """Returns the index if the files hold what is asked for, otherwise None."""
        if not os.path.exists(self._index_path):
            return None
        try:
            with open(self._index_path, encoding="utf-8") as file:
                index = json.load(file)
            if any(index[name] != value for name, value in self._settings.items() if name != "utterances"):
                return None
            if not _same_recordings(index["utterances"], self._settings["utterances"]):
                return None
            size = os.path.getsize(self._path)
            wanted = sum(index["num_frames"]) * index["bins"] * np.dtype(index["dtype"]).itemsize
            if not size == wanted == index["size"]:
                raise ValueError(f"it has {size} bytes, its index asks for {wanted}")
            if file_crc32(self._path) != index["crc32"]:
                raise ValueError("the checksum does not agree")
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"The feature cache {self._path} is damaged and will be built anew: {error}", stacklevel=3)
            return None
        return index

    def _build(self, utterances, extract, verbose):
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            _remove_abandoned(self._path)
            # The index goes first and comes last: without it the data file counts for nothing.
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._index_path)
            with replacing(self._path) as temporary, open(temporary, "wb") as file:
                index = self._settings | self._write_features(file, utterances, extract, verbose)
            with replacing(self._index_path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                json.dump(index, file)
        except OSError as error:
            raise OSError(
                error.errno,
                f"Could not build the feature cache ({error.strerror or error}); "
                "free space or choose a writable folder",
                self._path,
            ) from error
        return index

    def _write_features(self, file, utterances, extract, verbose):
        progress = keras.utils.Progbar(len(utterances), verbose=verbose, unit_name="utterance", interval=2)
        num_frames, problems, bins, size, crc32 = [], [], 0, 0, 0
        for number, utterance in enumerate(utterances):
            try:
                features = self._extract(utterance, extract, bins)
            except AudioError as error:
                problems.append([number, str(error).removeprefix(f"{utterance.path}: ")])
                features = np.empty((0, bins))
            bins = features.shape[1]
            block = features.tobytes()
            file.write(block)
            num_frames.append(len(features))
            size += len(block)
            crc32 = zlib.crc32(block, crc32)
            progress.update(number + 1)
        return {"num_frames": num_frames, "problems": problems, "bins": bins, "size": size, "crc32": crc32}

    def _is_sound(self, utterance, extract):
        """True if a recording that was broken when the cache was built no longer is."""
        try:
            self._extract(utterance, extract, bins=0)
        except AudioError:
            return False
        return True

    def _extract(self, utterance, extract, bins):
        audio = load_audio(utterance.path, self._sample_rate)
        _check_length(utterance, len(audio) / self._sample_rate)
        features = np.asarray(extract(audio))
        if features.ndim != 2 or not features.size or features.shape[1] != (bins or features.shape[1]):
            raise ValueError(
                f"{utterance.path}: extract gave features of shape {features.shape}; "
                f"allowed is [frames >= 1, {bins or 'bins >= 1'}]. Correct extract or drop the utterance."
            )
        dtype = self._settings["dtype"]
        with np.errstate(over="ignore"):
            stored = features.astype(np.dtype(dtype).newbyteorder("<"))
        if not np.isfinite(stored).all():
            raise ValueError(
                f"{utterance.path}: the features are not finite as {dtype}; the largest magnitude is "
                f'{np.abs(features).max()}. Correct extract, or pass dtype="float32" if they are only large.'
            )
        return stored


def _check_length(utterance, seconds):
    """Raises for a recording that was cut off: what its text says is not in it."""
    if seconds < min(0.9 * utterance.duration, utterance.duration - 0.5):
        raise AudioError(
            f"{utterance.path}: it has {seconds:.2f} s, its duration_s is {utterance.duration:g}; copy it anew, or "
            "correct the manifest."
        )


def _remove_abandoned(path):
    """Removes temporary files of `path` that nobody has written to for an hour: their build was killed."""
    for name in glob.glob(f"{glob.escape(path)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(name) > ABANDONED:
                os.remove(name)


def _version(path):
    """What changes when somebody writes a file anew: its size and time."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _same_recordings(cached, wanted):
    """Whether all are those that were cached; of a file that is gone, only its name and duration can be compared."""
    return len(cached) == len(wanted) and all(old[: len(new)] == new for old, new in zip(cached, wanted, strict=True))


def file_crc32(path):
    """The CRC-32 checksum of a file's content."""
    crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc32 = zlib.crc32(block, crc32)
    return crc32
