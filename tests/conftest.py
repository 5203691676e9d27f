"""Settings for all tests."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # the first example of a test pays for compiling
settings.load_profile("no deadline")
