"""Distiller: what it minimises, whom it trains, what it shows to callbacks, and that it saves and loads."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.models.distiller import Distiller, frame_weights

BINS, VOCAB = 40, 7
JIT = keras.backend.backend() == "jax"  # elsewhere compiling and tracing would take most of the time of these tests
SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": BINS}
QUIET = {"dropout": 0.0, "spec_augment": False}
LENGTHS = np.array([40, 29, 22, 0], "int32")
WEIGHTS = np.array([1, 0, 1, 0], "float32")
REAL = (np.arange(10) < -(-LENGTHS[:, None] // 4)) & (WEIGHTS[:, None] > 0)  # [batch, frames]: what counts
LABELS = np.array([[1, 2, 3, 3], [4, 4, 0, 0], [6, 5, 0, 0], [0, 0, 0, 0]], "int32")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def recogniser(seed, **kwargs):
    keras.utils.set_random_seed(seed)
    model = usm.USMForCTC(VOCAB, **{**SIZE, **QUIET, **kwargs})
    draw = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        weight.assign(array(weight) + 0.2 * draw.normal(size=weight.shape))
    return model


def batch():
    features = np.random.default_rng(1).normal(size=(4, 40, BINS)).astype("float32")
    return {"features": features, "lengths": LENGTHS}


def compiled(model, optimizer=None, jit_compile=JIT):
    loss = keras.losses.CTC(reduction="sum")
    model.compile(
        optimizer or keras.optimizers.SGD(0.05),
        loss=loss,
        jit_compile=jit_compile,
        run_eagerly=not jit_compile,
    )
    return model


def fit(distiller, epochs=1, callbacks=()):
    """History of steps on the one batch."""
    history = distiller.fit(batch(), LABELS, 4, epochs, verbose=0, callbacks=list(callbacks), sample_weight=WEIGHTS)
    return history.history


def evaluate(distiller):
    return distiller.evaluate(batch(), LABELS, batch_size=4, sample_weight=WEIGHTS, verbose=0, return_dict=True)


def expected_kl(teacher_logits, student_logits, temperature=1.0):
    posteriors = (array(ops.softmax(logits / temperature)) for logits in (teacher_logits, student_logits))
    p, q = (shares[REAL].astype("float64") for shares in posteriors)
    return temperature**2 * (p * np.log(p / q)).sum(axis=-1).mean()


def block_outputs(model):
    """What every block says, by calling one part after the other."""
    mask = np.arange(40) < LENGTHS[:, None]
    x = model.encoder.subsampling(batch()["features"])
    mask = model.encoder.compute_mask(batch()["features"], ops.convert_to_tensor(mask))
    outputs = []
    for block in model.encoder.blocks:
        x = block(x, mask=mask)
        outputs.append(array(x)[REAL])
    return outputs


def expected_hidden(teacher, student):
    pairs = zip(block_outputs(teacher), block_outputs(student), strict=True)
    return np.mean([np.square(given - wanted).mean() / np.square(wanted).mean() for wanted, given in pairs])


def test_a_teacher_who_knows_no_better_adds_nothing():
    teacher, student = recogniser(0), recogniser(1)
    student.set_weights(teacher.get_weights())
    logs = evaluate(compiled(Distiller(student, teacher, hidden_weight=1.0)))
    assert logs["kl_loss"] == pytest.approx(0, abs=1e-6) and logs["hidden_loss"] == pytest.approx(0, abs=1e-6)
    alone = evaluate(compiled(student))["loss"]
    assert logs["loss"] == pytest.approx(alone, rel=1e-5) and logs["ctc_loss"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_the_weighted_sum_of_its_terms_over_real_frames(training):
    teacher, student = recogniser(0, num_layers=2), recogniser(1, num_layers=2)
    kl = expected_kl(teacher(batch()), student(batch()), temperature=2.0)
    hidden = expected_hidden(teacher, student)
    ctc = array(keras.losses.CTC(reduction="sum")(LABELS, student(batch()), sample_weight=WEIGHTS))
    settings = {"kl_weight": 3.0, "hidden_weight": 5.0, "temperature": 2.0, "loss_weight": 0.25}
    distiller = compiled(Distiller(student, teacher, **settings))
    logs = {name: value[0] for name, value in fit(distiller).items()} if training else evaluate(distiller)
    assert logs["kl_loss"] == pytest.approx(kl, rel=1e-3)
    assert logs["hidden_loss"] == pytest.approx(hidden, rel=1e-3)
    assert logs["ctc_loss"] == pytest.approx(ctc, rel=1e-3)
    assert logs["loss"] == pytest.approx(0.25 * ctc + 3 * kl + 5 * hidden, rel=1e-3)


def test_frames_weigh_what_their_utterance_weighs_and_padding_nothing():
    logits = recogniser(0)(batch())
    real = np.arange(10) < -(-LENGTHS[:, None] // 4)
    np.testing.assert_array_equal(array(frame_weights(logits)), real)
    np.testing.assert_array_equal(array(frame_weights(logits, [2.0, 0.0, 0.5, 1.0])), real * [[2], [0], [0.5], [1]])
    each = np.arange(40, dtype="float32").reshape(4, 10)
    np.testing.assert_array_equal(array(frame_weights(logits, each)), real * each)


@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_training_brings_the_student_closer_and_leaves_the_teacher_alone(hidden_weight):
    teacher, student = recogniser(0), recogniser(1, quantization="int4")
    before = [array(weight).copy() for weight in teacher.weights]
    distiller = Distiller(student, teacher, loss_weight=0.0, hidden_weight=hidden_weight)
    assert {id(v) for v in distiller.trainable_variables} == {id(v) for v in student.trainable_variables}
    logs = fit(compiled(distiller, keras.optimizers.Adam(0.02)), epochs=8)
    assert logs["kl_loss"][-1] < 0.5 * logs["kl_loss"][0]
    if hidden_weight:
        assert logs["hidden_loss"][-1] < 0.7 * logs["hidden_loss"][0]
    for old, weight in zip(before, teacher.weights, strict=True):
        np.testing.assert_array_equal(array(weight), old)


def test_without_the_teachers_terms_the_student_learns_as_it_does_alone():
    teacher, student, alone = recogniser(0), recogniser(1), recogniser(1)
    fit(compiled(Distiller(student, teacher, kl_weight=0.0)), epochs=2)
    fit(compiled(alone), epochs=2)
    for weight, expected in zip(student.weights, alone.weights, strict=True):
        np.testing.assert_allclose(array(weight), array(expected), rtol=1e-4, atol=1e-5, err_msg=weight.path)


def test_the_student_hears_augmented_features_and_the_teacher_clean_ones():
    teacher = recogniser(0, spec_augment=True, dropout=0.3)
    student = recogniser(1, spec_augment=True, dropout=0.3)
    student.set_weights(teacher.get_weights())
    distiller = compiled(Distiller(student, teacher))
    heard = distiller(batch(), training=True)
    distiller.compute_loss(batch(), LABELS, heard, sample_weight=WEIGHTS, training=True)
    kl = float(distiller.get_metrics_result()["kl_loss"])
    assert kl > 0.01 and kl == pytest.approx(expected_kl(teacher(batch()), heard), rel=1e-3)


def test_the_losses_of_the_students_own_layers_keep_their_weight():
    def dense(seed, regularizer=None):
        layer = keras.layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(seed=seed))
        layer.kernel_regularizer = regularizer
        return keras.Sequential([keras.Input((4,)), layer])

    student = dense(1, keras.regularizers.L2(10.0))
    distiller = Distiller(student, dense(0), kl_weight=0.0, loss_weight=0.0)
    distiller.compile(keras.optimizers.SGD(0.0), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logs = distiller.fit(np.ones((8, 4)), np.ones(8), verbose=0).history
    penalty = 10 * np.square(array(student.weights[0])).sum()
    assert penalty > 0 and logs["loss"][0] == pytest.approx(penalty, rel=1e-4)
    assert logs["ctc_loss"][0] == pytest.approx(np.log(3), rel=0.2)


def test_only_the_students_layers_are_pruned():
    teacher, student = (recogniser(seed, quantization="int4", sparsity="2:4") for seed in (0, 1))
    distiller = Distiller(student, teacher, hidden_weight=1.0)
    assert usm.compressed_layers(distiller) == usm.compressed_layers(student)
    fit(compiled(distiller, jit_compile="auto"), callbacks=[usm.callbacks.NMPruning()])
    share = [[array(layer.mask).mean() for layer in usm.compressed_layers(model)] for model in (teacher, student)]
    assert set(share[0]) == {1.0} and set(share[1]) == {0.5}


def test_a_compressed_copy_learns_from_its_original():
    teacher = recogniser(0)
    student = usm.compress(teacher, {"ffn": ("int2", None)})
    distiller = Distiller(student, teacher, hidden_weight=1.0, loss_weight=0.0)
    logs = fit(compiled(distiller, keras.optimizers.Adam(0.003)), epochs=6)
    assert logs["kl_loss"][-1] < logs["kl_loss"][0] and logs["hidden_loss"][-1] < logs["hidden_loss"][0]


def test_predictions_and_metrics_are_the_students():
    class LargestLogit(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            return super().update_state(ops.max(y_pred))

    teacher, student = recogniser(0), recogniser(1)
    expected = array(student(batch()))
    distiller = Distiller(student, teacher, hidden_weight=1.0)
    loss = keras.losses.CTC(reduction="sum")
    distiller.compile(keras.optimizers.SGD(0.0), loss=loss, metrics=[LargestLogit(name="largest")])
    np.testing.assert_allclose(distiller.predict(batch(), verbose=0), expected, rtol=1e-4, atol=1e-4)
    assert fit(distiller)["largest"][0] == pytest.approx(expected.max(), rel=1e-4)
    assert evaluate(distiller)["largest"] == pytest.approx(expected.max(), rel=1e-4)


def test_a_saved_distiller_continues_where_it_was(tmp_path):
    distiller = compiled(Distiller(recogniser(1, quantization="int4"), recogniser(0), 2.0, 0.5, 3.0, 0.1, "block_0$"))
    fit(distiller)
    distiller.save(tmp_path / "distiller.keras")
    reloaded = keras.models.load_model(tmp_path / "distiller.keras")
    assert reloaded.get_config() == distiller.get_config()
    assert evaluate(reloaded) == pytest.approx(evaluate(distiller), rel=1e-4)
    assert fit(reloaded)["loss"] == pytest.approx(fit(distiller)["loss"], rel=1e-4)
    for weight, expected in zip(reloaded.weights, distiller.weights, strict=True):
        np.testing.assert_allclose(array(weight), array(expected), rtol=1e-4, atol=1e-5, err_msg=weight.path)


def test_a_backup_of_the_weights_restores_student_and_teacher(tmp_path):
    distiller = compiled(Distiller(recogniser(1), recogniser(0)))
    distiller.save_weights(tmp_path / "backup.weights.h5")
    other = compiled(Distiller(recogniser(3), recogniser(2)))
    other.load_weights(tmp_path / "backup.weights.h5")
    assert evaluate(other) == pytest.approx(evaluate(distiller), rel=1e-4)


def test_a_student_cannot_teach_itself():
    model = recogniser(0)
    with pytest.raises(ValueError, match="share .* weights.*load the checkpoint twice"):
        Distiller(model, model)


def test_hidden_states_need_corresponding_blocks():
    model = recogniser(0)
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="needs models with ConformerBlocks.*has 1.*0.*use hidden_weight=0"):
        Distiller(model, dense, hidden_weight=1.0)
    with pytest.raises(ValueError, match="student has 1 of them.*teacher 2"):
        Distiller(model, recogniser(1, num_layers=2), hidden_weight=1.0)
    with pytest.raises(ValueError, match="path matches 'no_such_layer'; the student .* has 0"):
        Distiller(model, recogniser(1), hidden_weight=1.0, hidden_layers="no_such_layer")
    with pytest.raises(ValueError, match="teacher's hidden states have 32 dimensions and the student's 16"):
        fit(compiled(Distiller(model, recogniser(1, dim=32), hidden_weight=1.0)))


def test_hidden_states_are_those_of_the_layers_that_are_named():
    teacher, student = recogniser(0, num_layers=2), recogniser(1, num_layers=2)
    wanted, given = (block_outputs(model)[0] for model in (teacher, student))
    expected = np.square(given - wanted).mean() / np.square(wanted).mean()
    logs = evaluate(compiled(Distiller(student, teacher, hidden_weight=1.0, hidden_layers="block_0$")))
    assert logs["hidden_loss"] == pytest.approx(expected, rel=1e-3)


def test_bad_arguments_are_refused_with_the_fix():
    teacher, student = recogniser(0), recogniser(1)
    with pytest.raises(ValueError, match="kl_weight must not be negative, got -1"):
        Distiller(student, teacher, kl_weight=-1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        Distiller(student, teacher, temperature=0)
    with pytest.raises(ValueError, match="teacher .* is not built"):
        Distiller(student, keras.Sequential([keras.layers.Dense(3)]))


def changed_by_a_step(remat):
    student, teacher = recogniser(1, remat=remat), recogniser(2)
    distiller = compiled(Distiller(student, teacher, kl_weight=0.0, hidden_weight=1.0, loss_weight=0.0))
    before = [array(weight) for weight in student.trainable_variables]
    distiller.fit(batch(), LABELS, batch_size=4, epochs=1, shuffle=False, verbose=0)
    return [array(weight) - old for weight, old in zip(student.trainable_variables, before, strict=True)]


def test_hidden_states_of_blocks_that_are_computed_again_teach_as_others_do():
    plain, again = changed_by_a_step(remat=False), changed_by_a_step(remat=True)
    assert max(np.abs(change).max() for change in plain) > 1e-4
    for expected, found in zip(plain, again, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_hidden_states_inside_a_block_that_is_computed_again_are_refused():
    with pytest.raises(ValueError, match="computed again"):
        Distiller(recogniser(1, remat=True), recogniser(2), hidden_weight=1.0, hidden_layers="ffn_start$")


def test_a_frozen_student_is_refused():
    student = recogniser(1)
    student.trainable = False
    with pytest.raises(ValueError, match="student .* is frozen"):
        Distiller(student, recogniser(2))
