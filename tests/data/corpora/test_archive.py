"""Claims about unpacking."""

import shutil

import pytest

from keras_usm_lite.data.corpora.archive import as_folder


@pytest.fixture
def content(tmp_path):
    folder = tmp_path / "content"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("hello")
    return folder


def test_a_folder_is_used_in_place(content, tmp_path):
    assert as_folder(str(content), str(tmp_path / "out")) == str(content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_archives_are_unpacked(content, tmp_path, kind):
    archive = shutil.make_archive(str(tmp_path / "archive"), kind, content)
    out = tmp_path / "out"
    assert as_folder(archive, str(out)) == str(out)
    assert (out / "inner" / "a.txt").read_text() == "hello"


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.zip"):
        as_folder(str(tmp_path / "nowhere.zip"), str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_a_damaged_archive_is_named(content, tmp_path, kind):
    archive = shutil.make_archive(str(tmp_path / "archive"), kind, content)
    with open(archive, "rb") as file:
        whole = file.read()
    with open(archive, "wb") as file:
        file.write(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="archive.*cannot be unpacked"):
        as_folder(archive, str(tmp_path / "out"))
