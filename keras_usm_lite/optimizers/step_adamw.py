"""`StepAdamW`: AdamW that stops estimating gradient variances before N:M masks distort them."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class StepAdamW(keras.optimizers.Optimizer):
    """AdamW whose second moment is frozen from update `freeze_step` on.

    With gradient `g_t` of update `t = 1, 2, ...`, `k = min(t, freeze_step)` and decoupled weight decay:

    ```
    m_t = beta_1 m_(t-1) + (1 - beta_1) g_t
    v_t = beta_2 v_(t-1) + (1 - beta_2) g_t^2        for t <= freeze_step, then v_t = v_freeze_step
    w  -= learning_rate (m_t sqrt(1 - beta_2^k) / (1 - beta_1^t) / (sqrt(v_t) + epsilon) + weight_decay w)
    ```

    Up to `freeze_step` this is `keras.optimizers.AdamW`. Afterwards every weight keeps the step size of the dense
    model, while masked gradients, noisier and partly zero, would change it: that is why masks learned with Adam need
    this (`SparsityConfig(gradient="sr_ste", every_step=True)` above all).

    Make the first mask right then: `NMPruning(start_step=freeze_step)`. With `gradient_accumulation_steps=k` the
    optimizer counts updates and the callback batches, so `start_step = k * freeze_step`.

    Choosing `freeze_step`: STEP's own test for the moment (AutoSwitch) is not implemented; the step is yours to choose.
    `v` remembers about `1 / (1 - beta_2)` updates and is an average over that many only after as many: 1,000 with
    the default beta_2, 50 with 0.98. Freeze after a few times that, when the warm-up of the learning rate is over, and
    leave most of the training to the masks. A beta_2 that is too high for the dense phase is better lowered than
    frozen early.

    Args:
        learning_rate: a number or a Keras schedule.
        freeze_step: updates after which the second moment is frozen, at least 1.
        weight_decay: decoupled weight decay, as in `keras.optimizers.AdamW`; see `exclude_from_weight_decay`.
        beta_1, beta_2: decay of the first and the second moment.
        epsilon: added to the root of the second moment.
        **kwargs: of `keras.optimizers.Optimizer`: clipping, `use_ema`, `loss_scale_factor`,
            `gradient_accumulation_steps`, `name`.

    Raises:
        ValueError: `freeze_step` is not a positive integer, or there is no `weight_decay`.

    Source: STEP (arXiv 2302.01172); AdamW: arXiv 1711.05101. The bias correction of the frozen moment is this library's
    choice: that of the update at which it froze, so that nothing jumps.

    Example:

    >>> weight = keras.Variable([1.0, -1.0])
    >>> optimizer = StepAdamW(0.1, freeze_step=1, weight_decay=0.0)
    >>> optimizer.apply([ops.convert_to_tensor([2.0, 2.0])], [weight])
    >>> optimizer.apply([ops.convert_to_tensor([0.0, 200.0])], [weight])  # a masked and a huge gradient
    >>> [round(float(v), 3) for v in ops.sqrt(optimizer.second_moments[0] / 0.001)]
    [2.0, 2.0]
    """

    def __init__(
        self,
        learning_rate=0.001,
        freeze_step=1000,
        weight_decay=0.004,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        **kwargs,
    ):
        if not isinstance(freeze_step, int) or isinstance(freeze_step, bool) or freeze_step < 1:
            raise ValueError(
                f"freeze_step must be an integer of at least 1, got {freeze_step!r}: the second moment that is to be "
                "kept has to be estimated first."
            )
        if weight_decay is None:
            raise ValueError("weight_decay must be a number, got None. For no decay give 0.0.")
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **kwargs)
        self.freeze_step = freeze_step
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def build(self, variables):
        """Create both moments of every variable."""
        if self.built:
            return
        super().build(variables)
        self.first_moments, self.second_moments = self.add_optimizer_variables(variables, ["momentum", "velocity"])

    def update_step(self, gradient, variable, learning_rate):
        """Update one variable; Keras has clipped the gradient and decayed the weights."""
        gradient = ops.cast(gradient, variable.dtype)
        index = self._get_variable_index(variable)
        first, second = self.first_moments[index], self.second_moments[index]
        # No Python number of the step exists inside a compiled step, so freezing is arithmetic.
        step = ops.cast(self.iterations + 1, "float32")
        estimated = ops.minimum(step, float(self.freeze_step))
        beta_1, beta_2 = (ops.cast(beta, "float32") for beta in (self.beta_1, self.beta_2))  # rounded as AdamW does
        correction = ops.sqrt(1.0 - ops.power(beta_2, estimated)) / (1.0 - ops.power(beta_1, step))
        rate = ops.cast(ops.cast(learning_rate, "float32") * correction, variable.dtype)
        self.assign_add(first, (gradient - first) * (1.0 - self.beta_1))
        change = (ops.square(gradient) - second) * (1.0 - self.beta_2)
        self.assign_add(second, ops.where(step <= self.freeze_step, change, 0.0))
        self.assign_sub(variable, first * rate / (ops.sqrt(second) + self.epsilon))

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "freeze_step": self.freeze_step,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }
