"""The published models are what their cards say."""

import json
import pathlib

import keras
import pytest

import keras_usm_lite as usm

FOLDERS = sorted(path.parent for path in pathlib.Path(__file__).parents[1].glob("saved_models/*/card.json"))

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
