"""Claims about the user's own manifests."""

import numpy as np
import pytest

from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.corpora.corpus import Corpus, write_corpus
from keras_usm_lite.data.corpora.manifest_folder import open_manifest_folder
from keras_usm_lite.data.manifest import ManifestError, Utterance, write_manifest


def _make_folder(folder, train_text="yes no"):
    wav = str(folder / "a.wav")
    write_wav(wav, np.zeros(1600))
    for split, text in (("train", train_text), ("dev", "no"), ("test", "yes")):
        write_manifest(folder / f"{split}.tsv", [Utterance(wav, 0.1, text, "anna")])
    return folder


def test_manifests_are_used_in_place(tmp_path):
    corpus = open_manifest_folder(_make_folder(tmp_path))
    assert corpus.splits == {split: str(tmp_path / f"{split}.tsv") for split in ("train", "dev", "test")}
    assert corpus.name == tmp_path.name and not corpus.synthetic
    assert "1 train" in corpus.description


@pytest.mark.parametrize(("words", "tokens"), [(200, "word"), (201, "char")])
def test_up_to_200_distinct_words_are_tokens(tmp_path, words, tokens):
    text = " ".join(f"w{i}" for i in range(words))
    assert open_manifest_folder(_make_folder(tmp_path, f"{text} {text}")).tokens == tokens


def test_a_missing_manifest_is_named(tmp_path):
    _make_folder(tmp_path)
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(ManifestError, match=r"no dev\.tsv"):
        open_manifest_folder(tmp_path)


def test_a_malformed_manifest_is_reported(tmp_path):
    _make_folder(tmp_path)
    (tmp_path / "test.tsv").write_text("path\ttext\n")
    with pytest.raises(ManifestError, match="duration_s"):
        open_manifest_folder(tmp_path)


@pytest.mark.filterwarnings("ignore:Left out")
def test_manifests_without_audio_are_reported(tmp_path):
    _make_folder(tmp_path)
    (tmp_path / "a.wav").unlink()
    with pytest.raises(ManifestError, match=r"train\.tsv: none of its utterances"):
        open_manifest_folder(tmp_path)


def test_a_prepared_corpus_keeps_its_description(tmp_path):
    _make_folder(tmp_path)
    corpus = Corpus("robots", {"train": str(tmp_path / "train.tsv")}, True, "made up", "char")
    write_corpus(tmp_path, corpus)
    assert open_manifest_folder(tmp_path) == corpus


@pytest.mark.parametrize("content", ['{"name": "of another program"}', "[]", "no JSON"])
def test_a_file_of_another_program_called_corpus_json_is_left_alone(tmp_path, content):
    _make_folder(tmp_path)
    (tmp_path / "corpus.json").write_text(content)
    assert open_manifest_folder(tmp_path).splits["train"] == str(tmp_path / "train.tsv")
