"""What compression without training does to a real pre-trained speech encoder, Moonshine-tiny (7.7M parameters).

    python benchmarks/moonshine_encoder.py --weights FOLDER --data CORPUS

`FOLDER` holds `weights_f32.npz` of the encoder and `reference_io.npz`, one second of speech with the encoder's output.
The encoder is built in Keras and held against that reference; then every projection is compressed with `usm.compress`,
as the paper does before it trains (absmax, magnitude) and with compensation (`usm.one_shot` with mse scales, calibrated
on training recordings). The table, `results/moonshine_encoder.json`, gives the error of the encoder's output on
recordings of the dev split: `sum |h - h^|^2 / sum |h - mean h|^2`. Its weights lie on an 8-bit grid already.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, ops

import keras_usm_lite as usm
from keras_usm_lite.data.manifest import replacing

RESULT = pathlib.Path(__file__).parent / "results" / "moonshine_encoder.json"
DIM, HEADS, ROTARY, BLOCKS, EPSILON = 288, 8, 32, 6, 1e-5
WIDTHS, PATTERNS = (None, "int8", "int4", "int3", "int2"), (None, "4:8", "2:4", "1:4")


@keras.saving.register_keras_serializable(package="moonshine")
class RotaryAttention(layers.Layer):
    """Self-attention without biases; the first 32 of 36 dimensions of a head are turned by the frame's number."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, layers.Dense(DIM, use_bias=False, name=name))

    def build(self, shape):
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            layer.build(shape)

    def call(self, inputs):
        frames = ops.shape(inputs)[1]
        query, key, value = (
            ops.reshape(project(inputs), (-1, frames, HEADS, DIM // HEADS))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = ops.einsum("bqhd,bkhd->bhqk", turned(query), turned(key)) / (DIM // HEADS) ** 0.5
        heard = ops.einsum("bhqk,bkhd->bqhd", ops.softmax(scores), value)
        return self.o_proj(ops.reshape(heard, (-1, frames, DIM)))


def turned(heads):
    """Rotary positions: neighbouring pairs `(2 i, 2 i + 1)` turned by `frame / 10000^(2 i / 32)`."""
    rates = 10000.0 ** (-ops.arange(0, ROTARY, 2, dtype="float32") / ROTARY)
    angles = ops.arange(ops.shape(heads)[1], dtype="float32")[:, None, None] * rates
    even, odd = heads[..., 0:ROTARY:2], heads[..., 1:ROTARY:2]
    pairs = [even * ops.cos(angles) - odd * ops.sin(angles), odd * ops.cos(angles) + even * ops.sin(angles)]
    flat = ops.reshape(ops.stack(pairs, axis=-1), (*ops.shape(heads)[:3], ROTARY))
    return ops.concatenate([flat, heads[..., ROTARY:]], axis=-1)


def build(weights):
    """Return `(front end: audio [B, samples, 1] -> [B, frames, 288], encoder: that -> [B, frames, 288])`."""
    audio = keras.Input((None, 1))
    x = layers.Conv1D(DIM, 127, strides=64, use_bias=False, activation="tanh", name="conv1")(audio)
    x = layers.GroupNormalization(1, epsilon=EPSILON, name="groupnorm")(x)
    x = layers.Conv1D(2 * DIM, 7, strides=3, activation=exact_gelu, name="conv2")(x)
    x = layers.Conv1D(DIM, 3, strides=2, activation=exact_gelu, name="conv3")(x)
    frontend = keras.Model(audio, x, name="frontend")

    def norm(name):
        return layers.LayerNormalization(center=False, epsilon=EPSILON, name=name)

    inputs = x = keras.Input((None, DIM))
    for number in range(BLOCKS):
        name = f"layers.{number}"
        x = x + RotaryAttention(name=f"{name}.self_attn")(norm(f"{name}.input_layernorm")(x))
        hidden = norm(f"{name}.post_attention_layernorm")(x)
        hidden = layers.Dense(4 * DIM, activation=exact_gelu, name=f"{name}.mlp.fc1")(hidden)
        x = x + layers.Dense(DIM, name=f"{name}.mlp.fc2")(hidden)
    encoder = keras.Model(inputs, norm("layer_norm")(x), name="encoder")
    load(weights, frontend, encoder)
    return frontend, encoder


@keras.saving.register_keras_serializable(package="moonshine")
def exact_gelu(x):
    """GELU by the error function."""
    return ops.gelu(x, approximate=False)


def load(weights, *models):
    """Give every variable the array of its name; convolutions come as `[outputs, inputs, taps]`."""
    kinds = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
    used = set()
    for model in models:
        for variable in model.weights:
            *path, kind = variable.path.split("/")
            name = ".".join([*path, kinds[kind]])
            array = weights[name]
            variable.assign(array.transpose(2, 1, 0) if array.ndim == 3 else array)
            used.add(name)
    if used != set(weights):
        raise SystemExit(f"Arrays that no variable took: {sorted(set(weights) - used)[:5]}.")


def check(frontend, encoder, reference):
    """Stop unless the encoder gives the reference output; return the largest difference."""
    found = ops.convert_to_numpy(encoder(frontend(reference["input"][None, :, None])))[0]
    difference = float(np.abs(found - reference["output_float"]).max())
    if not difference < 1e-3:
        raise SystemExit(f"The encoder differs from its reference by {difference}.")
    return difference


def compressed(encoder, width, pattern, compensated, calibration):
    """Return a compressed copy, nothing trained."""
    quantization = width and usm.QuantizationConfig(int(width[3:]), scale="mse" if compensated else "absmax")
    model = usm.compress(encoder, {".": (quantization, pattern)})
    if compensated:
        usm.one_shot(model, calibration)
    elif pattern:
        usm.update_masks(model)
    return model


def output_error(model, recordings, expected):
    """Error of the output over all recordings, relative to the variance of what is expected."""
    error = sum(np.square(model.predict_on_batch(x) - h).sum() for x, h in zip(recordings, expected, strict=True))
    frames = np.concatenate([h[0] for h in expected])
    return float(error / np.square(frames - frames.mean(axis=0)).sum())


def main():
    """Build, verify, compress, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="folder of weights_f32.npz and reference_io.npz")
    parser.add_argument("--data", required=True, help="folder or name of an English corpus")
    parser.add_argument("--recordings", type=int, default=40, help="of the dev split (default 40)")
    args = parser.parse_args()
    folder = pathlib.Path(args.weights)
    frontend, encoder = build(dict(np.load(folder / "weights_f32.npz")))
    difference = check(frontend, encoder, np.load(folder / "reference_io.npz"))
    print(f"largest difference from the reference {difference:.1e}", flush=True)
    corpus = usm.data.open_corpus(args.data)
    train, dev = (usm.data.read_manifest(corpus.splits[split]) for split in ("train", "dev"))

    def heard(utterance, samples=None):
        return ops.convert_to_numpy(frontend(usm.data.load_audio(utterance.path)[None, :samples, None]))

    recordings = [heard(utterance) for utterance in dev[:: max(len(dev) // args.recordings, 1)]]
    expected = [encoder.predict_on_batch(features) for features in recordings]
    long = [utterance for utterance in train if utterance.duration > 4][:64]
    calibration = np.concatenate([heard(utterance, 64000) for utterance in long])
    rows = []
    for width in WIDTHS:
        for pattern in PATTERNS:
            if not (width or pattern):
                continue
            row = {"bits": width or "float", "pattern": pattern or "dense"}
            for way, compensated in (("absmax, magnitude", False), ("compensated", True)):
                row[way] = output_error(
                    compressed(encoder, width, pattern, compensated, calibration), recordings, expected
                )
            rows.append(row)
            print(row, flush=True)
    result = {
        "command": f"python benchmarks/moonshine_encoder.py --weights FOLDER --data {corpus.name}",
        "recordings": len(recordings), "frames": sum(h.shape[1] for h in expected),
        "calibration frames": int(np.prod(calibration.shape[:2])),
        "largest difference from the reference": difference, "output error": rows,
    }  # fmt: skip
    with replacing(RESULT) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
