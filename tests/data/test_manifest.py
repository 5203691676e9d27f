"""Manifests are read and written exactly, and what cannot be used is named with its place and reason."""

import csv
import os
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.data.manifest import (
    BadRow,
    ManifestError,
    Utterance,
    check_utterances,
    read_manifest,
    replacing,
    write_manifest,
)

HEADER = "path\tduration_s\ttext\tspeaker"


def write(tmp_path, content):
    path = tmp_path / "train.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_utterance(tmp_path, name="a.wav", duration=1.0, text="hello", content=b"RIFF"):
    (tmp_path / name).write_bytes(content)
    return Utterance(str(tmp_path / name), duration, text, "anna")


def test_relative_paths_are_relative_to_the_folder_of_the_manifest(tmp_path, monkeypatch):
    write(tmp_path, f"{HEADER}\naudio/../audio/a.wav\t1.5\thello\tanna\n/else/b.wav\t2\thi\tbert\n")
    monkeypatch.chdir(tmp_path)
    assert read_manifest("train.tsv") == [
        Utterance(str(tmp_path / "audio" / "a.wav"), 1.5, "hello", "anna"),
        Utterance("/else/b.wav", 2.0, "hi", "bert"),
    ]


def test_columns_are_found_by_name_and_further_ones_are_ignored(tmp_path):
    path = write(tmp_path, 'speaker\tnote\ttext\tduration_s\tpath\nanna\t["x"]\t"quoted" word\t1\ta.wav\n')
    assert read_manifest(path) == [Utterance(str(tmp_path / "a.wav"), 1.0, '"quoted" word', "anna")]


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + f"{HEADER}\r\na.wav\t1\thällo\tanna\r\n".encode())
    assert read_manifest(path) == [Utterance(str(tmp_path / "a.wav"), 1.0, "hällo", "anna")]


fields = st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"]))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.text("abc_. '\"é", min_size=1).filter(lambda name: set(name) - {"."}),
            st.floats(-1e6, 1e6),
            fields,
            fields,
        )
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("corpus")
    utterances = [Utterance(str(folder / "audio" / name), *rest) for name, *rest in rows]
    write_manifest(folder / "train.tsv", utterances)
    assert read_manifest(folder / "train.tsv") == utterances


def test_the_csv_module_reads_what_is_written_and_inner_paths_are_relative(tmp_path):
    utterances = [
        Utterance(str(tmp_path / "audio" / "a.wav"), 0.1, 'say "hi"', "anna"),
        Utterance(str(tmp_path) + "-other/b.wav", 2.0, "", "bert"),
    ]
    write_manifest(tmp_path / "train.tsv", utterances)
    with open(tmp_path / "train.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows == [
        ["path", "duration_s", "text", "speaker"],
        [os.path.join("audio", "a.wav"), "0.1", 'say "hi"', "anna"],
        [str(tmp_path) + "-other/b.wav", "2.0", "", "bert"],
    ]


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ("path\ttext\tspeaker\n", "line 1", "no column duration_s"),
        ("", "line 1", "no column path, duration_s, text, speaker"),
        (f"{HEADER}\na.wav\t1\thi\tanna\nb.wav\t1\thi\n", "line 3, column speaker", "ends before"),
        (f"{HEADER}\na.wav\t1\tturn\tleft\tanna\n", "line 2", "more fields than the header has, the last is 'anna'"),
        (f"{HEADER}\n\t1\thi\tanna\n", "line 2, column path", "empty"),
        (f"{HEADER}\na.wav\tlong\thi\tanna\n", "line 2, column duration_s", "'long' is not a number"),
        (f"{HEADER}\na.wav\tnan\thi\tanna\n", "line 2, column duration_s", "'nan' is not a number"),
        (f"{HEADER}\na.wav\t1\tone\rtwo\tanna\n", "line 2", "new-line character"),
        (f"{HEADER}\na.wav\t1\t{'a' * 200_000}\tanna\n", "line 2", "larger than field limit (131072)"),
        (f"{HEADER}\na.wav\t1\th".encode() + b"\xff\tanna\n", "line 2", "not UTF-8"),
    ],
)
def test_a_bad_manifest_is_refused_with_file_place_and_reason(tmp_path, content, place, reason):
    path = write(tmp_path, content)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert f"{path}, {place}" in str(caught.value) and reason in str(caught.value)


def test_a_missing_manifest_is_reported_with_its_path(tmp_path):
    with pytest.raises(ManifestError, match="none.tsv.*No such file"):
        read_manifest(tmp_path / "none.tsv")


def test_a_field_that_the_format_cannot_hold_is_refused_and_the_old_file_stays(tmp_path):
    path = write(tmp_path, "old")
    with pytest.raises(ManifestError, match="line 3, column text: 'two\\\\tfields'"):
        write_manifest(path, [Utterance("/a", 1.0, "hi", "x"), Utterance("/b", 1.0, "two\tfields", "x")])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["train.tsv"]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    path = write(tmp_path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary, open(temporary, "w") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["train.tsv"]


def test_usable_utterances_pass_without_a_warning(tmp_path):
    utterances = [make_utterance(tmp_path)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_utterances(utterances, encode=lambda text: [1] * 13) == (utterances, [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"content": b""}, "file is empty"),
        ({"duration": 0.0}, "not positive"),
        ({"duration": float("nan")}, "not positive"),
        ({"text": " "}, "text is empty"),
        ({"text": "?"}, "cannot be encoded: unknown character '?'"),
        ({"text": "-"}, "no labels"),
        ({"duration": 0.16}, "CTC needs 6 output frames for the text, 0.16 s give 4"),
    ],
)
def test_each_defect_is_named(tmp_path, changes, reason):
    def encode(text):
        if text == "?":
            raise ValueError("unknown character '?'")
        return [ord(c) for c in text if c != "-"]

    bad = make_utterance(tmp_path, **changes)
    good = make_utterance(tmp_path, "good.wav")
    with pytest.warns(UserWarning, match="1 of 2 utterances cannot be used"):
        kept, problems = check_utterances([bad, good], encode)
    assert kept == [good]
    assert [row.path for row in problems] == [bad.path] and reason in problems[0].reason


def test_a_missing_file_is_reported_with_its_path(tmp_path):
    gone = Utterance(str(tmp_path / "gone.wav"), 1.0, "hi", "anna")
    with pytest.raises(ManifestError, match="gone.wav: the file is missing"):
        check_utterances([gone], on_bad="raise")
    with pytest.warns(UserWarning, match="gone.wav"):
        assert check_utterances([gone]) == ([], [BadRow(gone.path, "the file is missing")])


@pytest.mark.parametrize(("duration", "fits"), [(0.28, True), (0.279, False)])
def test_ctc_needs_a_blank_between_equal_labels(tmp_path, duration, fits):
    utterance = make_utterance(tmp_path, duration=duration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good, _ = check_utterances([utterance], encode=lambda text: [1, 1, 1, 2, 1], frames_per_second=25.0)
    assert bool(good) == fits  # 5 labels and 2 repeats need 7 frames of 40 ms


def test_long_lists_of_problems_are_shortened_in_the_message_only(tmp_path):
    gone = [Utterance(str(tmp_path / f"{n}.wav"), 1.0, "hi", "anna") for n in range(8)]
    with pytest.warns(UserWarning, match="and 3 more") as caught:
        _, problems = check_utterances(gone)
    assert len(problems) == 8 and len(caught) == 1


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match='on_bad is \'drop\'; allowed are "skip" and "raise"'):
        check_utterances([], on_bad="drop")
