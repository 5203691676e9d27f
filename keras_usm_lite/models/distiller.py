"""`Distiller`: trains a student with the labels and with what a teacher says and thinks."""

import contextlib
import re

import keras
from keras import ops

from keras_usm_lite.core.distillation import hidden_mse, posterior_kl
from keras_usm_lite.layers.conformer_block import ConformerBlock
from keras_usm_lite.models.replicas import replica_share
from keras_usm_lite.models.usm_encoder import USMEncoder
from keras_usm_lite.models.usm_for_ctc import IMPOSSIBLE
from keras_usm_lite.rewrite import layer_path, walk_layers


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class Distiller(keras.Model):
    """Trains `student` in `model.fit` on the compiled loss and on the answers of a frozen `teacher`.

    ```
    L = loss_weight L_compiled + kl_weight T^2 KL(teacher || student) + hidden_weight mean_layers hidden_mse
    ```

    plus the student's own regularisation, with weight one. KL and hidden states are averaged over the real frames of
    the batch, weighted by `sample_weight` if there is one; frames that the teacher declares certain blanks, as
    `USMForCTC` does with padding, do not count. The logs show `ctc_loss` (the compiled loss), `kl_loss` and
    `hidden_loss`.

    The teacher runs in inference mode, so it hears the clean features where the student hears augmented ones. Building
    a `Distiller` freezes it: `teacher.trainable` becomes False. Its weights belong to the non-trainable weights of the
    `Distiller` and are saved with it, but its layers are hidden from anything that walks through the model:
    `compressed_layers` and callbacks such as `NMPruning` find those of the student only.

    Compile and fit it as you would the student; export `distiller.student`. Calling it returns the student's logits; in
    training with hidden states, `(logits, hidden states)`.

    Args:
        student: the model to train, built. Output: logits.
        teacher: a built model with the same inputs and tokens; usually the float checkpoint the student started from.
        kl_weight: weight of the divergence of the posteriors, a mean over frames where CTC's loss is a sum; around 1 it
            guides, around 100 it rules (docs/methods.md has what that costs).
        hidden_weight: weight of the distance between the hidden states of both models, a share of the teacher's
            square where CTC's loss is a sum over frames: 1 is hardly felt, 100 weighs about half of CTC's loss.
        temperature: temperature `T` of the posteriors.
        loss_weight: weight of the compiled loss.
        hidden_layers: whose outputs the hidden states are: a regular expression searched in the paths of the layers,
            such as `"block_[0-9]+$"`; by default every `ConformerBlock`. Each of them returns one tensor
            `[batch, frames, dim]` with as many frames as the logits have.

    Raises:
        ValueError: models that are not built or that share weights, a frozen student, hidden layers that do not
            correspond (with `hidden_weight`) or lie inside blocks with `remat=True`, or numbers out of range.

    Source: Hinton et al. 2015 (arXiv 1503.02531).

    Example:

    >>> import numpy as np
    >>> teacher, student = (keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]) for _ in range(2))
    >>> distiller = Distiller(student, teacher, temperature=2.0)
    >>> distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = distiller.fit(np.ones((8, 4)), np.ones((8,)), verbose=0).history
    >>> sorted(history), len(distiller.trainable_variables)
    (['ctc_loss', 'kl_loss', 'loss'], 2)
    """

    def __init__(
        self,
        student,
        teacher,
        kl_weight=1.0,
        hidden_weight=0.0,
        temperature=1.0,
        loss_weight=1.0,
        hidden_layers=None,
        name=None,
    ):
        _check_models(student, teacher)
        super().__init__(name=name, autocast=False, dtype=student.dtype_policy)  # by which Keras scales losses
        for label, value in (("kl_weight", kl_weight), ("hidden_weight", hidden_weight), ("loss_weight", loss_weight)):
            if value < 0:
                raise ValueError(f"{label} must not be negative, got {value!r}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        if hidden_weight:
            _check_hidden(student, teacher, hidden_layers)
        self.student = student
        self.kl_weight = kl_weight
        self.hidden_weight = hidden_weight
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.hidden_layers = hidden_layers
        teacher.trainable = False
        # Not an attribute that Keras follows, so that no walk finds the teacher's layers; but its weights are followed,
        # so that a compiled step receives them as arguments rather than as constants.
        object.__setattr__(self, "teacher", teacher)
        self._teacher_weights = teacher.weights
        self._trackers = [keras.metrics.Mean(name="ctc_loss"), keras.metrics.Mean(name="kl_loss")]
        if hidden_weight:
            self._trackers.append(keras.metrics.Mean(name="hidden_loss"))
        self.built = True

    def call(self, inputs, training=None):
        """Return the student's logits; in training with hidden states, `(logits, hidden states)`."""
        logits, hidden = self._forward(self.student, inputs, training)
        return (logits, hidden) if training and self.hidden_weight else logits

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Return the weighted sum of the losses and keep track of each."""
        logits, hidden = y_pred if isinstance(y_pred, (tuple, list)) else (y_pred, None)
        share = replica_share()
        own = sum(ops.sum(loss) for loss in self.losses)  # of the student's layers; weighted with one
        terms = [super().compute_loss(x, y, logits, sample_weight, training) / share - own]
        teacher_logits, teacher_hidden = self._forward(self.teacher, x, training=False)
        teacher_logits = ops.stop_gradient(teacher_logits)
        weights = frame_weights(teacher_logits, sample_weight)
        terms.append(posterior_kl(teacher_logits, logits, self.temperature, weights))
        if self.hidden_weight:
            if hidden is None:  # evaluation
                _, hidden = self._forward(self.student, x, training=False)
            pairs = zip(teacher_hidden, hidden, strict=True)
            distances = [hidden_mse(ops.stop_gradient(wanted), given, weights) for wanted, given in pairs]
            terms.append(sum(distances) / len(distances))
        for tracker, term in zip(self._trackers, terms, strict=True):
            tracker.update_state(term, sample_weight=ops.shape(logits)[0])
        factors = (self.loss_weight, self.kl_weight, self.hidden_weight)
        return share * (own + sum(factor * term for factor, term in zip(factors, terms, strict=False)))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Give the student's logits to the compiled metrics."""
        logits = y_pred[0] if isinstance(y_pred, (tuple, list)) else y_pred
        return super().compute_metrics(x, y, logits, sample_weight)

    def _forward(self, model, inputs, training):
        """Return a model's logits and, if they are needed, its hidden states."""
        if not self.hidden_weight:
            return model(inputs, training=training), None
        with _recorded(_hidden_layers(model, self.hidden_layers)) as hidden:
            logits = model(inputs, training=training)
        return logits, hidden

    def save_own_variables(self, store):
        """Save nothing here: student and teacher save their weights themselves."""

    def load_own_variables(self, store):
        """Load nothing here: student and teacher load their weights themselves."""

    def compute_output_shape(self, input_shape):
        """The shape of the student's logits."""
        return self.student.compute_output_shape(input_shape)

    def get_config(self):
        """Return the constructor's arguments, both models serialised."""
        return {
            "name": self.name,
            "student": serialize_model(self.student),
            "teacher": serialize_model(self.teacher),
            "kl_weight": self.kl_weight,
            "hidden_weight": self.hidden_weight,
            "temperature": self.temperature,
            "loss_weight": self.loss_weight,
            "hidden_layers": self.hidden_layers,
        }

    @classmethod
    def from_config(cls, config):
        """Rebuild both models and the `Distiller`."""
        models = {role: keras.saving.deserialize_keras_object(config[role]) for role in ("student", "teacher")}
        return cls(**{**config, **models})


def frame_weights(logits, sample_weight=None):
    """Return the weight of each frame: 0 if it is a certain blank (padding), else its own or that of its utterance.

    Args:
        logits: `[batch, frames, tokens]`, blank = 0.
        sample_weight: None (all 1), `[batch]`, or `[batch, frames]`.

    Returns:
        float32 `[batch, frames]`.

    Example:

    >>> ops.convert_to_numpy(frame_weights([[[0.0, 2.0], [0.0, IMPOSSIBLE]]], [3.0])).tolist()
    [[3.0, 0.0]]
    """
    logits = ops.convert_to_tensor(logits, "float32")
    weights = ops.cast(ops.max(logits[..., 1:], axis=-1) > IMPOSSIBLE / 2, "float32")
    if sample_weight is None:
        return weights
    sample_weight = ops.cast(sample_weight, "float32")
    if len(sample_weight.shape) == len(weights.shape):
        return weights * sample_weight
    return weights * ops.reshape(sample_weight, (-1, *(1,) * (len(weights.shape) - 1)))


def serialize_model(model):
    """Return a model's serialised configuration without its optimizer and loss."""
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    return config


def _hidden_layers(model, pattern):
    """The layers whose outputs are compared: those whose path matches, or every Conformer block."""
    if pattern is None:
        return [layer for layer in walk_layers(model) if isinstance(layer, ConformerBlock)]
    return [layer for layer in walk_layers(model) if re.search(pattern, layer_path(layer))]


@contextlib.contextmanager
def _recorded(layers):
    """Collect, in the order of the calls, what the layers return within the context."""
    outputs = []

    def recording(call):
        def record(*args, **kwargs):
            outputs.append(call(*args, **kwargs))
            return outputs[-1]

        record.exchange_output = lambda output: outputs.__setitem__(-1, output)  # for `recomputed`
        return record

    for layer in layers:
        vars(layer)["call"] = recording(layer.call)
    try:
        yield outputs
    finally:
        for layer in layers:
            del vars(layer)["call"]


def _check_models(student, teacher):
    for role, model in (("student", student), ("teacher", teacher)):
        if not model.built:
            raise ValueError(f"The {role} {model.name!r} is not built; call it on a batch, or build() it, first.")
    if not student.trainable_variables:
        raise ValueError(
            f"The student {student.name!r} is frozen, so it cannot learn: a copy that compress() makes of a frozen "
            "model, such as the teacher of an earlier Distiller, is frozen, too. Set its `trainable` to True."
        )
    shared = {id(weight) for weight in student.weights} & {id(weight) for weight in teacher.weights}
    if shared:
        raise ValueError(
            f"Student and teacher share {len(shared)} weights, but the teacher must stay as it is while the student "
            "learns. Give the teacher its own copy: load the checkpoint twice, or make the student with usm.compress."
        )


def _check_hidden(student, teacher, pattern):
    found = [[layer_path(layer) for layer in _hidden_layers(model, pattern)] for model in (student, teacher)]
    if not all(found):
        what = "ConformerBlocks" if pattern is None else f"layers whose path matches {pattern!r}"
        raise ValueError(
            f"hidden_weight needs models with {what}; the student {student.name!r} has {len(found[0])}, the teacher "
            f"{teacher.name!r} {len(found[1])}. Name the layers to compare with hidden_layers, a regular expression, "
            "or use hidden_weight=0."
        )
    if len(found[0]) != len(found[1]):
        raise ValueError(
            f"hidden_weight compares layer with layer, but the student has {len(found[0])} of them, {found[0]}, and "
            f"the teacher {len(found[1])}, {found[1]}. Choose others with hidden_layers, or use hidden_weight=0."
        )
    hidden = {id(layer) for layer in _hidden_layers(student, pattern)}
    encoders = [layer for layer in walk_layers(student) if isinstance(layer, USMEncoder) and layer.settings["remat"]]
    for block in (block for encoder in encoders for block in encoder.blocks):
        inside = [layer_path(layer) for layer in walk_layers(block) if layer is not block and id(layer) in hidden]
        if inside:
            raise ValueError(
                f"hidden_weight cannot compare {inside[0]!r}, which lies in a block that is computed again in the "
                "backward pass. Compare whole blocks, or build the student with remat=False."
            )
