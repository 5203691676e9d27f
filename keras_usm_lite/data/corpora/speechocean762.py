"""speechocean762: English sentences read by Mandarin speakers, half of them children."""

import os
from pathlib import Path

import keras
import numpy as np

from keras_usm_lite.data.corpora.archive import as_folder
from keras_usm_lite.data.manifest import Utterance, write_manifest

URL = "https://www.openslr.org/resources/101/speechocean762.tar.gz"
DESCRIPTION = "speechocean762, non-native read English (Zhang et al., Interspeech 2021; OpenSLR 101; free use)"
DEV_SPEAKERS = 20


def build_speechocean762(source, folder, seed=762):
    """Writes the manifests of speechocean762 into `folder`.

    The corpus has a training and a test set of 2,500 sentences and 125 speakers each, in Kaldi's layout:
    `{train,test}/{wav.scp,text,utt2spk}` and `WAVE/SPEAKERxxxx/*.WAV`. The sentences of 20 training speakers,
    drawn with `seed`, become the development set, so that no speaker is in two splits. Texts are lower-cased.
    The audio of a folder is used in place; an archive is unpacked into `folder`.

    Args:
        source: The folder `speechocean762`, the folder around it, or its archive from
            https://www.openslr.org/101.
        folder: Folder for the manifests.
        seed: Seed that draws the development speakers.

    Returns:
        Path of the manifest of each split.

    Raises:
        ValueError: If `source` has another layout.

    Example: `build_speechocean762("/data/speechocean762", "/data/manifests")`.
    """
    root = _find_root(Path(as_folder(source, unpack_to=os.path.join(folder, "source"))))
    training = _read_set(root, "train")
    speakers = sorted({utterance.speaker for utterance in training})
    if len(speakers) <= DEV_SPEAKERS:
        raise ValueError(
            f"{str(root)!r} has {len(speakers)} training speakers, and {DEV_SPEAKERS} are needed for the "
            "development set alone; use the complete corpus."
        )
    dev = set(np.random.default_rng(seed).permutation(speakers)[:DEV_SPEAKERS].tolist())
    splits = {
        "train": [utterance for utterance in training if utterance.speaker not in dev],
        "dev": [utterance for utterance in training if utterance.speaker in dev],
        "test": _read_set(root, "test"),
    }
    manifests = {split: os.path.join(folder, f"{split}.tsv") for split in splits}
    for split, utterances in splits.items():
        write_manifest(manifests[split], utterances)
    return manifests


def _find_root(folder):
    for root in (folder, folder / "speechocean762"):
        if (root / "train" / "wav.scp").exists() and (root / "test" / "wav.scp").exists():
            return root
    raise ValueError(
        f"{str(folder)!r} is not speechocean762: it has no train/wav.scp and test/wav.scp. Give the folder "
        "of the unpacked archive from https://www.openslr.org/101."
    )


def _read_set(root, name):
    import soundfile

    paths, texts, speakers = (_read_table(root / name / table) for table in ("wav.scp", "text", "utt2spk"))
    print(f"speechocean762: reading {len(paths)} recordings of the {name} set")
    bar = keras.utils.Progbar(len(paths), unit_name="recording", interval=1)
    utterances = []
    for key, relative in paths.items():
        if key not in texts or key not in speakers:
            raise ValueError(f"Recording {key!r} of {root / name} is missing in text or utt2spk; restore the files.")
        path = root / relative
        duration = soundfile.info(path).duration
        utterances.append(Utterance(str(path), duration, texts[key].lower(), speakers[key]))
        bar.add(1)
    return utterances


def _read_table(path):
    """Reads a Kaldi table: a key, white space and a value on each line."""
    rows = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row[0]: row[1].strip() if len(row) > 1 else "" for row in rows}
