"""Settings for all tests."""

import keras
import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # the first example of a test pays for compiling
settings.load_profile("no deadline")


@pytest.fixture(scope="module", autouse=True)
def _forget_models():
    """Free what Keras and the backend remember of the models of a file, or a thousand tests fill the memory."""
    yield
    keras.utils.clear_session()
