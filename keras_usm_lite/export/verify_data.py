"""What `verify_litert` lets a model and its file hear: checked before any work, then one utterance at a time."""

import numpy as np

from keras_usm_lite.data.audio import load_audio
from keras_usm_lite.data.manifest import BadRow, Utterance, find_problem, list_problems


def check_dataset(dataset, tokenizer, shape, vocab_size):
    """Stop before any work if a dataset or a tokenizer is not for a file.

    Args:
        dataset, tokenizer: as `verify_litert` takes them.
        shape: shape of the file's input, `[batch, samples]` or `[batch, frames, bins]`.
        vocab_size: classes of its logits.

    Raises:
        ValueError: a dataset without utterances or not of what the file takes, or a tokenizer that does not fit.
    """
    wanted = "audio [batch, samples]" if len(shape) == 2 else f"features [batch, frames, {shape[2]}]"
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"The file gives logits of {vocab_size} tokens; the tokenizer has {tokenizer.vocab_size}. Give the "
            "tokenizer the model was trained with."
        )
    if _is_manifest(dataset):
        if tokenizer is None:
            raise ValueError("The dataset is a list of utterances with texts; give the tokenizer of the model, too.")
        if len(shape) != 2:
            raise ValueError(
                f"The file takes {wanted}; the dataset is a list of recordings. Give batches of features, such as "
                "SpeechTask.labelled(split), or export with the front end inside (sample_rate_input=16000)."
            )
        problems = [BadRow(row.path, reason) for row in dataset if (reason := find_problem(row))]
        if problems:
            raise ValueError(
                f"{len(problems)} of {len(dataset)} utterances cannot be compared; leave them out, as "
                f"SpeechTask.utterances does:{list_problems(problems)}"
            )
        return
    if not any(np.any(dataset[index][2]) for index in range(len(dataset))):
        raise ValueError("The dataset has no utterances, so nothing can be compared. Give some of the test set.")
    found = np.shape(_values_and_lengths(dataset[0][0])[0])
    if len(found) != len(shape) or tuple(shape[2:]) != found[2:]:
        raise ValueError(f"The file takes {wanted}; the dataset has inputs of shape {found}. Give the dataset as such.")


def utterances(dataset, tokenizer, frontend):
    """Yield what is heard of every utterance, without padding, and what is said in it.

    Args:
        dataset, tokenizer: as `verify_litert` takes them, checked.
        frontend: the `LogMel` behind a file that takes audio.
    """
    if _is_manifest(dataset):
        for utterance in dataset:
            yield load_audio(utterance.path, frontend.sample_rate), utterance.text
        return
    decode = decoder(tokenizer)
    for index in range(len(dataset)):
        x, labels, sample_weight = dataset[index]
        values, lengths = _values_and_lengths(x)
        for row in np.flatnonzero(sample_weight):
            yield values[row, : int(lengths[row])].astype(np.float32), decode(np.asarray(labels[row]))


def decoder(tokenizer):
    """Return the function from labels to text; without a tokenizer every label is a word."""
    return _joined_numbers if tokenizer is None else tokenizer.decode


def _joined_numbers(labels):
    return " ".join(str(label) for label in labels if label)


def _is_manifest(dataset):
    return len(dataset) > 0 and isinstance(dataset[0], Utterance)


def _values_and_lengths(x):
    if not isinstance(x, dict):
        return np.asarray(x), np.full(len(x), len(x[0]))
    (values,) = (value for name, value in x.items() if name != "lengths")
    return np.asarray(values), x["lengths"]
