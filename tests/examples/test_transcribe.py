"""examples/transcribe.py: texts of files and of a microphone, whole and step by step, and errors that name the fix."""

import importlib.util
import json
import pathlib
import re
import shutil
import sys
import types

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.data.audio import load_audio, write_wav
from keras_usm_lite.export.streaming import export_litert_streaming

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

PATH = pathlib.Path(__file__).parents[2] / "examples" / "transcribe.py"
TOKENIZER = usm.CharTokenizer("abcdefgh")
RUNNING = usm.LogMel(16, normalization="running")
TIMES = r"(\d+\.\d\d) s of audio in \d+\.\d{3} s, real-time factor \d+\.\d{4}"


@pytest.fixture(scope="module")
def transcribe():
    spec = importlib.util.spec_from_file_location("transcribe", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that babbles as two files, its tokenizer beside them, and two recordings."""
    keras.utils.set_random_seed(0)
    size = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 5, "subsampling_channels": 4, "num_mel_bins": 16}
    model = usm.USMForCTC(9, chunk_size=25, causal_conv=True, **size)
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(keras.ops.convert_to_numpy(weight) + 0.3 * draw.normal(size=weight.shape))
    folder = tmp_path_factory.mktemp("models")
    usm.export_litert(model, folder / "whole.tflite", sample_rate_input=16000, frontend=RUNNING)
    export_litert_streaming(model, folder / "streaming.tflite", RUNNING)
    usm.save_tokenizer(TOKENIZER, folder / "tokenizer.json")
    write_wav(folder / "a.wav", 0.1 * draw.normal(size=40000))
    write_wav(folder / "b.wav", 0.1 * draw.normal(size=8000), sample_rate=8000)
    write_wav(folder / "click.wav", 0.1 * draw.normal(size=100))
    expected = {}
    for name in ("a.wav", "b.wav"):
        logits = model(RUNNING(load_audio(folder / name)[None]))
        expected[name] = TOKENIZER.decode(usm.greedy_decode(logits)[0])
    return folder, expected


def run(transcribe, capsys, *arguments):
    transcribe.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("model", ["whole.tflite", "streaming.tflite"])
def test_recordings_of_any_rate_are_transcribed_with_their_times(transcribe, folder, capsys, model):
    folder, expected = folder
    lines = run(transcribe, capsys, folder / model, folder / "a.wav", folder / "b.wav")
    for name, seconds in {"a.wav": "2.50", "b.wav": "1.00"}.items():
        times = [re.fullmatch("  " + TIMES, line) for line in lines]
        ends = [number for number, match in enumerate(times) if match and match[1] == seconds]
        assert len(ends) == 1 and lines[ends[0] - 1] == f"  {expected[name]}" and expected[name]
        assert str(folder / name) in lines[: ends[0]]


def test_a_streaming_model_shows_the_text_while_it_grows(transcribe, folder, capsys):
    folder, expected = folder
    lines = run(transcribe, capsys, folder / "streaming.tflite", folder / "a.wav")
    partial = [re.fullmatch(r" +(\d\.\d\d) s  (\w+)", line) for line in lines[1:-2]]
    assert [match[1] for match in partial] == ["1.00", "2.00"]
    assert all(expected["a.wav"].startswith(match[2]) for match in partial)


@pytest.mark.parametrize("model", ["whole.tflite", "streaming.tflite"])
def test_a_recording_shorter_than_a_window_has_no_text(transcribe, folder, capsys, model):
    lines = run(transcribe, capsys, folder[0] / model, folder[0] / "click.wav")
    assert len(lines) == 3 and "0.01 s of audio" in lines[-1]
    assert model == "whole.tflite" or lines[1].strip() == ""


@pytest.mark.parametrize("model", ["whole.tflite", "streaming.tflite"])
def test_the_microphone_is_heard_until_ctrl_c(transcribe, folder, capsys, monkeypatch, model):
    folder, expected = folder
    audio = load_audio(folder / "a.wav")

    class InputStream:
        def __init__(self, samplerate, channels, dtype):
            assert (samplerate, channels, dtype) == (16000, 1, "float32")
            self.heard = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def read(self, samples):
            if self.heard >= len(audio):
                raise KeyboardInterrupt
            self.heard += samples
            return audio[self.heard - samples : self.heard, None], False

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(InputStream=InputStream))
    lines = run(transcribe, capsys, folder / model, "--microphone")
    assert lines[-2] == f"  {expected['a.wav']}" and "2.50 s of audio" in lines[-1]


def test_help_explains_every_option(transcribe, capsys):
    with pytest.raises(SystemExit, match="0"):
        transcribe.main(["--help"])
    text = capsys.readouterr().out
    for word in ("model", "audio", "--microphone", "--tokenizer", "--threads", "--sample-rate", "real-time factor"):
        assert word in text


def test_what_is_missing_is_named_before_any_work(transcribe, folder, capsys, monkeypatch, tmp_path):
    folder, _ = folder
    model, audio = folder / "whole.tflite", folder / "a.wav"
    with pytest.raises(SystemExit, match="no file .*other.wav; check the path"):
        run(transcribe, capsys, model, audio, folder / "other.wav")
    with pytest.raises(SystemExit, match="no file .*other.tflite"):
        run(transcribe, capsys, folder / "other.tflite", audio)
    shutil.copy(model, tmp_path / "model.tflite")
    with pytest.raises(SystemExit, match="no tokenizer .*tokenizer.json; .*--tokenizer"):
        run(transcribe, capsys, tmp_path / "model.tflite", audio)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SystemExit, match="needs the package sounddevice.*pip install sounddevice"):
        run(transcribe, capsys, model, "--microphone")
    for arguments in ([model], [model, audio, "--microphone"]):
        with pytest.raises(SystemExit, match="2"):
            run(transcribe, capsys, *arguments)
    assert "either recordings or --microphone" in capsys.readouterr().err


def test_files_that_are_no_recogniser_are_refused(transcribe, folder, capsys, tmp_path):
    folder, _ = folder
    audio, tokenizer = folder / "a.wav", folder / "tokenizer.json"

    def refused(model, message, tokenizer=tokenizer, audio=audio):
        with pytest.raises(SystemExit, match=message):
            run(transcribe, capsys, model, audio, "--tokenizer", tokenizer)

    def export(name, inputs):
        path = str(tmp_path / name)
        outputs = keras.layers.Dense(9)(inputs)
        keras.Model(inputs, outputs).export(path, format="litert", verbose=False)
        return path

    refused(audio, "a.wav or its tokenizer cannot be read")
    refused(folder / "whole.tflite", "notes.wav", audio=_written(tmp_path / "notes.wav", "no audio"))
    refused(folder / "whole.tflite", "is not JSON", tokenizer=audio)
    small = tmp_path / "small.json"
    usm.save_tokenizer(usm.CharTokenizer("abc"), small)
    refused(folder / "whole.tflite", "tells 9 classes apart, .*small.json has 4", tokenizer=small)
    refused(export("features.tflite", keras.Input((None, 16), 1, name="features")), "takes log-mel features")
    refused(export("other.tflite", keras.Input((4,), 1, name="x")), r"not a recogniser: its inputs are \['x'\]")
    refused(export("fixed.tflite", keras.Input((4,), 1, name="audio")), "exactly 4 samples; export it with length=None")


def _written(path, text):
    path.write_text(json.dumps(text))
    return path


def test_a_file_for_several_recordings_at_once_is_refused(transcribe):
    pairs = types.SimpleNamespace(
        get_signature_list=lambda: {"serving_default": {"inputs": ["audio"]}},
        get_input_details=lambda: [{"shape_signature": np.array([2, -1])}],
    )
    with pytest.raises(SystemExit, match="takes 2 recordings at once; export it with batch=None or 1"):
        transcribe.check_model(pairs, "pairs.tflite")
