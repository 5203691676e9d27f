"""CoTrainer: its branches against models set to each precision by hand, their gradients, and what training leaves."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.layers.feed_forward import FeedForward
from keras_usm_lite.layers.masking import frame_mask
from keras_usm_lite.models.co_trainer import CoTrainer
from keras_usm_lite.optimizers.build_optimizer import build_optimizer

BINS, VOCAB = 40, 7
JIT = keras.backend.backend() == "jax"  # elsewhere compiling and tracing would take most of the time of these tests
FRAMES, LAYERS = 40, 5  # quantized ones
LENGTHS = np.array([FRAMES, 29, 22, 0], "int32")
WEIGHTS = np.array([1, 0, 1, 0], "float32")
REAL = (np.arange(FRAMES) < LENGTHS[:, None]) & (WEIGHTS[:, None] > 0)  # [batch, frames]: what counts
LABELS = np.array([[1, 2, 3, 3], [4, 4, 0, 0], [6, 5, 0, 0], [0, 0, 0, 0]], "int32")
SEEDED_DROPOUT = keras.backend.backend() != "torch"  # there Keras' dropout draws from PyTorch's own generator


def array(tensor):
    return ops.convert_to_numpy(tensor)


@keras.saving.register_keras_serializable(package="test_co_trainer")
class BlankPadding(keras.layers.Layer):
    """Makes the logits of padded frames certain blanks."""

    def call(self, logits, lengths):
        heard = ops.expand_dims(frame_mask(lengths, FRAMES), -1)
        return ops.where(heard, logits, -1e4 * ops.cast(ops.arange(VOCAB) > 0, "float32"))


def recogniser(quantization="int2", sparsity=None, dropout=0.0, spec_augment=False):
    """Feed-forward modules and a head, which are compiled sooner than a Conformer."""
    keras.utils.set_random_seed(0)
    features, lengths = keras.Input((FRAMES, BINS), name="features"), keras.Input((), dtype="int32", name="lengths")
    x = usm.SpecAugment()(features) if spec_augment else features
    x = usm.QuantDense(16, quantization, sparsity)(x)
    for _ in range(2):
        x = keras.layers.Add()([x, FeedForward(2, dropout, quantization, sparsity)(x)])
    logits = BlankPadding()(keras.layers.Dense(VOCAB)(x), lengths)
    model = keras.Model({"features": features, "lengths": lengths}, logits)
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        if weight.name != "scale_gain":
            weight.assign(array(weight) + 0.4 * draw.normal(size=weight.shape))
    for layer in usm.compressed_layers(model):
        layer.update_scale()
    return model


def at_bits(bits, **kwargs):
    """A copy of the recogniser whose layers are set to a precision."""
    model = recogniser(**kwargs)
    for layer in usm.compressed_layers(model):
        layer.bits.assign(bits)
    return model


def batch():
    features = np.random.default_rng(1).normal(size=(4, FRAMES, BINS)).astype("float32")
    return {"features": features, "lengths": LENGTHS}


def compiled(model, optimizer=None, jit_compile=JIT):
    loss = keras.losses.CTC(reduction="sum")
    model.compile(
        optimizer or keras.optimizers.SGD(0.01),
        loss=loss,
        jit_compile=jit_compile,
        run_eagerly=not jit_compile,
    )
    build_optimizer(model)
    return model


def fit(model, epochs=1):
    """Logs of the steps on the one batch."""
    return model.fit(batch(), LABELS, 4, epochs, verbose=0, sample_weight=WEIGHTS).history


def evaluate(model):
    return model.evaluate(batch(), LABELS, batch_size=4, sample_weight=WEIGHTS, verbose=0, return_dict=True)


def expected_loss(model):
    return float(array(keras.losses.CTC(reduction="sum")(LABELS, model(batch()), sample_weight=WEIGHTS)))


def expected_kl(high, low):
    p, q = (array(ops.softmax(model(batch())))[REAL].astype("float64") for model in (high, low))
    return (p * np.log(p / q)).sum(axis=-1).mean()


def steps(model):
    """What one training step adds to each trainable variable, by path within the encoder or head."""
    start = [array(v).copy() for v in model.trainable_variables]
    fit(model)
    return [array(v) - old for v, old in zip(model.trainable_variables, start, strict=True)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("high_bits, in_force", [(8, 8), (4, 4), (None, 24)])
def test_a_step_is_the_sum_of_the_losses_of_both_precisions(high_bits, in_force, training):
    low, high = recogniser(), at_bits(in_force)
    losses = [expected_loss(high), expected_loss(low), expected_kl(high, low)]
    trainer = compiled(CoTrainer(low, high_bits, low_weight=0.25, kl_weight=3.0))
    logs = {name: value[0] for name, value in fit(trainer).items()} if training else evaluate(trainer)
    assert losses[0] != pytest.approx(losses[1], rel=0.01) and losses[2] > 0.01
    assert [logs[name] for name in ("high_loss", "low_loss", "kl_loss")] == pytest.approx(losses, rel=1e-3)
    assert logs["loss"] == pytest.approx(losses[0] + 0.25 * losses[1] + 3.0 * losses[2], rel=1e-3)


def test_the_gradient_is_the_sum_of_the_gradients_of_both_precisions():
    low, high = steps(compiled(recogniser())), steps(compiled(at_bits(8)))
    both = steps(compiled(CoTrainer(recogniser(), low_weight=0.5, kl_weight=0.0)))
    for step, one, other in zip(both, low, high, strict=True):
        np.testing.assert_allclose(step, 0.5 * one + other, rtol=1e-3, atol=1e-4)
        assert np.abs(one - other).max() > 1e-4 or np.abs(step).max() < 1e-4


def test_the_divergence_teaches_the_low_precision_only():
    from keras_usm_lite.models.distiller import Distiller

    with_kl, without = (steps(compiled(CoTrainer(recogniser(), kl_weight=weight))) for weight in (1.0, 0.0))
    taught = steps(compiled(Distiller(recogniser(), at_bits(8), loss_weight=0.0)))
    for step, rest, expected in zip(with_kl, without, taught, strict=True):
        np.testing.assert_allclose(step - rest, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 2, "scale": "learned"},
        {"bits": 2, "scale": "mse"},
        {"bits": 2, "scale": "mse", "codebook": "asymmetric"},
        {"bits": 1},
    ],
)
def test_a_stored_scale_gives_way_to_absmax_at_high_precision(quantization):
    low = recogniser(usm.QuantizationConfig(**quantization))
    codebook = usm.compressed_layers(low)[0].quantization.codebook
    absmax = recogniser(usm.QuantizationConfig(bits=4, codebook=codebook))
    logs = evaluate(compiled(CoTrainer(low, high_bits=4)))
    assert logs["high_loss"] == pytest.approx(expected_loss(absmax), rel=1e-3)
    assert logs["low_loss"] == pytest.approx(expected_loss(low), rel=1e-3)


def test_a_frozen_scale_gives_way_to_absmax_at_high_precision():
    low = recogniser()
    for layer in usm.compressed_layers(low):
        layer.freeze_scale()
    assert evaluate(compiled(CoTrainer(low)))["high_loss"] == pytest.approx(expected_loss(at_bits(8)), rel=1e-3)


def test_a_learned_scale_learns_from_the_low_precision_only():
    learned = usm.QuantizationConfig(bits=2, scale="learned")
    for low_weight, learns in ((0.0, False), (0.5, True)):
        student = recogniser(learned)
        moved = steps(compiled(CoTrainer(student, low_weight=low_weight, kl_weight=0.0)))
        scales = [s for s, v in zip(moved, student.trainable_variables, strict=True) if v.name == "scale_gain"]
        assert len(scales) == LAYERS and any(np.any(scale) for scale in scales) == learns


def test_training_changes_neither_bits_nor_masks_and_moves_the_random_seeds():
    student = recogniser(sparsity="2:4", dropout=0.3, spec_augment=True)
    usm.update_masks(student)
    kept = [v for v in student.non_trainable_variables if v.name in ("bits", "mask", "scale_frozen", "mask_fade")]
    seeds = [v for v in student.non_trainable_variables if "seed" in v.name][: None if SEEDED_DROPOUT else 1]
    before = [[array(v).copy() for v in variables] for variables in (kept, seeds)]
    trainer = CoTrainer(student, stochastic=True, seed=0)
    seeds.append(trainer.seed_generator.state)
    before[1].append(array(trainer.seed_generator.state).copy())
    fit(compiled(trainer, jit_compile="auto"), epochs=2)
    for variable, old in zip(kept, before[0], strict=True):
        np.testing.assert_array_equal(array(variable), old)
    for variable, old in zip(seeds, before[1], strict=True):
        assert np.any(array(variable) != old), variable.path


def test_training_lowers_the_losses_of_both_precisions_and_their_divergence():
    logs = fit(compiled(CoTrainer(recogniser(), kl_weight=30.0), keras.optimizers.Adam(0.01), "auto"), epochs=8)
    for name in ("high_loss", "low_loss", "kl_loss"):
        assert logs[name][-1] < 0.8 * logs[name][0], name


def test_all_branches_see_the_same_noise():
    student = recogniser("int8", dropout=0.3 if SEEDED_DROPOUT else 0.0, spec_augment=True)
    trainer = CoTrainer(student, high_bits=None, stochastic=True)
    low, high, mixed = (array(logits)[REAL] for logits in trainer(batch(), training=True))
    again = array(trainer(batch(), training=True)[0])[REAL]
    noise = np.abs(again - low).mean()
    assert np.abs(high - low).mean() < 0.2 * noise and np.abs(mixed - low).mean() < 0.2 * noise


def test_the_mixed_branch_raises_the_layers_that_were_not_drawn():
    student, by_hand = recogniser(), recogniser()
    trainer = CoTrainer(student, stochastic=True)
    layers = usm.compressed_layers(by_hand)
    for shown in (0, 2, len(layers)):  # the first layers stay low
        for i, layer in enumerate(layers):
            layer.bits.assign(2 if i < shown else 8)
        logits = trainer._at_high_bits(batch(), training=False, low_layers=np.arange(len(layers)) < shown)
        np.testing.assert_allclose(array(logits), array(by_hand(batch())), rtol=1e-4, atol=1e-4)


def test_deeper_layers_are_low_bit_more_often():
    trainer = CoTrainer(recogniser(), stochastic=True, seed=0)
    share = np.mean([array(trainer._draw_low_layers()) for _ in range(1000)], axis=0)
    expected = 0.2 * (0.9 / 0.2) ** np.linspace(0, 1, LAYERS)
    np.testing.assert_allclose(share, expected, atol=0.06)  # four standard deviations


def test_the_mixed_branch_counts_as_the_low_one():
    logs = fit(compiled(CoTrainer(recogniser(), low_weight=0.25, stochastic=True, seed=0)))
    low, high, kl, mixed = (logs[f"{name}_loss"][0] for name in ("low", "high", "kl", "mixed"))
    assert mixed not in (low, high)
    assert logs["loss"][0] == pytest.approx(high + 0.25 * (low + mixed) + kl, rel=1e-4)


@pytest.mark.parametrize("scale", ["absmax", "mse", "learned", "frozen"])
def test_layers_at_or_above_the_high_precision_stay_as_they_are(scale):
    high = usm.QuantizationConfig(4 if scale != "absmax" else 8, scale=scale if scale != "frozen" else "absmax")
    student = keras.Sequential([keras.Input((4,)), usm.QuantDense(8, high), usm.QuantDense(3, quantization="int2")])
    if scale == "frozen":
        student.layers[0].set_frozen_scale(0.7 * array(student.layers[0].quantized_kernel()[1]))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    raised = array(CoTrainer(student, high_bits=4)._at_high_bits(x, training=False))
    student.layers[1].bits.assign(4)
    np.testing.assert_allclose(raised, array(student(x)), rtol=1e-5, atol=1e-6)


def test_predictions_are_made_at_low_precision():
    student = recogniser()
    expected = array(student(batch()))
    np.testing.assert_allclose(CoTrainer(student).predict(batch(), verbose=0), expected, rtol=1e-4, atol=1e-4)


def test_the_losses_of_the_students_own_layers_count_once():
    regularizer = keras.regularizers.L2(10.0)
    student = keras.Sequential([keras.Input((4,)), usm.QuantDense(3, "int2", kernel_regularizer=regularizer)])
    trainer = CoTrainer(student, low_weight=0.0, kl_weight=0.0)
    trainer.compile(keras.optimizers.SGD(0.0), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logs = trainer.fit(np.ones((8, 4)), np.ones(8), verbose=0).history
    penalty = 10 * np.square(array(student.layers[0].kernel)).sum()
    assert logs["loss"][0] == pytest.approx(logs["high_loss"][0] + penalty, rel=1e-4)
    student.layers[0].bits.assign(8)
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(np.ones(8), student(np.ones((8, 4))))
    assert logs["high_loss"][0] == pytest.approx(array(expected), rel=1e-3)


def test_a_saved_co_trainer_continues_where_it_was(tmp_path):
    trainer = compiled(CoTrainer(recogniser(sparsity="2:4"), 4, 0.25, 2.0))
    fit(trainer)
    trainer.save(tmp_path / "trainer.keras")
    reloaded = keras.models.load_model(tmp_path / "trainer.keras")
    student = ("student", None)  # Keras writes the tuples of a functional model as lists
    assert dict([*reloaded.get_config().items(), student]) == dict([*trainer.get_config().items(), student])
    assert evaluate(reloaded) == pytest.approx(evaluate(trainer), rel=1e-4)
    assert fit(reloaded)["loss"] == pytest.approx(fit(trainer)["loss"], rel=1e-4)


def test_bad_arguments_are_refused_with_the_fix():
    dense = keras.Sequential([keras.Input((4,)), usm.QuantDense(3, quantization="int4")])
    with pytest.raises(ValueError, match="high_bits must be an integer from 2 to 8, or None for float, got 16"):
        CoTrainer(dense, high_bits=16)
    with pytest.raises(ValueError, match=r"1 quantized layers, of \[4\] bits; .* below high_bits=4"):
        CoTrainer(dense, high_bits=4)
    with pytest.raises(ValueError, match="0 quantized layers"):
        CoTrainer(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="low_weight must not be negative, got -1"):
        CoTrainer(dense, low_weight=-1)
    with pytest.raises(ValueError, match="is not built"):
        CoTrainer(keras.Sequential([usm.QuantDense(3)]))
