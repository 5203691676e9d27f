"""compile_ctc and fit_ctc: the recipe learns, resumes, and decays only kernels."""

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.training import warmup_cosine

TOKENIZER = usm.WordTokenizer(["a", "b"])
TINY = {"num_layers": 1, "dim": 16, "num_heads": 2, "subsampling_channels": 4, "dropout": 0.0}


class Features:
    """Utterances whose first half is one of two constant patterns: a, b."""

    def __init__(self, labels):
        rng = np.random.default_rng(0)
        patterns = rng.normal(size=(3, 80)).astype("float32")
        self.rows = [np.repeat(patterns[[label]], 24, axis=0) for (label,) in labels]
        self.num_frames = np.array([24] * len(labels))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def batches(shuffle=True):
    labels = [[1 + i % 2] for i in range(16)]
    return usm.data.SpeechBatches(Features(labels), labels, batch_frames=24 * 8, num_buckets=1, shuffle=shuffle)


def model(seed=0, spec_augment=False):
    keras.utils.set_random_seed(seed)
    return usm.USMForCTC(3, spec_augment=spec_augment, **TINY)


def test_the_recipe_learns_to_tell_two_words_apart():
    recogniser, train = model(), batches()
    usm.compile_ctc(recogniser, 1e-2, steps=15 * len(train))
    history = usm.fit_ctc(recogniser, train, batches(shuffle=False), TOKENIZER, 15, verbose=0).history
    assert history["val_wer"][-1] == 0.0 < history["val_wer"][0]


def test_only_kernels_decay():
    recogniser = usm.compress(model(), {".": (usm.QuantizationConfig(4, scale="learned"), None)})
    optimizer = usm.compile_ctc(recogniser, 1e-3, steps=10).optimizer
    assert {"scale_gain", "bias", "gamma"} <= {v.name for v in recogniser.trainable_variables}
    optimizer.build(recogniser.trainable_variables)
    names = {v.name for v in recogniser.trainable_variables if optimizer._use_weight_decay(v)}
    assert names and all("kernel" in name for name in names)


def test_the_learning_rate_rises_then_falls_to_zero():
    schedule = usm.warmup_cosine(0.5, steps=100, warmup=0.1)
    rates = [float(schedule(step)) for step in (0, 10, 55, 100)]
    assert rates[0] == 0.0 and rates[1] == pytest.approx(0.5) and rates[3] == pytest.approx(0.0, abs=1e-6)
    assert 0.1 < rates[2] < 0.4


@pytest.mark.parametrize(("steps", "rising"), [(80, 40), (2000, 600), (9000, 900)])
def test_the_rate_rises_for_a_tenth_of_the_training_but_for_600_steps_if_there_are_twice_as_many(steps, rising):
    assert usm.warmup_cosine(0.5, steps).warmup_steps == rising


def test_a_frozen_second_moment_is_the_only_thing_freeze_step_changes():
    plain = usm.compile_ctc(model(), 1e-3, steps=10).optimizer
    step = usm.compile_ctc(model(), 1e-3, steps=10, freeze_step=4).optimizer
    assert (type(step), step.freeze_step) == (usm.optimizers.StepAdamW, 4)
    ours, theirs = step.get_config(), plain.get_config()
    assert ours.keys() ^ theirs.keys() == {"freeze_step", "amsgrad"}
    assert {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]} == {"name"}


class Interrupt(keras.callbacks.Callback):
    """Stops the process in the middle of the second epoch, as a power cut would."""

    def on_train_batch_begin(self, batch, logs=None):
        if self.model.optimizer.iterations >= 3:
            raise KeyboardInterrupt


def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(tmp_path):
    def run(backup, callbacks=()):
        rules, train = {"depthwise": (None, None), "block": ("int4", "2:4")}, batches()
        recogniser = usm.compress(model(spec_augment=True), rules)
        usm.compile_ctc(recogniser, 1e-2, steps=3 * len(train))
        pruning = usm.callbacks.NMPruning(start_step=1, num_shots=2, interval=2)
        arguments = {"callbacks": [pruning, *callbacks], "backup_dir": backup, "verbose": 0}
        usm.fit_ctc(recogniser, train, batches(shuffle=False), TOKENIZER, 3, **arguments)
        return [keras.ops.convert_to_numpy(weight) for weight in recogniser.weights]

    whole = run(str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path / "cut"), [Interrupt()])
    resumed = run(str(tmp_path / "cut"))
    for expected, got in zip(whole, resumed, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["Distiller", "CoTrainer"])
def test_the_recipe_trains_what_wraps_a_recogniser(wrapper):
    student, train = usm.compress(model(), {"ffn": ("int4", None)}), batches()
    learner = usm.Distiller(student, model()) if wrapper == "Distiller" else usm.CoTrainer(student)
    usm.compile_ctc(learner, 1e-2, steps=2 * len(train))
    history = usm.fit_ctc(learner, train, batches(shuffle=False), TOKENIZER, 2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


@pytest.mark.parametrize("warmup", [600, -0.1])
def test_a_warmup_that_is_not_a_share_of_the_training_is_refused(warmup):
    with pytest.raises(ValueError, match="share of the 1000 steps"):
        warmup_cosine(1e-3, 1000, warmup)


def test_a_functional_recogniser_of_features_and_lengths_is_trained():
    inputs = {
        "features": keras.Input((None, 80), name="features"),
        "lengths": keras.Input((), dtype="int32", name="lengths"),
    }
    teacher, functional = (keras.Model(inputs, model()(inputs)) for _ in range(2))
    for learner in (functional, usm.Distiller(usm.compress(functional, {"ffn": ("int4", None)}), teacher)):
        train = batches()
        usm.compile_ctc(learner, 1e-2, steps=2 * len(train))
        assert len(usm.fit_ctc(learner, train, batches(shuffle=False), TOKENIZER, 2, verbose=0).history["loss"]) == 2


@pytest.mark.parametrize("words", [["a"], ["a", "b", "c"]])
def test_a_tokenizer_of_another_size_than_the_model_is_refused_before_training(words):
    recogniser, train = model(), batches()
    usm.compile_ctc(recogniser, 1e-2, steps=len(train))
    with pytest.raises(ValueError, match=f"3 classes apart, the tokenizer has {len(words) + 1} with the blank"):
        usm.fit_ctc(recogniser, train, batches(shuffle=False), usm.WordTokenizer(words), 1, verbose=0)
