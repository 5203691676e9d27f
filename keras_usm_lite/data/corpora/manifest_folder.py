"""The user's own corpus: a folder with train.tsv, dev.tsv and test.tsv, used in place."""

import os

from keras_usm_lite.data.corpora.corpus import Corpus, has_corpus, read_corpus
from keras_usm_lite.data.manifest import ManifestError, find_problem, read_manifest

SPLITS = ("train", "dev", "test")
# A vocabulary of this size fits an output layer of words; a larger one calls for characters.
MOST_WORDS = 200


def open_manifest_folder(folder):
    """Returns the `Corpus` of a folder with the manifests `train.tsv`, `dev.tsv` and `test.tsv`.

    Put one tab-separated file per split into a folder, each with a header row and the columns `path`
    (relative to the folder, or absolute), `duration_s`, `text` and `speaker`. Nothing is copied or changed.
    The tokens are words if the training texts have at most 200 distinct words, else characters. A folder made
    by `prepare_corpus` is recognised and described as it was made.

    Args:
        folder: Path of the folder.

    Raises:
        ManifestError: If a manifest is missing or malformed, or none of its utterances can be used.

    Example:

    >>> import os, tempfile, numpy as np
    >>> from keras_usm_lite.data.audio import write_wav
    >>> from keras_usm_lite.data.manifest import Utterance, write_manifest
    >>> folder = tempfile.mkdtemp()
    >>> wav = os.path.join(folder, "a.wav")
    >>> write_wav(wav, np.zeros(16000))
    >>> for split in ("train", "dev", "test"):
    ...     write_manifest(os.path.join(folder, f"{split}.tsv"), [Utterance(wav, 1.0, "yes", "anna")])
    >>> open_manifest_folder(folder).tokens
    'word'
    """
    folder = os.path.abspath(folder)
    if has_corpus(folder):
        return read_corpus(folder)
    splits = {split: os.path.join(folder, f"{split}.tsv") for split in SPLITS}
    missing = [f"{split}.tsv" for split, path in splits.items() if not os.path.exists(path)]
    if missing:
        raise ManifestError(f"{folder}: no {', '.join(missing)}; the folder needs train.tsv, dev.tsv and test.tsv.")
    utterances = {split: _usable(path) for split, path in splits.items()}
    words = {word for utterance in utterances["train"] for word in utterance.text.split()}
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in utterances.items())
    return Corpus(
        name=os.path.basename(folder),
        splits=splits,
        synthetic=False,
        description=f"the manifests in {folder} ({counts} utterances)",
        tokens="word" if len(words) <= MOST_WORDS else "char",
    )


def _usable(path):
    good = [utterance for utterance in read_manifest(path) if find_problem(utterance) is None]
    if not good:
        raise ManifestError(f"{path}: none of its utterances can be used; check the paths of the audio files.")
    return good
