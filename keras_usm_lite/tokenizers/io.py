"""A tokenizer in one JSON file that says which tokenizer it is."""

import json
import pathlib

import keras

from keras_usm_lite.data.manifest import replacing

_FORMAT = "keras_usm_lite tokenizer"
_VERSION = 1


def save_tokenizer(tokenizer, path):
    """Writes a tokenizer to one JSON file; an existing file is replaced in one step.

    Args:
        tokenizer: a tokenizer of this library, or an object of any class with `get_config` and `from_config`
            that is registered with `keras.saving.register_keras_serializable`.
        path: the file to write; its folder must exist.

    Raises:
        ValueError: if the class of the tokenizer is not registered.

    Example:
        >>> import os, tempfile
        >>> from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
        >>> path = os.path.join(tempfile.mkdtemp(), "tokenizer.json")
        >>> save_tokenizer(CharTokenizer("ab"), path)
        >>> load_tokenizer(path).decode([2, 1])
        'ba'
    """
    name = keras.saving.get_registered_name(type(tokenizer))
    if keras.saving.get_registered_object(name) is None:
        raise ValueError(
            f"{name} is not registered, so it could not be loaded again. Decorate the class with "
            "@keras.saving.register_keras_serializable(package=...)."
        )
    content = {"format": _FORMAT, "version": _VERSION, "class": name, "config": tokenizer.get_config()}
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)


def load_tokenizer(path):
    """Reads a tokenizer that `save_tokenizer` wrote.

    Args:
        path: the file to read.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a tokenizer file, is of a newer version, or names a class that is not
            registered.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Give a file written by save_tokenizer.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a tokenizer file: its format is not {_FORMAT!r}. Write it with save_tokenizer."
        )
    if content["version"] != _VERSION:
        raise ValueError(
            f"{path} has version {content['version']!r}, this library reads version {_VERSION}. Upgrade the "
            "library or save the tokenizer again."
        )
    cls = keras.saving.get_registered_object(content["class"])
    if cls is None:
        raise ValueError(
            f"{path} holds a {content['class']!r}, a class that is not registered. Import its module first."
        )
    return cls.from_config(content["config"])
