"""What JAX devices and processes that train together agree on: layout of weights, data, the backup to go on from."""

import contextlib
import json
import os
import zipfile
import zlib

import keras
import numpy as np

from keras_usm_lite.callbacks.backup import DESCRIPTION
from keras_usm_lite.data.feature_cache import file_crc32
from keras_usm_lite.data.manifest import replacing

# Projections whose outputs are split feed those whose inputs are split: one exchange of activations per pair.
SPLIT_OUTPUTS = r".*/(up|expand|query|key|value)"
SPLIT_INPUTS = r".*/(down|project|output)"
CHUNK = 1 << 24  # bytes of a backup that are sent at once


def conformer_layout(mesh, axis="model"):
    """Return the layout map of a `USMForCTC` or `USMEncoder` for `keras.distribution.ModelParallel`.

    A kernel `[inputs, outputs]` that widens or reads (`up`, `expand`, `query`, `key`, `value`) is split along its
    outputs, one that narrows or writes (`down`, `project`, `output`) along its inputs. A mask is split like its kernel,
    bias and scales along outputs only; the one scale of `per_tensor=True` cannot be split. Everything else is
    replicated, the front end and the CTC head included. The optimizer's moments follow their weights.

    With `d` devices on `axis` and width `w`, a device holds `23 w^2 / d` weights of a block.

    Args:
        mesh: a `keras.distribution.DeviceMesh` with an axis for the weights; their widths must be multiples of its
            size.
        axis: the name of that axis.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: the mesh has no such axis.

    Source: Megatron-LM (arXiv 1909.08053), section 3.

    Example:

    >>> mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])
    >>> layout = conformer_layout(mesh)
    >>> layout["encoder/block_0/ffn_start/up/kernel"].axes, layout["encoder/block_0/ffn_start/down/mask"].axes
    ((None, 'model'), ('model', None))
    """
    if axis not in mesh.axis_names:
        raise ValueError(
            f"The mesh has the axes {mesh.axis_names}, none of them is {axis!r}. Name its axis for weights."
        )
    layout = keras.distribution.LayoutMap(mesh)
    layout[f"{SPLIT_OUTPUTS}/(kernel|mask|kernel_scale|scale_gain|kernel_zero_point)$"] = (None, axis)
    layout[f"{SPLIT_OUTPUTS}/bias$"] = (axis,)
    layout[f"{SPLIT_INPUTS}/(kernel|mask)$"] = (axis, None)
    return layout


def check_same_data(task, files=()):
    """Raise in every JAX process if they do not train on the same data.

    Every process reads a corpus and computes features of its own. Where one host has another version of it, or cannot
    read a recording and leaves it out, the batches of the processes no longer fit together: the training waits forever
    or, worse, goes on. Compared are texts, durations and number of the utterances, shapes and number of batches, and
    what is in `files`.

    Args:
        task: the `SpeechTask` of this process.
        files: paths of other files that have to be the same everywhere, such as the model that all begin with.

    Raises:
        ValueError: data or files of two processes differ, or a file cannot be read in one.

    Example:

    >>> import types
    >>> Batches = type("Batches", (list,), {"bucket_shapes": [(8, 400)]})
    >>> task = types.SimpleNamespace(utterances={"train": []}, batches={"train": Batches()})
    >>> check_same_data(task)  # a process alone agrees with itself
    """
    from jax.experimental.multihost_utils import process_allgather

    checksums = {"The corpus": _plan_checksum(task), **{path: _checksum(path) for path in files}}
    found = process_allgather(np.array(list(checksums.values()), "uint32")).reshape(-1, len(checksums))
    for name, column in zip(checksums, found.T, strict=True):
        if (column != column[0]).any():
            counts = ", ".join(f"{len(utterances)} of {split}" for split, utterances in task.utterances.items())
            others = np.flatnonzero(column != column[0]).tolist()
            raise ValueError(
                f"{name} of the processes {others} is not that of process 0 (this process has {counts}). Give every "
                "host the same; a recording that cannot be read is left out."
            )


def _plan_checksum(task):
    """A checksum of what is trained on, in which order and shapes."""
    plan = {
        split: [
            [[utterance.text, utterance.duration] for utterance in utterances],
            len(task.batches[split]),
            task.batches[split].bucket_shapes,
        ]
        for split, utterances in task.utterances.items()
    }
    return zlib.crc32(json.dumps(plan, default=int).encode())


def _checksum(path):
    """The checksum of a file; of one that cannot be read one that no other process has."""
    import jax

    try:
        return file_crc32(path)
    except OSError:
        return jax.process_index()


def share_backup(backup):
    """Replace the backups of all JAX processes by the furthest one, so that all continue at the same epoch.

    Every process has a folder of its own and writes the same state into it, but not at the same instant: killed
    between two of these writes, or with a new machine among them, processes would start from different epochs. Call
    it in every process, before `fit`. Where all backups are of one epoch, nothing is sent.

    Args:
        backup: the `callbacks.Backup` of this process, of a model whose weights are the same in every process
            (`keras.distribution.DataParallel`).

    Raises:
        OSError: the backup of another process cannot be written here.

    Example:

    >>> import tempfile
    >>> from keras_usm_lite.callbacks import Backup
    >>> backup = Backup(tempfile.mkdtemp())
    >>> share_backup(backup)  # a process alone has what it has
    >>> os.path.exists(backup.path)
    False
    """
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

    own = _epoch(backup.path)
    epochs = process_allgather(np.int32(own))
    if (epochs == own).all():
        return
    giving = jax.process_index() == epochs.argmax()
    os.makedirs(os.path.dirname(backup.path), exist_ok=True)
    with contextlib.nullcontext(os.devnull) if giving else replacing(backup.path) as target:
        with open(target, "wb") as file:
            file.writelines(_pieces(backup.path, giving, lambda array: broadcast_one_to_all(array, giving)))


def _epoch(path):
    """The epoch of a backup; -1 if there is none or it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(DESCRIPTION))["epoch"]
    except (OSError, zipfile.BadZipFile, KeyError):
        return -1


def _pieces(path, giving, share):
    """The bytes of the giving process's file, in every process; `share` gives an array of that process to all."""
    size = os.path.getsize(path) if giving else 0
    chunks, rest = share(np.array(divmod(size, CHUNK), "int32")).tolist()
    with open(path if giving else os.devnull, "rb") as file:
        for length in [CHUNK] * chunks + [rest]:
            piece = np.frombuffer(file.read(CHUNK).ljust(CHUNK, b"\0"), "uint8")
            yield share(piece)[:length].tobytes()
