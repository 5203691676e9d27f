"""StreamingCTC: the steps, joined, give the logits of the whole recording."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.models.streaming_ctc import StreamingCTC

BINS, VOCAB, CHUNK = 16, 9, 5
SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 5, "subsampling_channels": 4, "num_mel_bins": BINS}
STEP = 640 * CHUNK  # samples
TOLERANCE = 5e-5  # logits have a spread of about 2; the sums of running normalisation round differently
KINDS = {"int4 2:4": ("int4", "2:4"), "float": (None, None)}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def recogniser(quantization=None, sparsity=None, **arguments):
    """A model whose logits, masks and biases differ from those at the start of training."""
    keras.utils.set_random_seed(0)
    arguments = {"chunk_size": CHUNK, "causal_conv": True, **SIZE, **arguments}
    model = usm.USMForCTC(VOCAB, quantization=quantization, sparsity=sparsity, **arguments)
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(array(weight) + 0.2 * draw.normal(size=weight.shape))
    usm.update_masks(model)
    return model


@pytest.fixture(scope="module")
def models():
    return {name: recogniser(*arguments) for name, arguments in KINDS.items()}


@pytest.fixture(scope="module")
def audio():
    """A recording that gets louder, so that running normalisation has something to follow."""
    samples = 4 * STEP + 1700
    noise = np.random.default_rng(1).normal(size=samples)
    return (np.linspace(0.02, 0.3, samples) * noise).astype("float32")[None]


def compiled(function):
    """JAX compiles every operation on its own otherwise, which takes most of the time of these tests."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def running():
    return usm.LogMel(BINS, normalization="running")


def join(step, inputs, lengths=None, states=None):
    """Logits of all steps over a whole recording; zeros behind its end."""
    lengths = np.full(len(inputs), inputs.shape[1]) if lengths is None else lengths
    frames, state, found = step.chunk_shape[0], np.zeros((len(inputs), step.state_size), "float32"), []
    run = compiled(lambda *arguments: step(*arguments))
    for begin in range(0, inputs.shape[1], frames):
        chunk = inputs[:, begin : begin + frames]
        chunk = np.pad(chunk, ((0, 0), (0, frames - chunk.shape[1])) + ((0, 0),) * (inputs.ndim - 2))
        outputs = run(chunk, np.clip(lengths - begin, 0, frames).astype("int32"), state)
        state = array(outputs["state"])
        found.append(array(outputs["logits"]))
        if states is not None:
            states.append(state)
    return np.concatenate(found, axis=1)


def whole(model, inputs, frontend=None):
    """Logits of recordings heard as a whole."""
    return array(compiled(lambda x: model(x if frontend is None else frontend(x)))(inputs))


def assert_starts_with(joined, expected):
    """The steps give the logits of the whole recording, and certain blanks behind."""
    frames = expected.shape[1]
    np.testing.assert_allclose(joined[:, :frames], expected, atol=TOLERANCE)
    assert is_blank(joined[:, frames:]).all()


def is_blank(logits):
    return (logits[..., 0] == 0) & (logits[..., 1:] <= -1e4).all(axis=-1)


@pytest.mark.parametrize("name, chunks", [("int4 2:4", 1), ("int4 2:4", 3), ("float", 1), ("float", 2)])
def test_audio_step_by_step_gives_the_logits_of_the_whole(models, audio, name, chunks):
    expected = whole(models[name], audio, running())
    assert expected.shape[1] == 22 and expected.std() > 0.5
    assert_starts_with(join(StreamingCTC(models[name], running(), chunks), audio), expected)


@pytest.mark.parametrize("name, chunks", [("int4 2:4", 2), ("float", 1)])
def test_features_step_by_step_give_the_logits_of_the_whole(models, name, chunks):
    features = np.random.default_rng(2).normal(size=(2, 91, BINS)).astype("float32")
    assert_starts_with(join(StreamingCTC(models[name], chunks=chunks), features), whole(models[name], features))


def test_recordings_may_end_anywhere_and_do_not_hear_each_other(models):
    """A frame needs 512 samples and an output every fourth frame: both around and inside a step."""
    lengths = np.array([512, 1151, 1152, STEP - 129, STEP - 128, STEP, STEP + 1, 2 * STEP - 1, 2 * STEP])
    audio = 0.1 * np.random.default_rng(3).normal(size=(len(lengths), 2 * STEP)).astype("float32")
    audio *= np.arange(2 * STEP) < lengths[:, None]
    frames = running().num_frames(lengths)
    features = running()(audio, lengths=lengths)
    expected = whole(models["float"], {"features": features, "lengths": frames})
    assert is_blank(expected).sum() == (10 - -(-frames // 4)).sum() > 30
    joined = join(StreamingCTC(models["float"], running()), audio, lengths)
    np.testing.assert_allclose(joined, expected, atol=TOLERANCE)


def test_features_may_end_anywhere(models):
    lengths = np.array([1, 3, 4, 5, 19, 20, 21, 40])
    features = np.random.default_rng(3).normal(size=(len(lengths), 40, BINS)).astype("float32")
    features *= np.arange(40)[:, None] < lengths[:, None, None]
    expected = whole(models["float"], {"features": features, "lengths": lengths})
    joined = join(StreamingCTC(models["float"]), features, lengths)
    np.testing.assert_allclose(joined, expected, atol=TOLERANCE)


def test_less_than_a_frame_of_audio_is_all_blank(models, audio):
    logits = join(StreamingCTC(models["float"], running()), audio[:, :511])
    assert logits.shape[1] == CHUNK and (logits.argmax(axis=-1) == 0).all() and np.isfinite(logits).all()


def test_a_front_end_without_normalisation_streams_too(models, audio):
    frontend = usm.LogMel(BINS, normalization=None)
    expected = whole(models["float"], audio, frontend)
    assert_starts_with(join(StreamingCTC(models["float"], frontend), audio), expected)


@pytest.mark.parametrize("size", [{"kernel_size": 1, "chunk_size": 1}, {"kernel_size": 9, "num_mel_bins": 15}])
def test_other_sizes_stream_too(size):
    model = recogniser(num_layers=2, **size)
    features = np.random.default_rng(4).normal(size=(1, 30, model.num_mel_bins)).astype("float32")
    assert_starts_with(join(StreamingCTC(model), features), whole(model, features))


def test_every_part_of_the_state_matters(models, audio):
    """Erasing any part of what a step remembers changes what follows: nothing is carried along for nothing."""
    step, states = StreamingCTC(models["float"], running()), []
    join(step, audio[:, : 2 * STEP], states=states)
    ends = np.cumsum([np.prod(shape) for shape in step._shapes]).astype(int)
    assert ends[-1] == step.state_size
    copies = np.repeat(states[-1], len(ends) + 1, axis=0)  # one with nothing erased
    for row, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        copies[row, begin:end] = 0
    chunk = np.repeat(audio[:, 2 * STEP : 3 * STEP], len(copies), axis=0)
    lengths = np.full(len(copies), STEP, "int32")
    *erased, expected = array(compiled(lambda *arguments: step(*arguments))(chunk, lengths, copies)["logits"])
    assert min(np.abs(logits - expected).max() for logits in erased) > 1e-3


def test_a_compressed_copy_streams(audio):
    small = usm.compress(recogniser(), {"ffn": ("int4", "2:4")})
    usm.update_masks(small)
    assert_starts_with(join(StreamingCTC(small, running()), audio), whole(small, audio, running()))


def test_models_and_front_ends_that_cannot_stream_are_refused_with_the_fix(models, audio):
    with pytest.raises(ValueError, match=r"chunk_size=\.\.\., causal_conv=True.*chunk_size=None and causal_conv=True"):
        StreamingCTC(recogniser(chunk_size=None))
    with pytest.raises(ValueError, match="causal_conv=False; it must be trained that way"):
        StreamingCTC(recogniser(causal_conv=False))
    with pytest.raises(ValueError, match="takes 16 mel bins, the front end gives 80"):
        StreamingCTC(models["float"], usm.LogMel(normalization="running"))
    with pytest.raises(ValueError, match="sample_rate=22050 Hz.*Use 8000, 16000 or 32000"):
        StreamingCTC(models["float"], usm.LogMel(BINS, normalization="running", sample_rate=22050))
    with pytest.raises(ValueError, match="chunks=0 must be at least 1"):
        StreamingCTC(models["float"], chunks=0)
    with pytest.raises(ValueError, match="Sequential 'other' is no USMForCTC"):
        StreamingCTC(keras.Sequential(name="other"))
    with pytest.raises(ValueError, match="needs the end of a recording.*Train with LogMel.normalization='running'"):
        join(StreamingCTC(models["float"], usm.LogMel(BINS)), audio)


def test_a_model_of_sixteen_bits_streams_in_float32():
    sizes = {"num_layers": 1, "dim": 16, "num_heads": 2, "subsampling_channels": 4, "num_mel_bins": 16}
    model = usm.USMForCTC(9, chunk_size=4, causal_conv=True, dtype="mixed_bfloat16", **sizes)
    step = StreamingCTC(model)
    state = np.zeros((1, step.state_size), "float32")
    out = step(np.ones((1, *step.chunk_shape), "float32"), np.array([step.chunk_shape[0]], "int32"), state)
    assert ops.convert_to_numpy(out["logits"]).dtype == "float32"
