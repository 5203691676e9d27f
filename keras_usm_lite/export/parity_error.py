"""`ParityError`: an exported file does not do what its model does."""


class ParityError(RuntimeError):
    """A `.tflite` file whose integers or whose texts are not those of the Keras model it should hold."""
