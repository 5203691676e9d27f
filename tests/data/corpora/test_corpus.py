"""Claims about the description that is stored with a corpus."""

import dataclasses

import pytest

from keras_usm_lite.data.corpora.corpus import Corpus, read_corpus, read_provenance, write_corpus


def test_a_corpus_is_read_as_it_was_written(tmp_path):
    corpus = Corpus("mine", {"train": str(tmp_path / "train.tsv")}, True, "what it is", "char")
    write_corpus(tmp_path, corpus, source="/data", options={"seed": 3})
    assert read_corpus(tmp_path) == corpus
    assert read_provenance(tmp_path) == {"source": "/data", "options": {"seed": 3}}


def test_the_folder_can_be_moved(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    write_corpus(before, Corpus("mine", {"train": str(before / "train.tsv")}, False, "", "word"))
    before.rename(after)
    assert read_corpus(after).splits == {"train": str(after / "train.tsv")}


def test_a_corpus_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Corpus("mine", {}, False, "", "word").name = "yours"


def test_the_fingerprint_is_that_of_the_rows_wherever_they_lie(tmp_path):
    def fingerprint(folder, **splits):
        (tmp_path / folder).mkdir()
        for split, rows in splits.items():
            (tmp_path / folder / f"{split}.tsv").write_text(rows)
        return Corpus("c", {s: str(tmp_path / folder / f"{s}.tsv") for s in splits}, False, "", "word").fingerprint()

    known = fingerprint("a", train="1", test="2")
    assert fingerprint("b", test="2", train="1") == known
    assert known not in (fingerprint("c", train="2", test="1"), fingerprint("d", train="1", test="3"))
