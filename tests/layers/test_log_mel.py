"""LogMel: numpy's Fourier transform and a mel bank written from its definition are the judges."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

import keras_usm_lite as usm

SIZES = {8000: (200, 80, 256), 16000: (400, 160, 512)}  # window, stride and transform in samples


def array(tensor):
    return ops.convert_to_numpy(tensor)


def noise(samples=4000, seed=0):
    return 0.3 * np.random.default_rng(seed).normal(size=samples).astype("float32")


def mel(hertz):
    return 1127 * np.log1p(np.asarray(hertz) / 700)


def mel_bank(bins, rate, low, high):
    """Triangles of height 1, evenly spaced on the mel scale, `[frequencies, bins]`."""
    frequencies = mel(np.linspace(0, rate / 2, SIZES[rate][2] // 2 + 1))
    edges = np.linspace(mel(low), mel(high), bins + 2)
    return np.stack([np.interp(frequencies, edges[i : i + 3], [0, 1, 0]) for i in range(bins)], axis=1)


def expected_log_mel(audio, bins=80, rate=16000, low=40, high=7600):
    window, stride, transform = SIZES[rate]
    beside = (transform - window) // 2
    hann = np.pad(np.hanning(window + 1)[:-1], beside)  # periodic
    starts = range(0, len(audio) - transform + 1, stride)
    frames = np.stack([audio[s : s + transform] * hann for s in starts]).astype("float64")
    return np.log(np.abs(np.fft.rfft(frames)) ** 2 @ mel_bank(bins, rate, low, high) + 1e-6)


class LayerContract(TestCase):
    def test_log_mel_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            usm.LogMel,
            init_kwargs={"num_mel_bins": 20, "normalization": "running", "max_frequency": 7000.0},
            input_shape=(2, 1200),
            expected_output_shape=(2, 5, 20),
            expected_num_trainable_weights=0,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )


@pytest.mark.parametrize("bins, rate, low, high", [(80, 16000, 40, 7600), (40, 16000, 125, 7500), (40, 8000, 60, 3800)])
def test_features_are_the_log_of_mel_weighted_power(bins, rate, low, high):
    audio = noise()
    layer = usm.LogMel(bins, normalization=None, sample_rate=rate, min_frequency=low, max_frequency=high)
    np.testing.assert_allclose(
        array(layer(audio[None]))[0], expected_log_mel(audio, bins, rate, low, high), rtol=1e-3, atol=1e-3
    )


def test_silence_is_the_logarithm_of_the_floor():
    features = array(usm.LogMel(normalization=None)(np.zeros((1, 4000), "float32")))
    np.testing.assert_allclose(features, np.log(1e-6), rtol=1e-6)


@pytest.mark.parametrize("hertz", [250, 440, 1000, 3000, 7000])
def test_a_pure_tone_is_loudest_in_the_filter_centred_nearest_to_it(hertz):
    audio = np.sin(2 * np.pi * hertz * np.arange(4000) / 16000).astype("float32")
    centres = np.linspace(mel(40), mel(7600), 82)[1:-1]
    features = array(usm.LogMel(normalization=None)(audio[None]))[0]
    np.testing.assert_array_equal(features.argmax(axis=-1), np.abs(centres - mel(hertz)).argmin())


@pytest.mark.parametrize("bins", [80, 128])
def test_every_filter_hears_something(bins):
    features = array(usm.LogMel(bins, normalization=None)(noise()[None]))[0]
    deaf = np.flatnonzero(np.all(features < np.log(2e-6), axis=0))
    assert not deaf.size, f"white noise does not reach the filters {deaf.tolist()}"


@pytest.mark.parametrize("samples", [512, 671, 672, 673, 831, 832, 16000])
def test_frames_are_the_whole_windows_that_fit(samples):
    layer = usm.LogMel()
    frames = len(range(0, samples - 512 + 1, 160))
    assert layer.num_frames(samples) == frames
    assert layer.compute_output_shape((1, samples)) == (1, frames, 80)
    np.testing.assert_array_equal(array(layer.num_frames(ops.convert_to_tensor([samples]))), [frames])


@pytest.mark.parametrize("samples", [512, 2500, 4000])
def test_the_promised_frames_come_out(samples):
    layer = usm.LogMel(normalization=None)
    assert layer(noise(samples)[None]).shape[1] == layer.num_frames(samples)


def test_utterance_normalisation_gives_zero_mean_and_unit_deviation_over_the_real_frames():
    lengths = [4000, 2500, 3500]
    features = array(usm.LogMel()(np.stack([noise(seed=seed) for seed in range(3)]), lengths=lengths))
    for row, samples in zip(features, lengths, strict=True):
        real = row[: usm.LogMel().num_frames(samples)]
        np.testing.assert_allclose(real.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(real.std(axis=0), 1, atol=1e-3)
        assert not row[len(real) :].any()


@pytest.mark.parametrize("normalization", ["utterance", "running"])
def test_loudness_does_not_matter_after_normalisation(normalization):
    layer = usm.LogMel(normalization=normalization)
    loud, quiet = (array(layer(scale * noise()[None])) for scale in (1.0, 0.3))
    np.testing.assert_allclose(loud[0, 1:], quiet[0, 1:], atol=0.02)


def test_normalised_silence_is_zero():
    for normalization in ("utterance", "running"):
        features = array(usm.LogMel(normalization=normalization)(np.zeros((1, 4000), "float32")))
        np.testing.assert_allclose(features, 0, atol=1e-2)


def running(raw):
    """Each frame normalised by the mean and deviation of the frames so far, in float64."""
    so_far = [raw[: t + 1] for t in range(len(raw))]
    return np.stack([(x[-1] - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-2) for x in so_far])


def utterance(raw):
    return (raw - raw.mean(axis=0)) / np.maximum(raw.std(axis=0), 1e-2)


@pytest.mark.parametrize("volume", [1.0, 1e-2, 3e-5])  # the last one is near the floor
@pytest.mark.parametrize("expected", [utterance, running])
def test_normalisation_follows_its_definition_at_every_volume(expected, volume):
    audio = np.float32(volume) * noise()
    features = array(usm.LogMel(normalization=expected.__name__)(audio[None]))[0]
    np.testing.assert_allclose(features, expected(expected_log_mel(audio)), atol=0.02)


def test_running_normalisation_never_looks_ahead():
    layer = usm.LogMel(normalization="running")
    whole = array(layer(noise()[None]))[0]
    start = array(layer(noise()[None, :2500]))[0]
    assert len(start) == layer.num_frames(2500) < len(whole)
    np.testing.assert_allclose(whole[: len(start)], start, atol=1e-2)


def test_running_normalisation_ends_where_utterance_normalisation_is():
    so_far, whole = (array(usm.LogMel(normalization=n)(noise()[None])) for n in ("running", "utterance"))
    np.testing.assert_allclose(so_far[0, -1], whole[0, -1], atol=1e-3)
    assert np.abs(so_far - whole).max() > 0.1


@pytest.mark.parametrize("normalization", ["utterance", "running", None])
def test_an_utterance_is_the_same_alone_and_in_a_padded_batch(normalization):
    layer = usm.LogMel(normalization=normalization)
    lengths = [2500, 4000, 700]
    batch = np.stack([noise(seed=seed) for seed in range(3)])  # the padding is noise, not silence
    features = array(layer(batch, lengths=np.array(lengths)))
    for row, audio, samples in zip(features, batch, lengths, strict=True):
        alone = array(layer(audio[None, :samples]))[0]
        np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-2)
        assert not row[len(alone) :].any()


@pytest.mark.parametrize("normalization", ["utterance", "running", None])
def test_audio_too_short_for_a_frame_is_all_padding(normalization):
    features = array(usm.LogMel(normalization=normalization)(noise()[None], lengths=[100]))
    np.testing.assert_array_equal(features, np.zeros((1, 22, 80)))


def test_features_are_float32_under_a_16_bit_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        features = usm.LogMel()(noise()[None])
    finally:
        keras.config.set_dtype_policy("float32")
    assert keras.backend.standardize_dtype(features.dtype) == "float32"


def test_it_is_part_of_a_model_of_any_length_and_survives_saving(tmp_path):
    audio, lengths = keras.Input((None,)), keras.Input((), dtype="int32")
    model = keras.Model([audio, lengths], usm.LogMel(20, normalization="running")(audio, lengths=lengths))
    assert model.output_shape == (None, None, 20)
    model.save(tmp_path / "log_mel.keras")
    reloaded = keras.models.load_model(tmp_path / "log_mel.keras")
    batch = [noise((2, 1200)), np.array([1200, 900], "int32")]
    np.testing.assert_array_equal(reloaded.predict(batch, verbose=0), model.predict(batch, verbose=0))


def test_bad_arguments_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"normalization='batch'.*'utterance', 'running', None"):
        usm.LogMel(normalization="batch")
    with pytest.raises(ValueError, match=r"\[batch, samples\], got shape \(16000,\)"):
        usm.LogMel()(np.zeros(16000, "float32"))
    with pytest.raises(ValueError, match=r"\[batch, samples\], got shape \(1, 16000, 1\)"):
        usm.LogMel()(np.zeros((1, 16000, 1), "float32"))


def test_audio_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="511 samples.*512"):
        usm.LogMel()(noise(511)[None])


def test_a_filter_bank_beyond_half_the_sample_rate_is_refused():
    with pytest.raises(ValueError, match=r"max_frequency=7600.0.*4000"):
        usm.LogMel(sample_rate=8000)


@pytest.mark.parametrize("normalization, rate", [("running", 16000), (None, 8000)])
def test_steps_give_the_frames_of_the_whole_recording(normalization, rate):
    layer = usm.LogMel(20, normalization=normalization, sample_rate=rate, max_frequency=3800.0)
    step, lengths = 8 * layer.stride, np.array([2700, 1100, 200])
    audio = np.stack([noise(2700, seed) for seed in range(3)]) * (np.arange(2700) < lengths[:, None])
    pasts, found, masks = [np.zeros((3, *shape), "float32") for shape in layer.past_shapes()], [], []
    for begin in range(0, 2700, step):
        chunk = audio[:, begin : begin + step]
        chunk = np.pad(chunk, ((0, 0), (0, step - chunk.shape[1]))).astype("float32")
        real = np.clip(lengths - begin, 0, step).astype("int32")
        features, mask, pasts = layer.step(chunk, pasts, np.full((3, 1), begin > 0, "float32"), real)
        found.append(array(features))
        masks.append(array(mask))
    found, mask = np.concatenate(found, axis=1), np.concatenate(masks, axis=1)
    whole = array(layer(audio.astype("float32"), lengths=lengths))
    assert layer.lag == 3 and not found[:, :3].any()
    np.testing.assert_allclose(found[:, 3 : 3 + whole.shape[1]], whole, atol=1e-3)
    frames = np.maximum(layer.num_frames(lengths), 0)
    np.testing.assert_array_equal(mask[:, 3:].sum(axis=1), frames)


def test_a_stream_is_not_normalised_by_what_it_has_not_heard():
    with pytest.raises(ValueError, match="needs the end of a recording.*normalization='running'"):
        usm.LogMel().step(np.zeros((1, 1600)), [], np.zeros((1, 1)), np.array([1600]))
