"""Claims about speechocean762, on a tiny copy of its layout."""

import shutil

import numpy as np
import pytest

from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.corpora.speechocean762 import DEV_SPEAKERS, build_speechocean762
from keras_usm_lite.data.manifest import read_manifest

SPEAKERS = {"train": 25, "test": 3}


def _make_corpus(root, speakers=SPEAKERS):
    number = 0
    for name, count in speakers.items():
        tables = {"wav.scp": [], "text": [], "utt2spk": []}
        for _ in range(count):
            number += 1
            speaker = f"{number:04d}"
            (root / "WAVE" / f"SPEAKER{speaker}").mkdir(parents=True)
            for take in range(2):
                key = f"{speaker}{take:05d}"
                wav = f"WAVE/SPEAKER{speaker}/{key}.WAV"
                write_wav(root / wav, np.zeros(1600))
                tables["wav.scp"].append(f"{key}\t{wav}")
                tables["text"].append(f"{key}\tWE CALL IT BEAR")
                tables["utt2spk"].append(f"{key} {speaker}")
        (root / name).mkdir()
        for table, lines in tables.items():
            (root / name / table).write_text("\n".join(lines) + "\n")
    return root


def _build(source, folder, **options):
    folder.mkdir()
    manifests = build_speechocean762(str(source), str(folder), **options)
    return {split: read_manifest(path) for split, path in manifests.items()}


def _speakers(rows):
    return {row.speaker for row in rows}


def test_20_training_speakers_become_the_development_set(tmp_path):
    splits = _build(_make_corpus(tmp_path / "speechocean762"), tmp_path / "out")
    assert {split: len(_speakers(rows)) for split, rows in splits.items()} == {
        "train": 5,
        "dev": 20,
        "test": 3,
    }
    assert len(_speakers(splits["train"]) | _speakers(splits["dev"]) | _speakers(splits["test"])) == 28
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 10, "dev": 40, "test": 6}


def test_the_seed_decides_the_development_speakers(tmp_path):
    source = _make_corpus(tmp_path / "speechocean762")
    first, again, other = (
        _speakers(_build(source, tmp_path / name, seed=seed)["dev"]) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_a_folder_is_used_in_place(tmp_path):
    _make_corpus(tmp_path / "around" / "speechocean762")
    row = _build(tmp_path / "around", tmp_path / "out")["test"][0]
    assert row.path.startswith(str(tmp_path / "around" / "speechocean762" / "WAVE"))
    assert (row.text, row.duration) == ("we call it bear", 0.1)
    assert not list((tmp_path / "out").rglob("*.WAV"))


def test_an_archive_is_unpacked_and_the_result_can_be_moved(tmp_path):
    _make_corpus(tmp_path / "content" / "speechocean762")
    archive = shutil.make_archive(str(tmp_path / "speechocean762"), "gztar", tmp_path / "content")
    _build(archive, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    for row in read_manifest(tmp_path / "moved" / "train.tsv"):
        assert row.path.startswith(str(tmp_path / "moved"))
        with open(row.path, "rb") as file:
            assert file.read(4) == b"RIFF"


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not speechocean762: it has no train/wav\.scp"):
        _build(tmp_path, tmp_path / "out")


def test_an_incomplete_corpus_is_refused(tmp_path):
    _make_corpus(tmp_path / "few", {"train": DEV_SPEAKERS, "test": 1})
    with pytest.raises(ValueError, match="20 training speakers"):
        _build(tmp_path / "few", tmp_path / "out")


def test_a_recording_without_a_transcript_is_named(tmp_path):
    root = _make_corpus(tmp_path / "speechocean762")
    text = (root / "test" / "text").read_text().splitlines()
    (root / "test" / "text").write_text("\n".join(text[1:]))
    with pytest.raises(ValueError, match=text[0].split()[0]):
        _build(root, tmp_path / "out")
