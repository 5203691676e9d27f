"""The error-rate callback inside model.fit of the running backend."""

import csv

import jiwer
import keras
import numpy as np
import pytest

from keras_usm_lite.callbacks.wer import WordErrorRate
from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer

TOKENIZER = CharTokenizer(" ab")
TEXTS = ["a b", "ab ba", "b", "aa"]
WEIGHT = np.array([1, 1, 1, 1, 0], "float32")  # the last row only fills up the batch
LABELS = np.zeros((5, 5), "int32")
FRAMES = np.zeros((5, 12), "int32")  # what to learn: each label followed by a blank, quicker to compile than CTC
for _row, _text in enumerate(TEXTS):
    LABELS[_row, : len(_text)] = TOKENIZER.encode(_text)
FRAMES[:, :10:2] = LABELS


@pytest.fixture
def batch():
    """Utterances as noise around what they say."""
    features = np.random.default_rng(0).normal(scale=0.6, size=(5, 12, 6)).astype("float32")
    features += 2 * np.eye(6, dtype="float32")[FRAMES]
    return {"features": features, "lengths": np.array([12, 12, 12, 12, 0], "int32")}, LABELS, WEIGHT


def make_model():
    keras.utils.set_random_seed(3)
    inputs = {"features": keras.Input((None, 6), name="features"), "lengths": keras.Input((), name="lengths")}
    # Dropout and batch normalisation have state that a prediction must not move.
    hidden = keras.layers.Dropout(0.3)(keras.layers.BatchNormalization()(inputs["features"]))
    model = keras.Model(inputs, keras.layers.Dense(4)(hidden))
    model.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def train(model, batch, callbacks, epochs=3, **options):
    return model.fit(batch[0], FRAMES, epochs=epochs, callbacks=callbacks, **{"verbose": 0, **options}).history


def rates_of(model, batch):
    """WER and CER with the model's own predict and jiwer's own functions."""
    best = model.predict(batch[0], verbose=0)[:4].argmax(axis=-1)
    found = [
        "".join(TOKENIZER.vocabulary[k - 1] for t, k in enumerate(row) if k and (t == 0 or row[t - 1] != k))
        for row in best
    ]
    found = [" ".join(text.split()) for text in found]
    return jiwer.wer(TEXTS, found), jiwer.cer(TEXTS, found)


def test_each_epoch_logs_the_rates_of_the_weights_it_ended_with(batch):
    model, expected = make_model(), []
    probe = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: expected.append(rates_of(model, batch)))
    history = train(model, batch, [WordErrorRate([batch], TOKENIZER), probe], epochs=6)
    assert list(zip(history["val_wer"], history["val_cer"], strict=True)) == expected
    assert len(set(expected)) > 1  # the model did move
    assert all(type(value) is float for value in history["val_wer"])


def test_measuring_does_not_change_the_training(batch):
    measured = make_model()
    losses = train(measured, batch, [WordErrorRate([batch, batch], TOKENIZER)])["loss"]
    alone = make_model()
    assert losses == train(alone, batch, [])["loss"]
    for left, right in zip(measured.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_callbacks_after_it_see_the_rates(batch, tmp_path):
    model = make_model()
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", monitor="val_wer", mode="min", save_best_only=True
    )
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = train(model, batch, [WordErrorRate([batch], TOKENIZER), checkpoint, log], epochs=6)
    assert checkpoint.best == min(history["val_wer"])
    best = keras.saving.load_model(tmp_path / "best.keras", compile=False)
    assert rates_of(best, batch)[0] == min(history["val_wer"])
    with open(tmp_path / "log.csv", newline="") as file:
        assert [float(row["val_wer"]) for row in csv.DictReader(file)] == history["val_wer"]


def test_a_checkpoint_before_it_does_not_see_the_rates(batch, tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", monitor="val_wer", mode="min", save_best_only=True
    )
    with pytest.warns(UserWarning, match="val_wer"):
        train(make_model(), batch, [checkpoint, WordErrorRate([batch], TOKENIZER)], epochs=1)
    assert checkpoint.best is None


def test_the_epoch_line_shows_the_rates(batch, capsys):
    train(make_model(), batch, [WordErrorRate([batch], TOKENIZER)], epochs=1, verbose=2)
    line = capsys.readouterr().out
    assert "val_wer: " in line
    assert "val_cer: " in line


def test_epochs_that_are_not_measured_repeat_the_last_value(batch):
    callbacks = [
        WordErrorRate([batch], TOKENIZER),
        WordErrorRate([batch], TOKENIZER, every=3, prefix="rare_"),
    ]
    history = train(make_model(), batch, callbacks, epochs=7)
    for name in ("wer", "cer"):
        each = history[f"val_{name}"]
        assert history[f"rare_{name}"] == [each[0], each[0], each[2], each[2], each[2], each[5], each[5]]
    assert history["rare_cer"] != history["val_cer"]  # the two do measure different epochs


def test_a_second_training_measures_its_own_first_epoch(batch):
    model, callback = make_model(), WordErrorRate([batch], TOKENIZER, every=100)
    train(model, batch, [callback], epochs=6)
    history = train(model, batch, [callback], epochs=7, initial_epoch=6)
    assert history["val_wer"] == [rates_of(model, batch)[0]]


def test_it_works_next_to_validation_data(batch):
    callbacks = [WordErrorRate([batch], TOKENIZER)]
    history = train(make_model(), batch, callbacks, epochs=2, validation_data=(batch[0], FRAMES))
    names = ("loss", "val_loss", "val_wer", "val_cer")
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(names, 2)


def test_an_interval_below_one_epoch_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1 epoch, got 0"):
        WordErrorRate([], TOKENIZER, every=0)
