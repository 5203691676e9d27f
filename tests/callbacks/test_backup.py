"""Backup: a training that dies and starts again ends as if it had not, and no failure costs the last good state."""

import os

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.callbacks import Backup, NonFiniteError
from keras_usm_lite.optimizers.slowed import slow_down

X, Y = np.random.default_rng(0).normal(size=(2, 12, 8)).astype("float32")
RATES = {
    "number": lambda: 0.01,
    "schedule": lambda: keras.optimizers.schedules.CosineDecay(0.01, 20),
}


def compiled(rate="number", units=8, **compiling):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5), keras.layers.Dense(units)])
    model.compile(keras.optimizers.AdamW(RATES[rate]()), "mse", **compiling)
    return model


def fit(model, *callbacks, epochs=4):
    settings = {"epochs": epochs, "batch_size": 4, "shuffle": False, "verbose": 0}
    return model.fit(X, Y[:, : model.output_shape[-1]], callbacks=list(callbacks), **settings)


def state(model):
    return [keras.ops.convert_to_numpy(v) for v in [*model.variables, *model.optimizer.variables]]


def assert_equal(model, other):
    for got, expected in zip(state(model), state(other), strict=True):
        np.testing.assert_array_equal(got, expected)


class Die(keras.callbacks.Callback):
    """The end of a process, as far as a test can have it without one."""

    def __init__(self, epoch, batch=1):
        super().__init__()
        self.moment = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.moment:
            raise KeyboardInterrupt


def interrupted(folder, epoch=2, **compiling):
    model = compiled(**compiling)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Backup(folder), Die(epoch))
    return model


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_weights_dropout_optimizer_and_history_are_those_of_a_training_that_was_left_alone(rate, epoch, tmp_path):
    whole, resumed = compiled(rate), compiled(rate)
    history = fit(whole)
    interrupted(tmp_path, epoch, rate=rate)
    continued = fit(resumed, Backup(tmp_path))
    assert_equal(resumed, whole)
    assert continued.epoch == history.epoch == [0, 1, 2, 3]
    assert continued.history == history.history


def test_a_training_that_is_interrupted_again_and_again_arrives(tmp_path):
    whole = compiled()
    fit(whole)
    for epoch in range(4):
        interrupted(tmp_path, epoch)
    resumed = compiled()
    fit(resumed, Backup(tmp_path))
    assert_equal(resumed, whole)


def test_the_rest_of_a_process_that_died_while_writing_is_ignored_and_removed(tmp_path):
    interrupted(tmp_path)
    content = (tmp_path / "training.zip").read_bytes()
    (tmp_path / "training.zip.0123abcd.tmp").write_bytes(content[: len(content) // 2])
    whole, resumed = compiled(), compiled()
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), Backup(tmp_path), Die(2, batch=0))
    assert os.listdir(tmp_path) == ["training.zip"]
    fit(resumed, Backup(tmp_path))
    assert_equal(resumed, whole)


def test_a_finished_training_is_kept_until_its_file_is_deleted(tmp_path):
    """A process that dies before it has saved the model finds the model again."""
    finished, again = compiled(), compiled()
    history = fit(finished, Backup(tmp_path))
    with pytest.warns(UserWarning, match=r"training\.zip holds this training at its end \(epoch 4\).*Delete the file"):
        repeated = fit(again, Backup(tmp_path))
    assert_equal(again, finished)
    assert (repeated.epoch, repeated.history) == (history.epoch, history.history)
    os.remove(tmp_path / "training.zip")
    assert fit(again, Backup(tmp_path)).epoch == [0, 1, 2, 3]


def test_more_epochs_continue_a_finished_training(tmp_path):
    fit(compiled(), Backup(tmp_path), epochs=3)
    whole, resumed = compiled(), compiled()
    fit(whole)
    assert fit(resumed, Backup(tmp_path)).epoch == [0, 1, 2, 3]
    assert_equal(resumed, whole)


def test_what_the_last_step_spoils_does_not_take_the_place_of_the_last_good_state(tmp_path):
    model = compiled()

    def spoil(epoch, logs):
        if epoch == 3:
            model.layers[-1].bias.assign(np.full(8, np.inf))

    with pytest.raises(NonFiniteError, match="bias' is not finite before epoch 4"):
        fit(model, Backup(tmp_path), keras.callbacks.LambdaCallback(on_epoch_end=spoil))
    whole, resumed = compiled(), compiled()
    fit(whole)
    fit(resumed, Backup(tmp_path))
    assert_equal(resumed, whole)


def test_the_logs_of_callbacks_further_down_the_list_are_kept(tmp_path):
    def log(epoch, logs):
        logs["tenfold"] = 10.0 * epoch

    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), Backup(tmp_path), keras.callbacks.LambdaCallback(on_epoch_end=log), Die(2))
    history = fit(compiled(), Backup(tmp_path), keras.callbacks.LambdaCallback(on_epoch_end=log)).history
    assert history["tenfold"] == [0.0, 10.0, 20.0, 30.0]


def test_a_lowered_schedule_stays_lowered(tmp_path):
    model = interrupted(tmp_path, rate="schedule")
    backup = Backup(tmp_path)
    backup.set_model(model)
    backup.restore()
    slow_down(model, 0.25)
    backup.save(backup.epoch)
    resumed = compiled("schedule")
    expected = 0.25 * float(compiled("schedule").optimizer._learning_rate(6))
    backup.set_model(resumed)
    resumed.optimizer.build(resumed.trainable_variables)
    backup.restore()
    assert float(resumed.optimizer.learning_rate) == pytest.approx(expected)


def test_variables_of_bfloat16_come_back(tmp_path):
    def model():
        keras.utils.set_random_seed(0)
        layers = [keras.Input((8,)), keras.layers.Dense(8, dtype="bfloat16")]
        return keras.Sequential(layers)

    whole, resumed = model(), model()
    for each in (whole, resumed):
        each.compile("sgd", "mse")
    fit(whole)
    stopped = model()
    stopped.compile("sgd", "mse")
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, Backup(tmp_path), Die(2))
    fit(resumed, Backup(tmp_path))
    assert_equal(resumed, whole)


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    model = compiled()

    def spoil(epoch, logs):
        if epoch == 1:
            model.layers[-1].bias.assign(np.full(8, np.nan))

    with pytest.raises(NonFiniteError, match="bias' is not finite before epoch 2. .*lower the learning rate"):
        fit(model, Backup(tmp_path), keras.callbacks.LambdaCallback(on_epoch_end=spoil))
    whole, resumed = compiled(), compiled()
    fit(whole)
    fit(resumed, Backup(tmp_path))  # from the beginning of epoch 1
    assert_equal(resumed, whole)


def truncated(path):
    os.truncate(path, os.path.getsize(path) // 2)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(b"\x93NUMPY") + 130] ^= 1  # past the header, in the numbers of an array
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_damaged_file_is_named_and_not_trained_on(damage, tmp_path):
    interrupted(tmp_path)
    damage(tmp_path / "training.zip")
    with pytest.raises(ValueError, match=r"training\.zip is damaged .*delete it to train from the start"):
        fit(compiled(), Backup(tmp_path))


def test_the_file_of_another_model_or_optimizer_is_refused(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(8, 8\) where .*kernel' has \(8, 4\).*as before"):
        fit(compiled(units=4), Backup(tmp_path))
    other = compiled()
    other.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"holds 9 variables, this model and its optimizer \d.*as before"):
        fit(other, Backup(tmp_path))


def test_a_model_that_is_not_built_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(8)], name="later")
    model.compile("sgd", "mse")
    if keras.backend.backend() == "tensorflow":  # the others build before callbacks begin
        with pytest.raises(ValueError, match="'later' is not built"):
            model.fit(X, Y, verbose=0, callbacks=[Backup(tmp_path)])


def test_the_file_is_a_plain_archive_of_arrays(tmp_path):
    interrupted(tmp_path, epoch=0)
    shapes = [variable.shape for variable in np.load(tmp_path / "training.zip").values() if hasattr(variable, "shape")]
    assert shapes.count((8, 8)) == 3  # the kernel and its two moments


def test_logs_may_be_vectors(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score(average=None)])
    x, y = np.ones((6, 4), "float32"), np.eye(3, dtype="float32")[[0, 1, 2, 0, 1, 2]]
    for epochs in (1, 2):
        history = model.fit(x, y, epochs=epochs, verbose=0, callbacks=[Backup(str(tmp_path))]).history
    assert np.shape(history["f1_score"]) == (2, 3)


def test_a_training_that_was_continued_and_died_again_leaves_the_model_to_train_from_its_first_epoch(tmp_path):
    interrupted(tmp_path)
    model = compiled()
    with pytest.raises(KeyboardInterrupt):
        fit(model, Backup(tmp_path), Die(3))
    assert fit(model, epochs=2).epoch == [0, 1]


@pytest.mark.parametrize(("other", "message"), [(("int8", "2:4"), "int4 2:4.*int8 2:4"), (("int4", "1:4"), "int4 1:4")])
def test_a_backup_of_another_width_or_pattern_is_refused(tmp_path, other, message):
    def model(quantization, sparsity):
        model = keras.Sequential([keras.Input((8,)), usm.QuantDense(8, quantization, sparsity)])
        model.compile("sgd", "mse")
        return model

    fit(model("int4", "2:4"), Backup(tmp_path), epochs=1)
    with pytest.raises(ValueError, match=f"a layer of .*{message}.*Give another folder"):
        fit(model(*other), Backup(tmp_path), epochs=2)
