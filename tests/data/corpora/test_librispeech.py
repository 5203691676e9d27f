"""Claims about LibriSpeech, on a tiny copy of its layout."""

import numpy as np
import pytest
import soundfile

from keras_usm_lite.data.corpora.librispeech import build_librispeech
from keras_usm_lite.data.manifest import read_manifest

SUBSETS = ("train-clean-100", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other")


def _make_corpus(root, subsets):
    for number, subset in enumerate(subsets):
        speaker, chapter = str(100 + number), "7"
        folder = root / subset / speaker / chapter
        folder.mkdir(parents=True)
        lines = []
        for i in range(2):
            name = f"{speaker}-{chapter}-{i:04d}"
            soundfile.write(folder / f"{name}.flac", np.zeros(1600 * (i + 1)), 16000)
            lines.append(f"{name} IT'S {subset.upper()} {i}")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def build(tmp_path):
    def build(subsets, inner="LibriSpeech"):
        _make_corpus(tmp_path / "source" / inner, subsets)
        (tmp_path / "out").mkdir()
        manifests = build_librispeech(str(tmp_path / "source"), str(tmp_path / "out"))
        return {split: read_manifest(path) for split, path in manifests.items()}

    return build


@pytest.mark.parametrize("inner", ["LibriSpeech", "."])
def test_subsets_become_splits(build, inner):
    splits = build(SUBSETS, inner)
    speakers = {split: sorted({row.speaker for row in rows}) for split, rows in splits.items()}
    assert speakers == {
        "train": ["100", "101"],
        "dev": ["102"],
        "dev-other": ["103"],
        "test": ["104"],
        "test-other": ["105"],
    }


def test_audio_is_used_in_place_with_its_duration_and_lower_case_text(build, tmp_path):
    first, second = build(SUBSETS)["dev"]
    assert first.path == str(tmp_path / "source/LibriSpeech/dev-clean/102/7/102-7-0000.flac")
    assert (first.duration, second.duration) == (0.1, 0.2)
    assert first.text == "it's dev-clean 0"
    assert not list((tmp_path / "out").rglob("*.flac"))


def test_other_subsets_stand_in_for_missing_clean_ones(build):
    splits = build(["train-clean-5", "dev-clean-2", "test-other"])
    assert sorted(splits) == ["dev", "test", "train"]


def test_a_missing_subset_is_named_with_those_found(build):
    with pytest.raises(ValueError, match=r"no subset dev-\*, test-\* \(found: train-clean-100\)"):
        build(["train-clean-100"])
