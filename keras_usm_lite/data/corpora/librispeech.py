"""LibriSpeech: read English, in the folder layout of its archives."""

import os
from pathlib import Path

import keras

from keras_usm_lite.data.corpora.archive import as_folder
from keras_usm_lite.data.manifest import Utterance, write_manifest

DESCRIPTION = "LibriSpeech, read English audiobooks (Panayotov et al., ICASSP 2015; OpenSLR 12; CC BY 4.0)"


def build_librispeech(source, folder):
    """Writes the manifests of LibriSpeech into `folder`.

    Download the archives that you want from https://www.openslr.org/12 (for a start `train-clean-100`,
    `dev-clean` and `test-clean`) and unpack them side by side; each makes folders
    `LibriSpeech/<subset>/<speaker>/<chapter>/` with FLAC files and a `*.trans.txt`. The audio stays where it
    is.

    `train` holds all subsets `train-*`, `dev` is `dev-clean` and `test` is `test-clean` (without these: all
    of `dev-*`, `test-*`). The other subsets become splits of their own, such as `dev-other`. Texts are
    lower-cased.

    Args:
        source: The folder `LibriSpeech`, the folder around it, or one archive of it.
        folder: Folder for the manifests.

    Returns:
        Path of the manifest of each split.

    Raises:
        ValueError: If there are no subsets for training, development or testing.

    Example: `build_librispeech("/data/LibriSpeech", "/data/manifests")`.
    """
    root = Path(as_folder(source, unpack_to=os.path.join(folder, "source")))
    splits = _assign_subsets(_find_subsets(root), root)
    manifests = {}
    for split, subsets in splits.items():
        manifests[split] = os.path.join(folder, f"{split}.tsv")
        write_manifest(manifests[split], _read_subsets(subsets, split))
    return manifests


def _find_subsets(root):
    inner = root / "LibriSpeech"
    base = inner if inner.is_dir() else root
    kinds = ("train-", "dev-", "test-")
    return {path.name: path for path in sorted(base.iterdir()) if path.is_dir() and path.name.startswith(kinds)}


def _assign_subsets(subsets, root):
    splits = {"train": [path for name, path in subsets.items() if name.startswith("train-")]}
    for split in ("dev", "test"):
        names = [name for name in subsets if name.startswith(f"{split}-")]
        chosen = [name for name in names if name == f"{split}-clean"] or names
        splits[split] = [subsets[name] for name in chosen]
        splits |= {name: [subsets[name]] for name in names if name not in chosen}
    missing = [split for split in ("train", "dev", "test") if not splits[split]]
    if missing:
        raise ValueError(
            f"{str(root)!r} has no subset {', '.join(f'{split}-*' for split in missing)} (found: "
            f"{', '.join(subsets) or 'none'}); unpack it from https://www.openslr.org/12 beside the others."
        )
    return splits


def _read_subsets(subsets, split):
    import soundfile

    transcripts = [path for subset in subsets for path in sorted(subset.glob("*/*/*.trans.txt"))]
    print(f"librispeech: reading {len(transcripts)} chapters for {split}")
    bar = keras.utils.Progbar(len(transcripts), unit_name="chapter", interval=1)
    utterances = []
    for transcript in transcripts:
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            path = transcript.parent / f"{name}.flac"
            duration = soundfile.info(path).duration
            utterances.append(Utterance(str(path), duration, text.lower(), name.split("-")[0]))
        bar.add(1)
    return utterances
