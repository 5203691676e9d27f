"""docs/recipe.md: its code runs as it stands, and what it trains and writes is what the page says."""

import pathlib
import re

import keras
import numpy as np
import pytest

import keras_usm_lite as usm

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "recipe.md").read_text()
SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory, write_three_words):
    """What the names of the page's code stand for when it has run beside a small corpus and float model."""
    folder = tmp_path_factory.mktemp("recipe")
    write_three_words(folder / "my_corpus")
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KERAS_USM_LITE_HOME", str(folder / "home"))
        task = usm.data.SpeechTask.prepare(usm.data.open_corpus("my_corpus"))
        usm.USMForCTC(task.tokenizer.vocab_size, spec_augment=False, **SIZE).save("float.keras")
        names = {}
        first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        exec(first, names)
        again = names | {}
        exec(second.replace("epochs = 10", "epochs = 2"), again)
        names["small"] = again["small"]
        return names | {"packed": usm.load_packed("model.usm")}


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def test_masks_are_those_that_one_shot_chose(found):
    layers = usm.compressed_layers(found["model"])
    assert {layer.quantization.scale for layer in layers} == {"learned"}
    for layer, start in zip(layers, usm.compressed_layers(found["rounded"]), strict=True):
        np.testing.assert_array_equal(array(layer.mask), array(start.mask))
        assert array(layer.mask).mean() == 0.5


def test_the_training_begins_with_the_integers_of_one_shot(found):
    fresh = usm.compress(found["rounded"], found["rules"](usm.QuantizationConfig(4, scale="learned")))
    for layer, start in zip(usm.compressed_layers(fresh), usm.compressed_layers(found["rounded"]), strict=True):
        layer.mask.assign(start.mask)
        layer.kernel_scale.assign(start.kernel_scale)
        np.testing.assert_array_equal(array(layer.quantized_kernel()[0]), array(start.quantized_kernel()[0]))


def test_the_training_moves_weights_and_scales(found):
    moved = [array(layer.scale_gain) != 1 for layer in usm.compressed_layers(found["model"])]
    assert all(gains.any() for gains in moved)
    assert found["learner"].history.epoch == [0, 1, 2, 3]
    assert {"ctc_loss", "kl_loss", "val_wer"} <= set(found["learner"].history.history)


def test_the_file_holds_the_integers_that_were_trained(found):
    for one, other in zip(*(usm.compressed_layers(found[name]) for name in ("model", "packed")), strict=True):
        np.testing.assert_array_equal(array(one.quantized_kernel()[0]), array(other.quantized_kernel()[0]))


def test_the_other_training_prunes_to_one_of_four_at_four_bits_and_moves_what_is_left(found):
    layers = usm.compressed_layers(found["small"])
    assert {(layer.active_bits, float(array(layer.mask).mean())) for layer in layers} == {(4, 0.25)}
    start = usm.compress(found["float_model"], found["rules"]("int4", "1:4"))
    for layer, old in zip(layers, usm.compressed_layers(start), strict=True):
        assert np.any(array(layer.kernel) != array(old.kernel))
