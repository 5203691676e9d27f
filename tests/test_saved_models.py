"""The published models are what their cards say."""

import json
import pathlib

import keras
import numpy as np
import pytest

import keras_usm_lite as usm

ROOT = pathlib.Path(__file__).parents[1] / "saved_models"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/card.json"))

if keras.backend.backend() != "tensorflow":
    pytest.skip("files do not depend on the backend", allow_module_level=True)


def card(folder):
    return json.loads((folder / "card.json").read_text())


def test_there_are_models():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_files_have_the_sizes_of_the_card_and_load(folder):
    assert (folder / "model.usm").stat().st_size == card(folder)["packed"]
    assert (folder / "model.tflite").stat().st_size == card(folder)["tflite"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    tokenizer = usm.load_tokenizer(folder / "tokenizer.json")
    model = usm.load_packed(folder / "model.usm")
    assert model(keras.ops.zeros((1, 40, 80))).shape == (1, 10, tokenizer.vocab_size)
    assert usm.report(model).weights == card(folder)["weights"]


def made_audio(seconds=3, rate=16000):
    """Noise that swells, and two tones that come and go."""
    time, draw = np.arange(seconds * rate) / rate, np.random.default_rng(0)
    tones = np.sin(2 * np.pi * 440 * time) * (time % 0.5 < 0.2) + np.sin(2 * np.pi * 1900 * time) * (time % 0.7 < 0.1)
    return (0.1 * tones + 0.02 * time * draw.normal(size=len(time))).astype("float32")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tflite_file_is_the_packed_model_integer_by_integer_and_frame_by_frame(folder):
    model, audio = usm.load_packed(folder / "model.usm"), made_audio()
    dataset = [(audio[None], np.ones((1, 1), int), np.ones(1))]  # nobody speaks in it: what is said does not matter
    parity = usm.verify_litert(model, folder / "model.tflite", dataset, tolerance=np.inf)
    assert parity.integers == sum(layer.kernel.shape[0] * layer.units for layer in usm.compressed_layers(model))
    assert parity.frames == 75 and parity.logits_error < (0.05 if parity.kernels else 1e-4)
    assert parity.frames_differing <= (2 if parity.kernels else 0)


def test_the_gate_refuses_the_file_of_another_model():
    arabic, synthetic = (ROOT / f"{name}_commands_int4_2_4" for name in ("arabic", "synthetic"))
    model = usm.load_packed(arabic / "model.usm")
    dataset = [(made_audio()[None], np.ones((1, 1), int), np.ones(1))]
    with pytest.raises(usm.ParityError, match="does not hold the 4-bit integers"):
        usm.verify_litert(model, synthetic / "model.tflite", dataset, tolerance=np.inf)


def test_the_synthetic_model_has_its_word_error_rate_on_new_sentences_of_its_test_voices(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path))
    folder = next(folder for folder in FOLDERS if folder.name.startswith("synthetic"))
    manifests = usm.data.prepare_corpus("synthetic_commands", sizes=(1, 1, 40), seed=0)
    recognizer = usm.LiteRTRecognizer(folder / "model.tflite", usm.load_tokenizer(folder / "tokenizer.json"))
    utterances = usm.data.read_manifest(manifests["test"])
    texts = [recognizer.transcribe(usm.data.load_audio(one.path))[0] for one in utterances]
    rates = usm.error_rates([one.text for one in utterances], texts)
    print(rates)
    assert rates.wer < card(folder)["high"] + 0.05  # 160 words only
