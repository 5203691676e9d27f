"""Settings and tools for all tests."""

import contextlib
import gc
import resource

import keras
import pytest
from hypothesis import settings

gc.set_threshold(200_000, 20, 100)  # a session holds millions of graph nodes; looking through them takes its time
settings.register_profile("no deadline", deadline=None)  # the first example of a test pays for compiling
settings.load_profile("no deadline")

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Graphs here run for a few steps, which earn back none of the time that optimizing them takes.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

LONGEST = (
    "test_train_distributed.py",
    "test_xla.py",
    "test_parallel.py",
    "test_co_trainer.py",
    "test_litert.py",
    "test_mixed_precision.py",
    "test_transcribe.py",
    "test_training.py",
    "test_distribution.py",
    "test_saved_models.py",
    "test_publish.py",
    "test_recipe_doc.py",
    "test_readme.py",
    "test_backends_agree.py",
    "test_best_rq.py",
)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process of several is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def full_disk():
    """`with full_disk(limit)`: no file may grow beyond `limit` bytes; a write fails in the middle."""

    @contextlib.contextmanager
    def limited(limit):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def write_three_words():
    """A function that writes a corpus of noise whose texts have three words, for the code of a page to run on."""

    def write(folder):
        import numpy as np

        from keras_usm_lite.data.audio import write_wav
        from keras_usm_lite.data.manifest import Utterance, write_manifest

        folder.mkdir()
        draw = np.random.default_rng(0)
        for split, size in {"train": 12, "dev": 2, "test": 1}.items():
            rows = []
            for number in range(size):
                path = str(folder / f"{split}-{number}.wav")
                write_wav(path, 0.1 * draw.normal(size=9600))
                rows.append(Utterance(path, 0.6, " ".join(draw.choice(["up", "down", "left"], 2)), split))
            write_manifest(folder / f"{split}.tsv", rows)

    return write
