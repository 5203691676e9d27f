"""`weight_budget`: find out how many weights a description builds, before any of them takes memory."""

import contextlib
import math

import keras
from keras.src.backend.common import global_state  # where Keras lists variables that are not initialized yet

_PENDING = "uninitialized_variables"


@contextlib.contextmanager
def weight_budget(variables, elements):
    """Inside the block Keras variables take no memory, and creating too many of them is an error.

    In a `keras.StatelessScope` a variable waits for its initial value, so a model can be built to see what it is made
    of. It is good for nothing else: its variables never get a value.

    Args:
        variables: how many variables may be created.
        elements: how many elements they may have together.

    Raises:
        ValueError: from the creation of the variable that is one too many.

    Example:

    >>> with weight_budget(variables=2, elements=1000):
    ...     keras.layers.Dense(10**9).build((None, 10**9))
    Traceback (most recent call last):
    ...
    ValueError: more than 2 variables or 1000 elements are created.
    """
    before = global_state.get_global_attribute(_PENDING)
    global_state.set_global_attribute(_PENDING, _Budget(variables, elements))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(_PENDING, [] if before is None else before)


class _Budget(list):
    """Keras' list of waiting variables, with a limit."""

    def __init__(self, variables, elements):
        super().__init__()
        self.variables, self.elements = variables, elements
        self.total = 0

    def append(self, variable):
        self.total += math.prod(variable.shape)
        if len(self) >= self.variables or self.total > self.elements:
            raise ValueError(f"more than {self.variables} variables or {self.elements} elements are created.")
        super().append(variable)
