"""Connected Arabic command words, joined from the clips of the Arabic Speech Commands data set."""

import csv
import os
import shutil
from pathlib import Path, PurePosixPath

import keras
import numpy as np

from keras_usm_lite.data.audio import load_audio, write_wav
from keras_usm_lite.data.corpora.archive import as_folder
from keras_usm_lite.data.manifest import Utterance, write_manifest

URL = (
    "https://github.com/abdulkaderghandoura/arabic-speech-commands-dataset/archive/"
    "72f3438212ff6cf8fbe5ae8068361840646429bd.zip"
)
DESCRIPTION = (
    "connected Arabic command words, human speech (clips of Ghandoura, Hjabo and Al Dakkak, "
    "Engineering Applications of AI 2021, CC BY 4.0, joined into utterances)"
)
TABLES = {"train": "train.csv", "dev": "val.csv", "test": "test.csv"}
SAMPLE_RATE = 16000
FEWEST_WORDS, MOST_WORDS = 2, 6
_GATE_DB = 35.0
_FRAME, _MARGIN, _FADE = 160, 800, 80  # 10 ms, 50 ms and 5 ms
_NOISE_LEVEL = 1e-4  # -80 dBFS


def build_arabic_commands(source, folder, seed=0):
    """Joins the clips of the Arabic Speech Commands data set into connected utterances.

    The data set (https://github.com/abdulkaderghandoura/arabic-speech-commands-dataset) has 12,000 clips of
    one second: 40 command words, 30 speakers, 10 takes. `train.csv`, `val.csv` and `test.csv` assign whole
    speakers to splits. Each clip is trimmed and faded (see `trim`), the clips of one speaker are shuffled,
    and every 2 to 6 of them are joined with short gaps (see `join`). Every clip is used exactly once, which
    gives about 3,000 utterances and 3 hours. The words are real recordings, their order is not. Texts are the
    English names of the classes, one token per word ("zoom in" becomes `zoom_in`).

    Args:
        source: Folder or archive of the data set; the tables may lie anywhere in it.
        folder: Folder for the manifests and the WAV files.
        seed: Seed of the shuffle, the grouping and the gaps.

    Returns:
        Path of the manifest of each split.

    Raises:
        ValueError: If a table is missing, or names a clip that is not there.

    Example: `build_arabic_commands("arabic-speech-commands-dataset.zip", "/data/arabic_commands")`.
    """
    unpacked = os.path.join(folder, "unpacked")
    root = Path(as_folder(source, unpack_to=unpacked))
    tables = {split: _find_table(root, name) for split, name in TABLES.items()}
    wavs = _index_wavs(root)
    manifests = {}
    for number, (split, table) in enumerate(tables.items()):
        clips = read_table(table, wavs)
        rng = np.random.default_rng([seed, number])
        manifests[split] = os.path.join(folder, f"{split}.tsv")
        write_manifest(manifests[split], _join_split(clips, split, folder, rng))
    shutil.rmtree(unpacked, ignore_errors=True)
    return manifests


def read_table(table, wavs):
    """Reads a table of clips: a file and a class per row, columns in any order, with or without a header.

    Args:
        table: Path of the CSV file.
        wavs: All WAV files of the data set, as a dict from file name to paths, for the files that are not
            found relative to the table.

    Returns:
        List of `(path, word)`.
    """
    clips = []
    with open(table, encoding="utf-8-sig", newline="") as file:
        for row in csv.reader(file):
            cells = [cell.strip() for cell in row]
            names = [cell for cell in cells if cell.lower().endswith(".wav")]
            if not names:  # the header, or an empty line
                continue
            path = _find_clip(names[0].replace("\\", "/"), cells, Path(table), wavs)
            # A cell with a number is the row index that some tools write.
            labels = [cell for cell in cells if cell and cell not in names and not cell.isdigit()]
            word = labels[0] if labels else path.parent.name
            clips.append((path, "_".join(word.lower().split())))
    if not clips:
        raise ValueError(f"{table} names no WAV files; restore it from the data set.")
    return clips


def trim(audio):
    """Cuts the silence around a word and fades both ends.

    The word reaches from the first to the last 10 ms frame whose power is at most 35 dB below that of the
    loudest frame. 50 ms are kept before and after it, then 5 ms are faded in and out linearly.

    Args:
        audio: float32 `[n]` at 16 kHz.

    Returns:
        float32 `[m]` with `m <= n`.

    Example:

    >>> audio = np.zeros(16000, np.float32)
    >>> audio[8000:9600] = 0.5
    >>> len(trim(audio)) / 16000  # 100 ms of word and 50 ms on both sides
    0.2
    """
    count = max(len(audio) // _FRAME, 1)
    power = np.mean(np.square(audio[: count * _FRAME].reshape(count, -1)), axis=1)
    loud = np.flatnonzero(power >= power.max() * 10 ** (-_GATE_DB / 10))
    start = max(loud[0] * _FRAME - _MARGIN, 0)
    trimmed = audio[start : (loud[-1] + 1) * _FRAME + _MARGIN].copy()
    fade = np.linspace(0.0, 1.0, _FADE, dtype=np.float32)[: len(trimmed)]
    trimmed[: len(fade)] *= fade
    trimmed[len(trimmed) - len(fade) :] *= fade[::-1]
    return trimmed


def join(clips, rng):
    """Joins clips with gaps of 0 to 0.12 s, and 0.08 to 0.2 s at both ends, of noise at -80 dBFS.

    Args:
        clips: List of float32 arrays at 16 kHz.
        rng: `numpy.random.Generator`.

    Returns:
        float32 array of all clips in their order.

    Example:

    >>> clips = [np.ones(1600, np.float32)] * 3
    >>> 0.46 <= len(join(clips, np.random.default_rng(0))) / 16000 <= 0.94
    True
    """
    gaps = [
        rng.uniform(0.08, 0.2),
        *rng.uniform(0.0, 0.12, len(clips) - 1),
        rng.uniform(0.08, 0.2),
    ]
    pieces = [rng.normal(0.0, _NOISE_LEVEL, round(gap * SAMPLE_RATE)) for gap in gaps]
    joined = [pieces[0]]
    for clip, gap in zip(clips, pieces[1:], strict=True):
        joined += [clip, gap]
    return np.concatenate(joined).astype(np.float32)


def draw_group_sizes(total, rng):
    """Cuts `total` clips into groups of 2 to 6 (a single clip stays alone).

    Example:

    >>> sizes = draw_group_sizes(100, np.random.default_rng(0))
    >>> sum(sizes), min(sizes) >= 2, max(sizes) <= 6
    (100, True, True)
    """
    sizes = []
    while total > MOST_WORDS:
        size = int(rng.integers(FEWEST_WORDS, MOST_WORDS + 1))
        if total - size == 1:
            size -= 1  # leaves two for the last group
        sizes.append(size)
        total -= size
    return [*sizes, total]


def _join_split(clips, split, folder, rng):
    speakers = {}
    for path, word in clips:
        speakers.setdefault(path.stem.split("_NO_")[0], []).append((path, word))
    os.makedirs(os.path.join(folder, "audio", split))
    print(f"arabic_commands: joining {len(clips)} clips for {split}")
    bar = keras.utils.Progbar(len(clips), unit_name="clip", interval=1)
    utterances = []
    for speaker, takes in sorted(speakers.items()):
        order = [takes[i] for i in rng.permutation(len(takes))]
        for number, size in enumerate(draw_group_sizes(len(order), rng)):
            group, order = order[:size], order[size:]
            audio = join([trim(load_audio(path, SAMPLE_RATE)) for path, _ in group], rng)
            target = os.path.join(folder, "audio", split, f"{speaker}-{number:04d}.wav")
            write_wav(target, audio, SAMPLE_RATE)
            text = " ".join(word for _, word in group)
            utterances.append(Utterance(target, len(audio) / SAMPLE_RATE, text, speaker))
            bar.add(size)
    return utterances


def _find_table(root, name):
    found = sorted(root.rglob(name), key=lambda path: len(path.parts))
    if not found:
        raise ValueError(
            f"{str(root)!r} has no {name} anywhere; give the folder or archive of the Arabic Speech Commands "
            "data set (https://github.com/abdulkaderghandoura/arabic-speech-commands-dataset)."
        )
    return found[0]


def _index_wavs(root):
    wavs = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() == ".wav":
            wavs.setdefault(path.name, []).append(path)
    return wavs


def _find_clip(name, cells, table, wavs):
    """Returns the path of a clip: relative to the table, else the one file in the same folder of a word."""
    direct = table.parent / name
    if direct.is_file():
        return direct
    ending = PurePosixPath(name).parts[-2:]
    candidates = [path for path in wavs.get(ending[-1], ()) if path.parts[-len(ending) :] == ending]
    if len(candidates) > 1:  # a bare file name, which every word has: the class tells them apart
        candidates = [path for path in candidates if path.parent.name in cells]
    if len(candidates) != 1:
        raise ValueError(f"{table}: {len(candidates)} files match the clip {name!r}; restore the data set.")
    return candidates[0]
