"""Claims about preparing, opening and choosing corpora."""

import json
import os
import urllib.request

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader")

from keras_usm_lite.data import synthetic
from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.corpora import (
    Corpus,
    CorpusUnavailable,
    default_corpus,
    open_corpus,
    prepare_corpus,
)
from keras_usm_lite.data.corpora import arabic_commands as arabic_recipe
from keras_usm_lite.data.manifest import Utterance, read_manifest, write_manifest

TINY = {"sizes": (3, 1, 1)}


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Keeps the cache in `tmp_path` and the network away: requests go to a proxy that is not there."""
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERAS_USM_LITE_DATA", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the proxies of its first request


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    write_wav(folder / "a.wav", np.zeros(1600))
    for split in ("train", "dev", "test"):
        write_manifest(folder / f"{split}.tsv", [Utterance(str(folder / "a.wav"), 0.1, "yes", "anna")])
    return folder


@pytest.fixture
def arabic(tmp_path):
    """The smallest Arabic Speech Commands: one speaker per split, one word, two takes."""
    root = tmp_path / "arabic"
    (root / "stop").mkdir(parents=True)
    for number, table in enumerate(("train", "val", "test")):
        names = [f"stop/0000000{number}_NO_0{take}.wav" for take in (1, 2)]
        for name in names:
            write_wav(root / name, np.sin(np.arange(1600.0)))
        (root / f"{table}.csv").write_text("".join(f"{name},stop\n" for name in names))
    return root


@pytest.fixture
def librispeech(tmp_path):
    """The smallest LibriSpeech: one sentence per subset."""
    root = tmp_path / "LibriSpeech"
    for number, subset in enumerate(("train-clean-100", "dev-clean", "test-clean")):
        chapter = root / subset / str(number) / "1"
        chapter.mkdir(parents=True)
        soundfile.write(chapter / f"{number}-1-0000.flac", np.zeros(1600), 16000)
        (chapter / f"{number}-1.trans.txt").write_text(f"{number}-1-0000 YES\n")
    return root


def test_a_prepared_corpus_has_manifests_with_audio_in_the_cache(tmp_path):
    manifests = prepare_corpus("synthetic_commands", **TINY)
    assert list(manifests) == ["train", "dev", "test"]
    for path in manifests.values():
        for row in read_manifest(path):
            assert row.path.startswith(str(tmp_path / "home")) and os.path.getsize(row.path) > 1000


def test_a_finished_corpus_is_used_again():
    manifests = prepare_corpus("synthetic_commands", **TINY)
    stamps = [os.stat(path).st_mtime_ns for path in manifests.values()]
    assert prepare_corpus("synthetic_commands", **TINY) == manifests
    assert [os.stat(path).st_mtime_ns for path in manifests.values()] == stamps


def test_an_interrupted_preparation_is_not_mistaken_for_a_finished_one(tmp_path, arabic):
    (arabic / "test.csv").write_text("nowhere.wav,stop\n")  # fails after train and dev are written
    with pytest.raises(ValueError, match=r"nowhere\.wav"):
        prepare_corpus("arabic_commands", arabic)
    assert os.listdir(tmp_path / "home" / "corpora") == []
    with pytest.raises(CorpusUnavailable):
        prepare_corpus("arabic_commands")


def test_corpora_with_different_options_live_side_by_side():
    one = prepare_corpus("synthetic_commands", **TINY)
    other = prepare_corpus("synthetic_commands", **TINY, snr=(0.0, 1.0))
    assert one != other and prepare_corpus("synthetic_commands", **TINY) == one


def test_a_corpus_made_with_other_defaults_is_made_again(arabic):
    """As when a newer version of the library has another default."""
    path = prepare_corpus("arabic_commands", arabic)["train"]
    info = os.path.join(os.path.dirname(path), "corpus.json")
    with open(info) as file:
        content = json.load(file)
    content["provenance"]["options"]["seed"] = 12345
    with open(info, "w") as file:
        json.dump(content, file)
    prepare_corpus("arabic_commands", arabic)
    with open(info) as file:
        assert json.load(file)["provenance"]["options"]["seed"] == 0


def test_a_corpus_from_another_source_is_made_again_and_without_a_source_used_again(tmp_path, arabic):
    prepare_corpus("arabic_commands", arabic)
    moved = arabic.rename(tmp_path / "moved")
    again = prepare_corpus("arabic_commands", moved)
    stamp = os.stat(again["train"]).st_mtime_ns
    assert prepare_corpus("arabic_commands") == again
    assert os.stat(again["train"]).st_mtime_ns == stamp


def test_the_cache_folder_can_be_chosen(tmp_path):
    manifests = prepare_corpus("synthetic_commands", cache_dir=tmp_path / "chosen", **TINY)
    assert manifests["train"].startswith(str(tmp_path / "chosen"))


@pytest.mark.parametrize(
    ("name", "options", "error", "complaint"),
    [
        ("nothing", {}, ValueError, "Unknown corpus 'nothing'; choose one of arabic_commands"),
        ("synthetic_commands", {"noise": 1}, TypeError, "no option noise; it has sizes, snr, seed"),
        ("synthetic_commands", {"source": "x"}, ValueError, "takes no source"),
        ("librispeech", {}, ValueError, "pass its folder as `source`"),
        ("manifest", {}, ValueError, "takes a `source`"),
        ("speechocean762", {"source": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ("speechocean762", {}, CorpusUnavailable, "speechocean762.tar.gz"),
    ],
)
def test_what_cannot_be_prepared_is_refused_with_a_reason(name, options, error, complaint):
    with pytest.raises(error, match=complaint):
        prepare_corpus(name, **options)


def test_own_manifests_are_used_in_place(own):
    assert prepare_corpus("manifest", own)["dev"] == str(own / "dev.tsv")
    assert open_corpus(own).splits == prepare_corpus("manifest", own)


def test_a_prepared_folder_can_be_opened_by_its_path():
    folder = os.path.dirname(prepare_corpus("synthetic_commands", **TINY)["train"])
    corpus = open_corpus(folder)
    assert isinstance(corpus, Corpus) and corpus.name == "synthetic_commands"
    assert corpus.synthetic and corpus.tokens == "word"


def test_neither_a_folder_nor_a_name_is_refused():
    with pytest.raises(ValueError, match="'/nowhere' is neither a folder nor one of"):
        open_corpus("/nowhere")


def test_the_default_is_what_the_environment_names(own, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_USM_LITE_DATA", str(own))
    assert default_corpus().splits["train"] == str(own / "train.tsv")
    assert "Corpus: own (given by KERAS_USM_LITE_DATA)" in capsys.readouterr().out


def test_the_default_is_the_human_speech_prepared_last_whatever_its_name_and_options(arabic, librispeech, capsys):
    prepared = {
        "seeded": prepare_corpus("arabic_commands", arabic, seed=7),
        "librispeech": prepare_corpus("librispeech", librispeech),
        "synthetic": prepare_corpus("synthetic_commands", **TINY),
    }
    folders = {name: os.path.dirname(manifests["train"]) for name, manifests in prepared.items()}
    for latest, earlier in (("seeded", "librispeech"), ("librispeech", "seeded")):
        for time, name in enumerate((earlier, latest, "synthetic")):
            os.utime(os.path.join(folders[name], "corpus.json"), (time, time))
        capsys.readouterr()
        assert default_corpus().splits == prepared[latest]
        assert f"(prepared earlier, {folders[latest]})" in capsys.readouterr().out


def test_a_prepared_corpus_without_its_manifests_is_not_the_default(arabic, librispeech):
    expected = prepare_corpus("librispeech", librispeech)
    gone = prepare_corpus("arabic_commands", arabic)
    os.remove(gone["dev"])
    assert default_corpus().splits == expected


def test_without_a_network_the_default_is_synthetic_and_both_lines_say_so(monkeypatch, capsys):
    defaults = (*TINY.values(), *synthetic.build_synthetic_commands.__defaults__[1:])
    monkeypatch.setattr(synthetic.build_synthetic_commands, "__defaults__", defaults)
    corpus = default_corpus()
    assert corpus.synthetic and corpus.name == "synthetic_commands"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("arabic_commands is not available: Cannot download https://github.com/")
    assert lines[-1].startswith("Corpus: synthetic_commands (the only one that needs no data)")


def test_a_download_that_is_no_archive_is_one_line_and_the_next_best_corpus(tmp_path, monkeypatch, capsys):
    defaults = (*TINY.values(), *synthetic.build_synthetic_commands.__defaults__[1:])
    monkeypatch.setattr(synthetic.build_synthetic_commands, "__defaults__", defaults)
    downloads = tmp_path / "home" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / os.path.basename(arabic_recipe.URL)).write_text("<html>please log in</html>")
    assert default_corpus().synthetic
    assert "arabic_commands is not available: " in capsys.readouterr().out.splitlines()[0]
