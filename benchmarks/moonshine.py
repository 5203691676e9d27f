"""Moonshine-tiny's speech encoder (7.7M parameters) in Keras, and a CTC recogniser that starts from it.

The convolutions, whose group norm looks at the whole recording, are a front end of their own, computed once and never
trained: `SpeechTask.prepare(corpus, frontend=MoonshineFrontend(weights), subsampling=1)`. What is trained and
compressed are the six Transformer blocks and two new Conformer blocks on top, because CTC cannot read the output of
this encoder, made for a decoder, with a linear head. Weights: `weights_f32.npz`, arrays by the names of the original.
"""

import hashlib

import keras
import numpy as np
from keras import layers, ops

import keras_usm_lite as usm
from keras_usm_lite.layers.masking import frame_mask
from keras_usm_lite.layers.spec_augment import SpecAugment

DIM, HEADS, ROTARY, BLOCKS, EPSILON = 288, 8, 32, 6, 1e-5
KERNELS, STRIDES = (127, 7, 3), (64, 3, 2)
PARTNERS = np.kron(np.eye(DIM // HEADS // 2), [[0.0, 1.0], [-1.0, 0.0]]).astype("float32")  # (a, b) to (-b, a)
KINDS = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
TOP = {"dim": 176, "blocks": 2, "num_heads": 4, "kernel_size": 9}  # Conformer blocks between encoder and head
IMPOSSIBLE = -1e4  # logit of every token but blank on padded frames


@keras.saving.register_keras_serializable(package="moonshine")
def exact_gelu(x):
    """GELU by the error function."""
    return ops.gelu(x, approximate=False)


class MoonshineFrontend(layers.Layer):
    """Audio `[1, samples]` at 16 kHz to `[1, frames, 288]`, 41.67 frames a second; one recording at a time."""

    sample_rate, fft_length, num_mel_bins = 16000, 895, DIM  # samples that one frame sees; features of a frame

    def __init__(self, weights, **kwargs):
        super().__init__(trainable=False, **kwargs)
        audio = x = keras.Input((None, 1))
        x = layers.Conv1D(DIM, 127, strides=64, use_bias=False, activation="tanh", name="conv1")(x)
        x = layers.GroupNormalization(1, epsilon=EPSILON, name="groupnorm")(x)
        x = layers.Conv1D(2 * DIM, 7, strides=3, activation=exact_gelu, name="conv2")(x)
        x = layers.Conv1D(DIM, 3, strides=2, activation=exact_gelu, name="conv3")(x)
        self.convolutions = keras.Model(audio, x)
        self.convolutions.trainable = False
        assign(self.convolutions, weights, skipped=0)
        self.digest = hashlib.sha256(b"".join(w.tobytes() for w in self.convolutions.get_weights())).hexdigest()[:16]

    def num_frames(self, samples):
        """Frames of a recording of so many samples."""
        for kernel, stride in zip(KERNELS, STRIDES, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def call(self, audio):
        """Compute the features."""
        return self.convolutions(ops.expand_dims(audio, -1))

    def get_config(self):
        """Return what the features depend on, for the cache; no such layer can be made of it."""
        return {**super().get_config(), "digest": self.digest}


@keras.saving.register_keras_serializable(package="moonshine")
class RotaryAttention(layers.Layer):
    """Self-attention without biases; the first 32 of 36 dimensions of a head are turned by the frame's number."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, layers.Dense(DIM, use_bias=False, name=name))

    def build(self, shape):
        """Build the projections."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            layer.build(shape)

    def call(self, inputs, lengths=None):
        """Attend to real frames, all of them if `lengths` is None."""
        frames = ops.shape(inputs)[1]
        query, key, value = (
            ops.reshape(project(inputs), (-1, frames, HEADS, DIM // HEADS))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = ops.einsum("bqhd,bkhd->bhqk", turned(query), turned(key)) / (DIM // HEADS) ** 0.5
        if lengths is not None:
            padded = 1.0 - ops.cast(frame_mask(lengths, frames), scores.dtype)
            scores = scores - 1e9 * padded[:, None, None]
        heard = ops.einsum("bhqk,bkhd->bqhd", ops.softmax(scores), value)
        return self.o_proj(ops.reshape(heard, (-1, frames, DIM)))

    def free_channels(self):
        """The value channels of each head, for `permute_channels`."""
        return self.o_proj, HEADS, [self.v_proj]


def turned(heads):
    """Rotary positions: neighbouring pairs `(2 i, 2 i + 1)` turned by `frame / 10000^(2 i / 32)`."""
    rates = np.zeros(DIM // HEADS, "float32")  # what is not turned has rate 0
    rates[:ROTARY] = np.repeat(10000.0 ** (-np.arange(0, ROTARY, 2) / ROTARY), 2)
    angles = ops.arange(ops.shape(heads)[1], dtype="float32")[:, None, None] * rates
    return heads * ops.cos(angles) + ops.matmul(heads, PARTNERS) * ops.sin(angles)


@keras.saving.register_keras_serializable(package="moonshine")
class FeedForward(layers.Layer):
    """`288 -> 1152 -> 288` with GELU."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.fc1 = layers.Dense(4 * DIM, activation=exact_gelu, name="fc1")
        self.fc2 = layers.Dense(DIM, name="fc2")

    def build(self, shape):
        """Build both projections."""
        self.fc1.build(shape)
        self.fc2.build((*shape[:-1], 4 * DIM))

    def call(self, inputs):
        """Two projections."""
        return self.fc2(self.fc1(inputs))

    def free_channels(self):
        """The hidden channels, for `permute_channels`."""
        return self.fc2, 1, [self.fc1]


@keras.saving.register_keras_serializable(package="moonshine")
class Block(layers.Layer):
    """Attention and feed-forward, each on the normed input and added to it."""

    def __init__(self, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.dropout = dropout
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = RotaryAttention(name="self_attn")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = FeedForward(name="mlp")
        self.drop = layers.Dropout(dropout, name="drop")

    def build(self, shape):
        """Build the parts; all keep the shape."""
        for layer in (self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp):
            layer.build(shape)

    def call(self, x, lengths=None, training=None):
        """One block."""
        x = x + self.drop(self.self_attn(self.input_layernorm(x), lengths=lengths), training=training)
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)), training=training)

    def get_config(self):
        """Return the constructor's arguments."""
        return {**super().get_config(), "dropout": self.dropout}


def norm(name):
    """The original's norm, without a bias."""
    return layers.LayerNormalization(center=False, epsilon=EPSILON, name=name)


@keras.saving.register_keras_serializable(package="moonshine")
class MoonshineEncoder(layers.Layer):
    """Six blocks and a norm on the front end's features, `[batch, frames, 288]` in and out."""

    def __init__(self, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.dropout = dropout
        self.blocks = [Block(dropout, name=f"layers.{number}") for number in range(BLOCKS)]
        self.layer_norm = norm("layer_norm")

    def build(self, shape):
        """Build all blocks."""
        for layer in (*self.blocks, self.layer_norm):
            layer.build(shape)

    def call(self, x, lengths=None, training=None):
        """Encode."""
        for block in self.blocks:
            x = block(x, lengths=lengths, training=training)
        return self.layer_norm(x)

    def get_config(self):
        """Return the constructor's arguments."""
        return {**super().get_config(), "dropout": self.dropout}


@keras.saving.register_keras_serializable(package="moonshine")
class ConformerTop(layers.Layer):
    """A projection and two Conformer blocks, `[batch, frames, 288] -> [batch, frames, 176]`."""

    def __init__(self, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.dropout = dropout
        self.narrow = layers.Dense(TOP["dim"], name="narrow")
        sizes = {"num_heads": TOP["num_heads"], "kernel_size": TOP["kernel_size"], "dropout": dropout}
        self.blocks = [usm.ConformerBlock(**sizes, name=f"block_{number}") for number in range(TOP["blocks"])]

    def build(self, shape):
        """Build the projection and the blocks."""
        self.narrow.build(shape)
        for block in self.blocks:
            block.build((*shape[:-1], TOP["dim"]))

    def call(self, x, mask=None, training=None):
        """Encode further; `mask` marks real frames."""
        x = self.narrow(x)
        for block in self.blocks:
            x = block(x, mask=mask, training=training)
        return x

    def get_config(self):
        """Return the constructor's arguments."""
        return {**super().get_config(), "dropout": self.dropout}


@keras.saving.register_keras_serializable(package="moonshine")
class MoonshineForCTC(keras.Model):
    """`{"features", "lengths"}` of `MoonshineFrontend` to CTC logits; time masks while training, no subsampling."""

    def __init__(self, vocab_size, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.dropout = vocab_size, dropout
        self.augment = SpecAugment(frequency_masks=0, name="augment")
        self.encoder = MoonshineEncoder(dropout, name="encoder")
        self.top = ConformerTop(dropout, name="encoder_top")
        self.head = layers.Dense(vocab_size, name="head")
        self.build((None, None, DIM))

    def build(self, shape=None):
        """Build encoder, top and head."""
        if not self.built:
            self.encoder.build((None, None, DIM))
            self.top.build((None, None, DIM))
            self.head.build((None, None, TOP["dim"]))
            self.built = True

    def call(self, inputs, training=None):
        """Compute logits; padded frames are certain blanks."""
        features, lengths = inputs["features"], inputs["lengths"]
        mask = frame_mask(lengths, ops.shape(features)[1])
        features = self.augment(features, mask=mask, training=training)
        encoded = self.encoder(features, lengths=lengths, training=training)
        logits = self.head(self.top(encoded, mask=mask, training=training))
        blank = ops.cast(ops.arange(self.vocab_size) != 0, logits.dtype) * IMPOSSIBLE
        return ops.where(ops.expand_dims(mask, -1), logits, blank)

    def compute_output_shape(self, input_shape):
        """As many frames as there are features."""
        shape = input_shape["features"] if isinstance(input_shape, dict) else input_shape
        return (*shape[:2], self.vocab_size)

    def get_config(self):
        """Return the constructor's arguments."""
        return {"name": self.name, "vocab_size": self.vocab_size, "dropout": self.dropout}


def assign(layer, weights, skipped):
    """Give every variable of a layer the array of its name, less `skipped` names at the front; return the names."""
    used = set()
    for variable in layer.weights:
        *path, kind = variable.path.split("/")[skipped:]
        name = ".".join([*path, KINDS[kind]])
        array = weights[name]
        variable.assign(array.transpose(2, 1, 0) if array.ndim == 3 else array)  # convolutions: [outputs, inputs, taps]
        used.add(name)
    return used


def functional(model):
    """Return a model of these inputs, or its compressed copy, with declared inputs, as exporting wants it."""
    features = keras.Input((None, DIM), name="features")
    inputs = {"features": features, "lengths": keras.Input((), dtype="int32", name="lengths")}
    return keras.Model(inputs, model(inputs))


def load(weights):
    """Return `(front end, encoder as a functional model)` with the original's weights."""
    frontend = MoonshineFrontend(weights)
    inputs = keras.Input((None, DIM))
    encoder = keras.Model(inputs, MoonshineEncoder(name="encoder")(inputs))
    used = assign(encoder, weights, skipped=1)
    left = {name for name in weights if name not in used and not name.startswith(("conv", "groupnorm"))}
    if left:
        raise SystemExit(f"Arrays that no variable took: {sorted(left)[:5]}.")
    return frontend, encoder


def check(frontend, encoder, reference):
    """Stop unless the encoder gives the reference output; return the largest difference."""
    found = ops.convert_to_numpy(encoder(frontend(reference["input"][None])))[0]
    difference = float(np.abs(found - reference["output_float"]).max())
    if not difference < 1e-3:
        raise SystemExit(f"The encoder differs from its reference by {difference}.")
    return difference


def prepare(corpus, weights, seed=0):
    """Return the `SpeechTask` of a corpus with these features: 40 s of audio in a training batch, padding included."""
    frontend = MoonshineFrontend(weights)
    settings = {"batch_frames": 1667, "num_buckets": 16, "subsampling": 1}  # frames from 1 to 20 s
    return usm.data.SpeechTask.prepare(corpus, frontend=frontend, seed=seed, **settings)
