"""Claims about the cache folder and about writing folders all or nothing."""

import os
import time

import pytest

from keras_usm_lite.data.corpora.cache import cache_home, replacing_folder


def test_the_argument_wins_over_the_environment_and_that_over_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_USM_LITE_HOME", raising=False)
    assert cache_home() == str(tmp_path / ".cache" / "keras_usm_lite")
    monkeypatch.setenv("KERAS_USM_LITE_HOME", "~/elsewhere")
    assert cache_home() == str(tmp_path / "elsewhere")
    assert cache_home(tmp_path / "here") == str(tmp_path / "here")


def test_a_folder_appears_only_when_it_is_finished(tmp_path):
    target = tmp_path / "deep" / "corpus"
    with replacing_folder(target) as temporary:
        with open(os.path.join(temporary, "a"), "w") as file:
            file.write("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"
    assert os.listdir(target.parent) == ["corpus"]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_folder_and_no_rubbish(tmp_path, interruption):
    target = tmp_path / "corpus"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(interruption), replacing_folder(target) as temporary:
        with open(os.path.join(temporary, "a"), "w") as file:
            file.write("half")
        raise interruption
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["corpus"]


def test_an_old_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "corpus"
    target.mkdir()
    (target / "old").write_text("old")
    with replacing_folder(target) as temporary:
        open(os.path.join(temporary, "new"), "w").close()
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["corpus"]


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "corpus"
    target.mkdir()
    (target / "a").write_text("old")
    replace = os.replace

    def refuse(source, destination):
        if str(source).endswith(".partial"):
            raise OSError("no more names")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no more names"), replacing_folder(target):
        pass
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["corpus"]


def test_what_a_killed_process_left_is_removed_unless_somebody_still_writes_there(tmp_path):
    killed, running = tmp_path / ".corpus-a.partial", tmp_path / ".corpus-b.partial"
    for folder in (killed, running):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "audio").write_text("half")
        for path in (folder / "deep" / "audio", folder / "deep", folder):
            os.utime(path, (0, time.time() - 7200))
    os.utime(running / "deep" / "audio")
    with replacing_folder(tmp_path / "corpus"):
        pass
    assert sorted(os.listdir(tmp_path)) == [running.name, "corpus"]
