"""What a model that computes its own loss owes to `tf.distribute`."""

import keras
from keras import ops


def replica_share():
    """Return what one replica's mean counts in the loss of all: `1 / replicas`, a float32 scalar.

    ```
    loss of the step = sum over replicas of the loss of each = sum replica_share() mean_of_the_replica
    ```

    Keras adds up the gradients of all replicas, so every term of a loss must carry this factor. Its own losses do. A
    model that overrides `compute_loss` multiplies by it what it adds to them; 1 without `tf.distribute`.

    Source: Keras' reduction "sum_over_batch_size", which is asked here, so that both always agree.

    Example:

    >>> float(replica_share())
    1.0
    """
    one = ops.ones((1,))
    return _Given(name="replica_share")(one, one)


class _Given(keras.losses.Loss):
    """The mean of what it is given."""

    def call(self, y_true, y_pred):
        return y_pred
