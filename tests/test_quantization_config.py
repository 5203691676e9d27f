"""QuantizationConfig: shorthands, serialisation and refused combinations."""

import keras
import numpy as np
import pytest

from keras_usm_lite.quantization_config import BITS, QuantizationConfig


@pytest.mark.parametrize("bits", BITS)
def test_shorthands_name_the_bits(bits):
    assert QuantizationConfig.resolve(f"int{bits}").bits == bits


def test_a_config_survives_keras_serialisation():
    config = QuantizationConfig(bits=2, codebook="midrise", scale="learned", stop_scale_gradient=True)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(config)) == config
    assert QuantizationConfig.resolve(config.get_config()) == config


def test_one_bit_is_always_the_sign_code():
    assert QuantizationConfig(bits=1).codebook == "midrise"
    assert QuantizationConfig(bits=1).scale == "mean"
    assert QuantizationConfig(bits=1, scale="learned").scale == "learned"
    with pytest.raises(ValueError, match="scale='mean' is for one bit, got bits=2"):
        QuantizationConfig(bits=2, scale="mean")


def test_numbers_are_kept_as_plain_integers():
    assert type(QuantizationConfig(bits=np.int64(4)).bits) is type(QuantizationConfig(bits=4.0).bits) is int
    assert str(QuantizationConfig(bits=4.0)) == "int4"


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        QuantizationConfig().bits = 8


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 5}, "bits=5 is not supported; choose one of 1, 2, 3, 4, 8"),
        ({"bits": True}, "bits=True"),
        ({"scale": "max"}, "scale='max'.*'absmax', 'mean', 'mse', 'learned'"),
        ({"codebook": "ternary"}, "codebook='ternary'"),
        ({"form": "aqt"}, "form='aqt'"),
        ({"bits": 8, "codebook": "midrise"}, "at most 4 bits"),
        ({"codebook": "asymmetric", "scale": "learned"}, "without zero point"),
        ({"form": "noise", "scale": "learned"}, "only shrink the noise.*scale='absmax' or 'mse'"),
        ({"error_loss": -1.0}, "error_loss.*negative, got -1.0"),
        ({"block_size": 32}, "form='fake'"),
        ({"block_size": 32, "form": "fake", "per_tensor": True}, "exclude each other"),
        ({"block_size": 0, "form": "fake"}, "at least 2, got 0"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**settings)


@pytest.mark.parametrize("value", ["int5", "4", 4, 2.0, ["int4"]])
def test_unknown_shorthands_are_refused(value):
    with pytest.raises(ValueError, match="int4"):
        QuantizationConfig.resolve(value)
