"""The known corpora: preparing one by name, opening one, and choosing one when the user did not."""

import dataclasses
import glob
import hashlib
import inspect
import json
import os
from collections.abc import Callable

from keras_usm_lite.data import synthetic
from keras_usm_lite.data.corpora import arabic_commands, librispeech, speechocean762
from keras_usm_lite.data.corpora.cache import cache_home, replacing_folder
from keras_usm_lite.data.corpora.corpus import INFO_FILE, Corpus, read_corpus, read_provenance, write_corpus
from keras_usm_lite.data.corpora.download import CorpusUnavailable, download
from keras_usm_lite.data.corpora.manifest_folder import open_manifest_folder


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How a corpus is made: `build(source, folder, **options)` returns the manifest of each split.

    A synthetic corpus has no source: `build(folder, **options)`.
    """

    build: Callable
    description: str
    tokens: str
    url: str | None = None
    synthetic: bool = False


_RECIPES = {
    "arabic_commands": _Recipe(
        arabic_commands.build_arabic_commands, arabic_commands.DESCRIPTION, "word", arabic_commands.URL
    ),
    "speechocean762": _Recipe(
        speechocean762.build_speechocean762, speechocean762.DESCRIPTION, "char", speechocean762.URL
    ),
    "librispeech": _Recipe(librispeech.build_librispeech, librispeech.DESCRIPTION, "char"),
    "synthetic_commands": _Recipe(synthetic.build_synthetic_commands, synthetic.DESCRIPTION, "word", synthetic=True),
}

CORPORA = (*_RECIPES, "manifest")


def prepare_corpus(name, source=None, cache_dir=None, **options):
    """Makes a corpus ready for training and returns its manifests.

    | name | what | source |
    |---|---|---|
    | `arabic_commands` | connected Arabic command words | archive or folder; downloaded if None |
    | `speechocean762` | non-native read English | archive or folder; downloaded if None |
    | `librispeech` | read English audiobooks | folder |
    | `manifest` | your own recordings | folder with train.tsv, dev.tsv and test.tsv |
    | `synthetic_commands` | synthesised English command words | none |

    The result is kept in the cache, and a finished one is used again. It is made in a temporary folder that
    is renamed at the end, so an interrupted preparation leaves nothing that looks finished. To start afresh,
    delete its folder in `<cache>/corpora`.

    Args:
        name: Name of the corpus, see above.
        source: Path of a local archive or folder.
        cache_dir: Cache folder; the default is `$KERAS_USM_LITE_HOME` or `~/.cache/keras_usm_lite`.
        **options: Options of the corpus: `seed`, and for `synthetic_commands` also `sizes` and `snr`.

    Returns:
        Dict from split (`"train"`, `"dev"`, `"test"`, perhaps more) to the path of its manifest.

    Raises:
        ValueError: If the name is unknown, or the source is missing or not the corpus.
        TypeError: If the corpus does not have an option.
        CorpusUnavailable: If the corpus cannot be downloaded.

    Example:

    >>> import contextlib, io, tempfile
    >>> with contextlib.redirect_stdout(io.StringIO()):
    ...     manifests = prepare_corpus("synthetic_commands", cache_dir=tempfile.mkdtemp(), sizes=(3, 1, 1))
    >>> sorted(manifests)
    ['dev', 'test', 'train']
    """
    return _prepare(name, source, cache_dir, options).splits


def open_corpus(path_or_name, cache_dir=None):
    """Returns a corpus given as a folder with manifests, or by name.

    Args:
        path_or_name: A name that `prepare_corpus` prepares without a source, or the path of a folder that
            `prepare_corpus` made or that holds `train.tsv`, `dev.tsv` and `test.tsv`.
        cache_dir: Cache folder, see `prepare_corpus`.

    Returns:
        The `Corpus`.

    Raises:
        ValueError: If it is neither a name nor a folder, or the folder holds no corpus.
        CorpusUnavailable: If the corpus cannot be downloaded.

    Example: `open_corpus("/data/my_recordings").splits["train"]`.
    """
    if path_or_name in _RECIPES:
        return _prepare(path_or_name, None, cache_dir, {})
    if os.path.isdir(path_or_name):
        return open_manifest_folder(path_or_name)
    raise ValueError(
        f"{path_or_name!r} is neither a folder nor one of {', '.join(_RECIPES)}; give the path of a folder "
        "with train.tsv, dev.tsv and test.tsv, or one of these names."
    )


def default_corpus(cache_dir=None):
    """Returns the best corpus that can be had without asking, and prints which one and why.

    In this order: the folder or name in `$KERAS_USM_LITE_DATA`; of the corpora of human speech that were prepared
    in the cache, whatever their name and options, the latest; `arabic_commands` downloaded; `synthetic_commands`.

    Args:
        cache_dir: Cache folder, see `prepare_corpus`.

    Returns:
        The `Corpus`.

    Example: `default_corpus().splits["train"]`.
    """
    wanted = os.environ.get("KERAS_USM_LITE_DATA")
    if wanted:
        return _announce(open_corpus(wanted, cache_dir), "given by KERAS_USM_LITE_DATA")
    for folder in _prepared_folders(cache_dir):
        corpus = read_corpus(folder)
        if not corpus.synthetic and all(map(os.path.exists, corpus.splits.values())):
            return _announce(corpus, f"prepared earlier, {folder}")
    name = "arabic_commands"
    try:
        return _announce(open_corpus(name, cache_dir), "downloaded")
    except (CorpusUnavailable, ValueError) as error:  # no answer, or something else than the archive
        print(f"{name} is not available: {error}")
    return _announce(open_corpus("synthetic_commands", cache_dir), "the only one that needs no data")


def _prepared_folders(cache_dir):
    """Returns the folders of the finished corpora in the cache, the latest first."""
    finished = glob.glob(os.path.join(glob.escape(cache_home(cache_dir)), "corpora", "*", INFO_FILE))
    return [os.path.dirname(path) for path in sorted(finished, key=os.path.getmtime, reverse=True)]


def _announce(corpus, reason):
    print(f"Corpus: {corpus.name} ({reason}): {corpus.description}.")
    return corpus


def _prepare(name, source, cache_dir, options):
    source = None if source is None else os.path.abspath(os.path.expanduser(os.fspath(source)))
    if name == "manifest":
        return _open_own(source, options)
    if name not in _RECIPES:
        raise ValueError(f"Unknown corpus {name!r}; choose one of {', '.join(CORPORA)}.")
    recipe = _RECIPES[name]
    if recipe.synthetic and source is not None:
        raise ValueError(f"{name} is synthesised and takes no source, but got {source!r}; leave it out.")
    folder, settings = _locate(name, options, cache_dir)
    if _is_finished(folder, settings, source):
        return read_corpus(folder)
    if source is None and not recipe.synthetic:
        source = _download(name, recipe, cache_dir)
    with replacing_folder(folder) as temporary:
        inputs = () if recipe.synthetic else (source,)
        splits = recipe.build(*inputs, temporary, **options)
        corpus = Corpus(name, splits, recipe.synthetic, recipe.description, recipe.tokens)
        write_corpus(temporary, corpus, source=source, options=settings)
    return read_corpus(folder)


def _locate(name, options, cache_dir):
    """Returns the folder of a corpus in the cache, and its options with the defaults filled in."""
    parameters = inspect.signature(_RECIPES[name].build).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    unknown = ", ".join(sorted(set(options) - set(defaults)))
    if unknown:
        raise TypeError(f"{name} has no option {unknown}; it has {', '.join(defaults) or 'none'}.")
    settings = json.dumps({**defaults, **options}, sort_keys=True)
    if settings != json.dumps(defaults, sort_keys=True):
        name = f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    return os.path.join(cache_home(cache_dir), "corpora", name), json.loads(settings)


def _is_finished(folder, settings, source=None):
    if not os.path.exists(os.path.join(folder, INFO_FILE)):
        return False
    made = read_provenance(folder)
    # The options are compared because a later version of the library may have other defaults.
    return made["options"] == settings and source in (None, made["source"])


def _open_own(source, options):
    if source is None or options:
        raise ValueError(
            'The corpus "manifest" takes a `source`, the path of a folder with train.tsv, dev.tsv and '
            f"test.tsv, and no options; received source={source!r} and options {options}."
        )
    return open_manifest_folder(source)


def _download(name, recipe, cache_dir):
    if recipe.url is None:
        raise ValueError(f"{name} is not downloaded for you; get it and pass its folder as `source`.")
    return download(recipe.url, os.path.join(cache_home(cache_dir), "downloads"))
