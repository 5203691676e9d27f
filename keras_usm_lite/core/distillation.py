"""How far one model is from another: divergence of posteriors, distance of hidden states."""

import keras
from keras import ops


def posterior_kl(teacher_logits, student_logits, temperature=1.0, weights=None):
    """Return the mean divergence of the student's posteriors from the teacher's.

    `T^2 mean_t KL(softmax(teacher_t / T) || softmax(student_t / T))`, in float32. The factor `T^2` keeps the size of
    the gradient independent of the temperature.

    Args:
        teacher_logits, student_logits: float tensors `[..., tokens]`, usually `[batch, frames, tokens]`. The gradient
            reaches both: pass the teacher's through `ops.stop_gradient`.
        temperature: above 1, unlikely tokens count for more.
        weights: None, or weights `[...]` of the frames, such as 1 for real frames and 0 for padding; the mean is the
            weighted one, and 0 if all weights are.

    Returns:
        float32 scalar, in nats; 0 for equal logits.

    Raises:
        ValueError: the two do not have the same number of tokens.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.

    Example:

    >>> round(float(posterior_kl([[0.0, 0.0]], [[0.0, 1.0]])), 4)  # log((1 + e) / 2) - 1 / 2
    0.1201
    """
    teacher, student = (ops.convert_to_tensor(logits, "float32") for logits in (teacher_logits, student_logits))
    if teacher.shape[-1] != student.shape[-1]:
        raise ValueError(
            f"The teacher scores {teacher.shape[-1]} tokens and the student {student.shape[-1]}; posteriors can be "
            "compared only over the same tokens. Use models with the same tokenizer."
        )
    teacher = ops.log_softmax(teacher / temperature)
    student = ops.log_softmax(student / temperature)
    divergence = ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)
    if weights is None:
        return temperature**2 * ops.mean(divergence)
    weights = ops.cast(weights, "float32")
    return temperature**2 * ops.sum(weights * divergence) / ops.maximum(ops.sum(weights), keras.config.epsilon())


def hidden_mse(teacher_hidden, student_hidden, weights=None):
    """Return the squared distance of hidden states as a share of the teacher's own square.

    `sum_t weights_t |student_t - teacher_t|^2 / sum_t weights_t |teacher_t|^2`, in float32: the mean squared difference
    over the teacher's mean square, so that layers of different magnitude count alike.

    Args:
        teacher_hidden, student_hidden: float tensors `[batch, frames, dim]`.
        weights: None, or weights `[batch, frames]` of the frames; if all are 0, the result is 0.

    Returns:
        float32 scalar; 0 for equal states, 1 for a student that answers zero.

    Raises:
        ValueError: the two do not have the same dimension.

    Example:

    >>> float(hidden_mse([[[2.0, 0.0]]], [[[1.0, 1.0]]]))
    0.5
    """
    teacher, student = (ops.convert_to_tensor(hidden, "float32") for hidden in (teacher_hidden, student_hidden))
    if teacher.shape[-1] != student.shape[-1]:
        raise ValueError(
            f"The teacher's hidden states have {teacher.shape[-1]} dimensions and the student's {student.shape[-1]}; "
            "only states of the same size can be compared. Choose layers that correspond, or use no hidden states."
        )
    difference = ops.sum(ops.square(student - teacher), axis=-1)
    size = ops.sum(ops.square(teacher), axis=-1)
    if weights is not None:
        weights = ops.cast(weights, "float32")
        difference, size = weights * difference, weights * size
    return ops.sum(difference) / ops.maximum(ops.sum(size), keras.config.epsilon())
