"""BestRQ: what it predicts and where, what it trains, and that what was learned reaches a recogniser."""

import types

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.models.best_rq import BestRQ
from keras_usm_lite.optimizers.build_optimizer import build_optimizer

BINS, BOOKS, SIZE = 20, 3, 8
ENCODER = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "dropout": 0.0}
LENGTHS = np.array([64, 41, 20, 0], "int32")
REAL = np.arange(16) < -(-LENGTHS[:, None] // 4)  # [batch, output frames]: what is not padding
JAX = keras.backend.backend() == "jax"  # elsewhere, compiling would take most of the time of these tests


def array(tensor):
    return ops.convert_to_numpy(tensor)


def best_rq(seed=0, encoder=None, rate=0.01, **settings):
    if encoder is None:
        keras.utils.set_random_seed(seed)
        encoder = usm.USMEncoder(**ENCODER)
        encoder.build((None, None, BINS))
    settings = {"num_codebooks": BOOKS, "codebook_size": SIZE, "mask_prob": 0.1, "mask_span": 3, **settings}
    model = BestRQ(encoder, seed=seed, **settings)
    model.compile(keras.optimizers.Adam(rate), run_eagerly=not JAX, jit_compile=JAX)
    return model


def batch(padding=0.0):
    """Noise with three kinds of frames, so that there is something to guess."""
    draw = np.random.default_rng(1)
    kinds = 2 * draw.normal(size=(3, BINS))[np.arange(64) // 8 % 3]
    features = (kinds + 0.3 * draw.normal(size=(4, 64, BINS))).astype("float32")
    real = np.arange(64) < LENGTHS[:, None]
    return {"features": np.where(real[..., None], features, padding).astype("float32"), "lengths": LENGTHS}


def test_targets_are_the_nearest_codes_of_four_stacked_frames():
    model = best_rq()
    stacked = batch()["features"].reshape(4, 16, 4 * BINS)
    projected = np.einsum("btf,cfd->btcd", stacked, array(model.projections))
    codes = array(model.codes)
    similarity = np.einsum("btcd,ckd->btck", projected, codes / np.linalg.norm(codes, axis=-1, keepdims=True))
    np.testing.assert_array_equal(array(model.targets(batch()))[REAL], similarity.argmax(-1)[REAL])


def test_targets_depend_neither_on_what_is_hidden_nor_on_padding():
    model = best_rq()
    before = array(model.targets(batch()))
    assert (array(model(batch())[1]) != array(model(batch())[1])).any()
    np.testing.assert_array_equal(array(model.targets(batch())), before)
    np.testing.assert_array_equal(array(model.targets(batch(padding=9.0))), before)
    np.testing.assert_array_equal(array(best_rq(mask_prob=1.0).targets(batch())), before)


def test_noise_of_a_tenth_stands_where_something_is_hidden():
    class Witness(usm.USMEncoder):
        def call(self, inputs, **kwargs):
            self.heard = array(inputs)
            return super().call(inputs, **kwargs)

    encoder = Witness(**ENCODER)
    encoder.build((None, None, BINS))
    best_rq(encoder=encoder, mask_prob=1.0)(batch())
    heard = encoder.heard[np.arange(64) < LENGTHS[:, None]]
    assert (heard.mean(), heard.std()) == pytest.approx((0.0, 0.1), abs=0.01)


def test_losses_of_the_encoders_own_layers_are_added():
    encoder = usm.USMEncoder(quantization=usm.QuantizationConfig(2, error_loss=10.0), **ENCODER)
    encoder.build((None, None, BINS))
    model = best_rq(encoder=encoder)
    outputs = model(batch(), training=True)
    own = sum(float(loss) for loss in model.losses)
    logits, hidden = (array(output) for output in outputs)
    codes, weights = array(model.targets(batch())), hidden & REAL
    errors = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, codes[..., None], -1)[..., 0]
    loss = float(model.compute_loss(batch(), y_pred=outputs))
    assert own > 0.01 and loss == pytest.approx((weights * errors.mean(-1)).sum() / weights.sum() + own, rel=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_of_four_replicas_each_counts_a_quarter(monkeypatch):
    import tensorflow as tf

    encoder = usm.USMEncoder(quantization=usm.QuantizationConfig(2, error_loss=10.0), **ENCODER)
    encoder.build((None, None, BINS))
    model = best_rq(encoder=encoder)
    outputs = model(batch(), training=True)
    whole = float(model.compute_loss(batch(), y_pred=outputs))
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: types.SimpleNamespace(num_replicas_in_sync=4))
    assert float(model.compute_loss(batch(), y_pred=outputs)) == pytest.approx(whole / 4, rel=1e-5)


def test_what_is_hidden_cannot_be_heard():
    model = best_rq(mask_prob=1.0)
    other = {"features": -batch()["features"], "lengths": LENGTHS}
    keras.utils.set_random_seed(0)
    first, second = best_rq(mask_prob=1.0)(batch())[0], best_rq(mask_prob=1.0)(other)[0]
    np.testing.assert_allclose(array(first)[REAL], array(second)[REAL], atol=1e-5)
    clear = array(best_rq(mask_prob=1e-9)(batch())[0]) - array(best_rq(mask_prob=1e-9)(other)[0])
    assert np.abs(clear[REAL]).max() > 0.1
    assert array(model(batch())[1]).tolist() == REAL.tolist()


def test_padding_is_neither_heard_nor_counted():
    (first, hidden), (second, _) = best_rq()(batch()), best_rq()(batch(padding=9.0))
    np.testing.assert_allclose(array(first)[REAL], array(second)[REAL], atol=1e-5)
    assert not (array(hidden) & ~REAL).any() and array(hidden).any()


def test_hidden_spans_are_determined_by_the_seed():
    spans = [array(best_rq(seed)(batch())[1]).tolist() for seed in (0, 0, 1)]
    assert spans[0] == spans[1] != spans[2]


def test_codes_are_determined_by_the_seed():
    codes = [array(best_rq(seed).codes) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


@pytest.mark.parametrize("sample_weight", [None, np.array([0.0, 2.0, 1.0, 1.0], "float32")])
def test_the_loss_is_the_cross_entropy_at_hidden_real_frames(sample_weight):
    model = best_rq()
    logits, hidden = model(batch())
    loss = model.compute_loss(batch(), y_pred=(logits, hidden), sample_weight=sample_weight)
    weights = (array(hidden) & REAL) * (np.ones(4) if sample_weight is None else sample_weight)[:, None]
    codes, scores = array(model.targets(batch())), array(logits).astype("float64")
    errors = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, codes[..., None], -1)[..., 0]
    hits = scores.argmax(-1) == codes
    assert float(loss) == pytest.approx((weights * errors.mean(-1)).sum() / weights.sum(), rel=1e-4)
    accuracy = float(model.get_metrics_result()["accuracy"])
    assert accuracy == pytest.approx((weights * hits.mean(-1)).sum() / weights.sum(), rel=1e-4)


def test_a_head_of_zeros_costs_the_logarithm_of_the_codebook_size():
    model = best_rq(rate=0.0)
    model.head.kernel.assign(np.zeros(model.head.kernel.shape))
    logs = model.evaluate(batch(), batch_size=4, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(np.log(SIZE), rel=1e-5)


def test_training_learns_to_guess_and_leaves_the_codes_alone():
    model = best_rq()
    frozen = [array(model.projections).copy(), array(model.codes).copy()]
    names = {id(v) for v in model.trainable_variables}
    assert names == {id(v) for layer in (model.encoder, model.head) for v in layer.trainable_variables}
    before = array(model.encoder.subsampling.projection.kernel).copy()
    model.compile(model.optimizer, jit_compile=JAX)  # so many steps are worth a graph
    build_optimizer(model)
    logs = model.fit(batch(), batch_size=4, epochs=60, verbose=0).history
    assert np.mean(logs["loss"][-5:]) < 0.7 * np.mean(logs["loss"][:5])
    assert np.mean(logs["accuracy"][-5:]) > 0.6 > np.mean(logs["accuracy"][:5])
    assert (array(model.encoder.subsampling.projection.kernel) != before).any()
    for old, new in zip(frozen, (model.projections, model.codes), strict=True):
        np.testing.assert_array_equal(array(new), old)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch has no XLA here")
def test_the_whole_step_compiles_and_is_traced_once_per_shape():
    class Counted(BestRQ):
        traces = 0

        def compute_loss(self, *args, **kwargs):
            Counted.traces += 1
            return super().compute_loss(*args, **kwargs)

    model = Counted(best_rq().encoder, BOOKS, SIZE)
    model.compile("adam", jit_compile=True)
    model.fit(batch(), batch_size=4, epochs=1, verbose=0)
    traces = Counted.traces
    logs = model.fit(batch(), batch_size=4, epochs=3, verbose=0).history
    assert Counted.traces == traces > 0 and np.isfinite(logs["loss"]).all()


def test_what_was_learned_moves_into_a_recogniser_with_equal_outputs(tmp_path):
    model = best_rq()
    model.fit(batch(), batch_size=4, verbose=0)
    recogniser = usm.USMForCTC(9, num_mel_bins=BINS, spec_augment=False, **ENCODER)
    keras.saving.save_weights(model.encoder, tmp_path / "encoder.weights.h5")
    keras.saving.load_weights(recogniser.encoder, tmp_path / "encoder.weights.h5")
    features = batch()["features"]
    np.testing.assert_array_equal(array(recogniser.encoder(features)), array(model.encoder(features)))


def test_the_encoder_of_a_recogniser_is_trained_in_place():
    recogniser = usm.USMForCTC(9, num_mel_bins=BINS, quantization="int4", sparsity="2:4", **ENCODER)
    before = array(recogniser(batch()["features"])).copy()
    model = best_rq(encoder=recogniser.encoder)
    assert usm.compressed_layers(model) == usm.compressed_layers(recogniser.encoder)
    model.fit(batch(), batch_size=4, verbose=0)
    assert (array(recogniser(batch()["features"])) != before).any()


def test_a_saved_model_continues_where_it_was(tmp_path):
    model = best_rq(codebook_size=5, code_dim=4, seed=3)
    model.fit(batch(), batch_size=4, verbose=0)
    model.save(tmp_path / "best_rq.keras")
    reloaded = keras.models.load_model(tmp_path / "best_rq.keras")
    configs = [{**m.get_config(), "encoder": m.encoder.get_config()} for m in (reloaded, model)]
    assert configs[0] == configs[1]
    np.testing.assert_array_equal(array(reloaded.targets(batch())), array(model.targets(batch())))
    for weight, expected in zip(reloaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(array(weight), array(expected), err_msg=weight.path)
    assert np.isfinite(reloaded.fit(batch(), batch_size=4, verbose=0).history["loss"]).all()


def test_half_precision_scores_and_codes_stay_float32():
    encoder = usm.USMEncoder(**ENCODER, dtype="mixed_bfloat16")
    encoder.build((None, None, BINS))
    model = best_rq(encoder=encoder)
    logits, _ = model(batch())
    assert {keras.backend.standardize_dtype(x.dtype) for x in (logits, model.codes)} == {"float32"}
    np.testing.assert_array_equal(array(model.targets(batch())), array(best_rq().targets(batch())))


def test_bad_arguments_are_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"is not built; call encoder.build"):
        BestRQ(usm.USMEncoder(**ENCODER))
    for name in ("num_codebooks", "codebook_size", "code_dim", "mask_span"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            best_rq(**{name: 0})
    with pytest.raises(ValueError, match="mask_prob must lie above 0 and not above 1, got 1.5"):
        best_rq(mask_prob=1.5)
