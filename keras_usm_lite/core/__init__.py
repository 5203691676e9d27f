"""Pure functions on tensors: each formula of the method, once, for every Keras backend."""
