"""verify_litert: passes on what export_litert writes, and refuses a file that was changed or is of another model."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.data.audio import load_audio, write_wav
from keras_usm_lite.decoding import greedy_decode
from keras_usm_lite.export import litert, litert_integers
from keras_usm_lite.export.litert_weights import read_litert_weights
from keras_usm_lite.export.parity_error import ParityError
from keras_usm_lite.export.verify import verify_litert

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

BINS, VOCAB = 16, 9
SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": BINS}
TOKENIZER = usm.CharTokenizer("abcdefg ")
FRONTEND = usm.LogMel(BINS, normalization=None)
BITS = {"float": None, "int8": 8, "int4": 4, "int2": 2}


def recogniser(bits, seed=0):
    keras.utils.set_random_seed(seed)
    quantization = None if bits is None else usm.QuantizationConfig(bits=bits, scale="mse")
    model = usm.USMForCTC(VOCAB, quantization=quantization, **SIZE)
    draw = np.random.default_rng(seed)
    for weight in model.trainable_variables:  # larger than at the start of training, so that tokens change
        change = 0.3 * draw.normal(size=weight.shape) * (weight.name in ("kernel", "bias"))
        weight.assign(ops.convert_to_numpy(weight) + change)
    for layer in usm.compressed_layers(model):
        layer.update_scale()
    return model


def labelled(model, inputs, lengths, frontend=None, fill_rows=0):
    """A batch whose references are what the model hears, so that its own WER is 0."""
    features = inputs if frontend is None else ops.convert_to_numpy(frontend(inputs, lengths=lengths))
    frames = lengths if frontend is None else np.array([frontend.num_frames(length) for length in lengths])
    heard = greedy_decode(model({"features": features, "lengths": frames}))
    labels = np.zeros((len(heard), max(map(len, heard))), int)
    for row, ids in enumerate(heard):
        labels[row, : len(ids)] = ids
    weight = np.ones(len(heard))
    weight[len(heard) - fill_rows :] = 0
    name = "features" if frontend is None else "audio"
    return {name: inputs, "lengths": lengths}, labels, weight


def batches(model):
    draw = np.random.default_rng(1)
    features = draw.normal(size=(5, 120, BINS)).astype("float32")
    lengths = np.array([120, 77, 96, 40, 120])
    return [labelled(model, features, lengths, fill_rows=1), labelled(model, features[:2, :64], np.array([64, 63]))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`name -> (model, path, dataset)`."""
    folder, done = tmp_path_factory.mktemp("exports"), {}

    def export(name):
        if name not in done:
            model = recogniser(BITS[name])
            done[name] = model, usm.export_litert(model, folder / f"{name}.tflite"), batches(model)
        return done[name]

    return export


@pytest.mark.parametrize("name", BITS)
def test_an_export_passes_and_everything_is_counted(exported, name):
    model, path, dataset = exported(name)
    parity = verify_litert(model, path, dataset, TOKENIZER, tolerance=0.3)
    assert parity.keras.wer == 0 and parity.keras.utterances == parity.litert.utterances == 6  # no fill rows
    assert parity.frames == sum(-(-length // 4) for length in (120, 77, 96, 40, 64, 63))
    layers = usm.compressed_layers(model)
    assert parity.kernels == len(layers) == (0 if name == "float" else 11)
    assert parity.integers == sum(layer.kernel.shape[0] * layer.units for layer in layers)
    if name == "float":
        assert parity.logits_error < 1e-5 and parity.frames_differing == len(parity.differing) == parity.litert.wer == 0
    else:  # int8 activations
        assert 1e-5 < parity.logits_error < 0.05 and parity.frames_differing < 0.1 * parity.frames
    for _, expected, heard in parity.differing:
        assert expected != heard
    assert f"{len(parity.differing)} of 6 texts differ" in str(parity) and f"of {parity.frames} frames" in str(parity)


def test_without_a_tokenizer_every_label_counts_as_a_word(exported):
    model, path, dataset = exported("float")
    labels = sum(np.count_nonzero(y[weight > 0]) for _, y, weight in dataset)
    assert verify_litert(model, path, dataset).keras.words == labels


def test_logits_are_compared_by_root_mean_square_against_their_deviation(exported, monkeypatch):
    model, path, dataset = exported("float")
    inputs = dataset[1][0]["features"][:1]
    logits = ops.convert_to_numpy(model(inputs))
    other = recogniser(None, seed=1)
    wrong = ops.convert_to_numpy(other(inputs))
    one = ({"features": inputs, "lengths": [64]}, np.array([[1, 2]]), [1.0])
    parity = verify_litert(other, path, [one], tolerance=np.inf)
    expected = np.sqrt(np.mean((logits - wrong) ** 2)) / wrong.std()
    assert expected > 0.5 and parity.logits_error == pytest.approx(expected, rel=1e-4)
    assert parity.frames_differing == np.sum(logits.argmax(-1) != wrong.argmax(-1))


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_one_corrupted_integer_fails(exported, name, tmp_path):
    model, path, dataset = exported(name)
    for position in (0, 5, 10):
        weight = [weight for weight in read_litert_weights(path) if weight.codes is not None][position]
        corrupt = tmp_path / f"{position}.tflite"
        corrupt.write_bytes(with_one_bit_flipped(path, weight))
        with pytest.raises(ParityError, match=rf"does not hold the {BITS[name]}-bit integers of layer "):
            verify_litert(model, corrupt, dataset, TOKENIZER, tolerance=1)


def with_one_bit_flipped(path, weight):
    """Content of the file with the last bit of one integer of a weight flipped; low bits of a byte come first."""
    with open(path, "rb") as file:
        content = bytearray(file.read())
    fields = weight.codes.reshape(-1, 8 // weight.bits).astype(np.uint8) & ((1 << weight.bits) - 1)
    packed = (fields << np.arange(0, 8, weight.bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8).tobytes()
    assert content.count(packed) == 1
    content[content.index(packed) + len(packed) // 2] ^= 1
    return bytes(content)


def test_a_file_of_other_weights_fails_by_its_word_error_rate(exported):
    _, path, _ = exported("float")
    other = recogniser(None, seed=1)
    with pytest.raises(ParityError, match=r"WER of the file differs by \+\d+\.\d\d points, .*tolerance=0.01.*\nKeras"):
        verify_litert(other, path, batches(other), TOKENIZER)


def test_a_file_that_is_better_than_its_model_fails_too(exported):
    _, path, dataset = exported("float")
    with pytest.raises(ParityError, match=r"differs by -\d+"):
        verify_litert(recogniser(None, seed=1), path, dataset, TOKENIZER)


def test_integers_that_no_layer_has_fail(exported):
    model, path, _ = exported("int4")
    kernels = litert_integers.litert_kernels(model)
    assert litert_integers.check_integers(path, kernels) == sum(kernel.operand.size for kernel in kernels)
    with pytest.raises(ParityError, match="4-bit integers of no layer of the model"):
        litert_integers.check_integers(path, kernels[:-1])


def test_a_wrong_scale_fails_unless_it_is_a_power_of_two(exported):
    model, path, _ = exported("int4")
    kernels = litert_integers.litert_kernels(model)
    for kernel in kernels:
        kernel.scale = kernel.scale / 2
    litert_integers.check_integers(path, kernels)
    kernels[0].scale = kernels[0].scale * 1.01
    with pytest.raises(ParityError, match="does not hold"):
        litert_integers.check_integers(path, kernels)


def test_a_layer_used_twice_may_stand_in_the_file_with_two_factors(exported):
    model, path, _ = exported("int4")
    weights = read_litert_weights(path)
    kernel = litert_integers.litert_kernels(model)[0]
    (weight,) = (weight for weight in weights if np.array_equal(weight.values, kernel.values))
    halved = dataclasses.replace(weight, values=weight.values / 2)
    matched = litert_integers.match_kernels([halved, weight], [kernel])
    assert [factor for *_, factor in matched] == [0.5, 1.0]


def test_what_cannot_be_compared_is_refused_with_the_fix(exported):
    model, path, dataset = exported("float")
    x, y, weight = dataset[0]
    for nothing in ([], [(x, y, 0 * weight)]):
        with pytest.raises(ValueError, match="has no utterances"):
            verify_litert(model, path, nothing)
    with pytest.raises(ValueError, match=rf"logits of {VOCAB} tokens; the tokenizer has 3. Give the tokenizer"):
        verify_litert(model, path, dataset, usm.CharTokenizer("ab"))
    with pytest.raises(ValueError, match=r"takes features \[batch, frames, 16\].*inputs of shape \(5, 120, 15\)"):
        verify_litert(model, path, [({**x, "features": x["features"][..., 1:]}, y, weight)])
    with pytest.raises(ValueError, match="tolerance=-0.1 must be a WER of at least 0"):
        verify_litert(model, path, dataset, tolerance=-0.1)


def test_a_file_with_another_vocabulary_than_the_model_fails(exported):
    _, path, dataset = exported("float")
    with pytest.raises(ParityError, match=r"logits \(1, 30, 9\), 0 of them not finite.*model gives \(1, 30, 7\)"):
        verify_litert(usm.USMForCTC(7, **SIZE), path, dataset)


def test_files_of_a_fixed_size_hear_what_is_cut_or_padded_to_it(exported, tmp_path):
    model, *_ = exported("float")
    path = usm.export_litert(model, tmp_path / "fixed.tflite", batch=3, length=64)
    features = np.random.default_rng(0).normal(size=(3, 80, BINS)).astype("float32")
    lengths = np.array([80, 64, 30])
    parity = verify_litert(model, path, [labelled(model, features, lengths)], TOKENIZER, tolerance=np.inf)
    assert parity.frames == 3 * 16 and parity.logits_error < 1e-5 and not parity.differing


@pytest.fixture(scope="module")
def of_audio(exported, tmp_path_factory):
    """The int8 model as a file that takes audio."""
    path = tmp_path_factory.mktemp("audio") / "model.tflite"
    usm.export_litert(exported("int8")[0], path, sample_rate_input=16000, frontend=FRONTEND)
    return path


def test_an_audio_file_is_judged_on_batches_of_audio_and_an_older_file_is_kept(exported, of_audio, monkeypatch):
    model, *_ = exported("int8")
    audio = 0.1 * np.random.default_rng(0).normal(size=(2, 12000)).astype("float32")
    good = [labelled(model, audio, np.array([12000, 9000]), FRONTEND)]
    parity = verify_litert(model, of_audio, good, TOKENIZER, frontend=FRONTEND)
    assert parity.logits_error < 0.05 and parity.kernels == 11
    features = [(np.zeros((2, 50, BINS)), np.ones((2, 1)), np.ones(2))]
    with pytest.raises(ValueError, match=r"takes audio \[batch, samples\]; the dataset has inputs of shape \(2, 50"):
        verify_litert(model, of_audio, features)
    before = of_audio.read_bytes()
    monkeypatch.setattr(litert, "_convert", lambda *_: before)
    arguments = {"sample_rate_input": 16000, "frontend": FRONTEND, "tokenizer": TOKENIZER}
    assert usm.export_litert(model, of_audio, verify=good, **arguments) == str(of_audio)
    with pytest.raises(ParityError, match="does not hold the 8-bit integers"):
        usm.export_litert(recogniser(8, seed=1), of_audio, verify=good, **arguments)
    assert of_audio.read_bytes() == before and list(of_audio.parent.iterdir()) == [of_audio]


@pytest.fixture(scope="module")
def manifest(exported, tmp_path_factory):
    """Three recordings whose texts are what the int8 model hears in them."""
    folder, model = tmp_path_factory.mktemp("recordings"), exported("int8")[0]
    draw, found = np.random.default_rng(2), []
    for number, samples in enumerate((12000, 9000, 15001)):
        path = str(folder / f"{number}.wav")
        write_wav(path, 0.1 * draw.normal(size=samples))
        text = TOKENIZER.decode(greedy_decode(model(FRONTEND(load_audio(path)[None])))[0])
        found.append(usm.data.Utterance(path, samples / 16000, text, "noise"))
    return found


def test_an_audio_file_is_judged_on_the_recordings_of_a_manifest(exported, of_audio, manifest):
    model, of_features, _ = exported("int8")
    arguments = {"tokenizer": TOKENIZER, "frontend": FRONTEND}
    parity = verify_litert(model, of_audio, manifest, tolerance=0.3, **arguments)
    assert parity.keras.utterances == 3 and parity.keras.wer == 0 and parity.logits_error < 0.05
    assert parity.frames == sum(-(-FRONTEND.num_frames(samples) // 4) for samples in (12000, 9000, 15001))
    other = [dataclasses.replace(utterance, text="two words") for utterance in manifest]
    assert verify_litert(model, of_audio, other, tolerance=9, **arguments).keras.words == 6  # nobody has to spell them
    with pytest.raises(ValueError, match="list of utterances with texts; give the tokenizer"):
        verify_litert(model, of_audio, manifest, frontend=FRONTEND)
    with pytest.raises(ValueError, match=r"takes features \[batch, frames, 16\]; the dataset is a list of recordings"):
        verify_litert(model, of_features, manifest, TOKENIZER)


def test_a_dataset_that_is_not_for_the_file_is_refused_before_the_conversion(exported, manifest, tmp_path, monkeypatch):
    model, _, features = exported("float")
    monkeypatch.setattr(litert, "_convert", lambda *_: pytest.fail("the work has begun"))

    def refused(message, verify, tokenizer=TOKENIZER, **arguments):
        with pytest.raises(ValueError, match=message):
            usm.export_litert(model, tmp_path / "x.tflite", verify=verify, tokenizer=tokenizer, **arguments)

    refused("no utterances", [])
    silent = [
        dataclasses.replace(manifest[0], text=" "),
        dataclasses.replace(manifest[1], path="gone.wav"),
        manifest[2],
    ]
    refused(
        "2 of 3 utterances cannot be compared(?s:.*)text is empty(?s:.*)gone.wav: the file is missing",
        silent,
        sample_rate_input=16000,
    )
    refused(r"takes features \[batch, frames, 16\]; the dataset is a list of recordings", manifest)
    refused(r"takes audio \[batch, samples\]; .*inputs of shape \(5, 120, 16\)", features, sample_rate_input=16000)
    refused(f"logits of {VOCAB} tokens; the tokenizer has 3", features, usm.CharTokenizer("ab"))


def test_an_export_that_fails_the_gate_leaves_the_older_file_alone(exported, tmp_path, monkeypatch):
    model, good, dataset = exported("float")
    with open(good, "rb") as file:
        content = file.read()
    wrong = recogniser(None, seed=1)
    path = tmp_path / "model.tflite"
    path.write_bytes(b"older")
    monkeypatch.setattr(litert, "_convert", lambda *_: content)  # a converter that takes the weights of another model
    with pytest.raises(ParityError, match="WER of the file differs"):
        usm.export_litert(wrong, path, verify=batches(wrong), tokenizer=TOKENIZER)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]
    assert usm.export_litert(model, path, verify=dataset) == str(path) and path.read_bytes() == content
