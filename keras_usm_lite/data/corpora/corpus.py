"""What the rest of the library knows about a prepared corpus."""

import dataclasses
import hashlib
import json
import os

INFO_FILE = "corpus.json"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus that is ready for training.

    Attributes:
        name: Short name, such as `"librispeech"`.
        splits: Path of the manifest of each split: `"train"`, `"dev"`, `"test"` and possibly more.
        synthetic: Whether the speech was synthesised rather than spoken by people.
        description: One line on what it is and where it comes from.
        tokens: The natural output units, `"word"` or `"char"`.

    Example:

    >>> corpus = Corpus("mine", {"train": "/data/train.tsv"}, False, "my recordings", "word")
    >>> corpus.splits["train"], corpus.tokens
    ('/data/train.tsv', 'word')
    """

    name: str
    splits: dict
    synthetic: bool
    description: str
    tokens: str

    def fingerprint(self):
        """Returns a checksum of the manifests, 16 hexadecimal digits: the same rows have the same one anywhere.

        Example:

        >>> Corpus("mine", {}, False, "my recordings", "word").fingerprint()
        'e3b0c44298fc1c14'
        """
        digest = hashlib.sha256()
        for split, path in sorted(self.splits.items()):
            with open(path, "rb") as file:
                digest.update(split.encode() + b"\0" + file.read())
        return digest.hexdigest()[:16]


def write_corpus(folder, corpus, **provenance):
    """Stores `corpus` in `folder/corpus.json`, with the manifests relative to `folder`.

    Args:
        folder: Folder that holds the manifests.
        corpus: The `Corpus`.
        **provenance: How it was made, in JSON types; read back by `read_provenance`.

    Example:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> write_corpus(folder, Corpus("mine", {}, False, "my recordings", "word"), options={"seed": 3})
    >>> read_corpus(folder).name, read_provenance(folder)
    ('mine', {'options': {'seed': 3}})
    """
    info = dataclasses.asdict(corpus)
    info["splits"] = {split: os.path.relpath(path, folder) for split, path in corpus.splits.items()}
    info["provenance"] = provenance
    with open(os.path.join(folder, INFO_FILE), "w", encoding="utf-8") as file:
        json.dump(info, file, indent=2)


def read_corpus(folder):
    """Returns the `Corpus` stored in `folder` by `write_corpus`. See there for an example."""
    folder = os.path.abspath(folder)
    info = _read_info(folder)
    info.pop("provenance")
    info["splits"] = {split: os.path.join(folder, path) for split, path in info["splits"].items()}
    return Corpus(**info)


def has_corpus(folder):
    """Returns whether `write_corpus` has stored a corpus in `folder`; another file may have the same name.

    Example:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> has_corpus(folder)
    False
    """
    try:
        info = _read_info(folder)
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and {"splits", "provenance"} <= info.keys()


def read_provenance(folder):
    """Returns how the corpus in `folder` was made, as given to `write_corpus`. See there for an example."""
    return _read_info(folder)["provenance"]


def _read_info(folder):
    with open(os.path.join(folder, INFO_FILE), encoding="utf-8") as file:
        return json.load(file)
