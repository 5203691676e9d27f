"""`NMPruning`: when N:M masks are made, fade in, and freeze."""

import warnings

from keras_usm_lite.callbacks.mask_schedules import FADES, Shots, TfmotSchedule, fade
from keras_usm_lite.callbacks.step_callback import StepCallback
from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.core.nm_mask import nm_violations
from keras_usm_lite.rewrite import layer_path


class NMPruning(StepCallback):
    """Make the N:M masks of all sparse layers of the model: once, in a few shots, step by step, or fading in.

    * One-shot and few-shot: shot `i` happens before training step `start_step + i * interval`, for `i < num_shots`;
      afterwards the masks stay.
    * `gradual` (structure decay): early shots prune less; the shots go through `m - 1, m / 2, m / 4, ..., n` of `m`, so
      that 1:4 in three shots goes 3:4, 2:4, 1:4, and 1:8 in four goes 7:8, 4:8, 2:8, 1:8.
    * `decay` (mask decay): pruned weights are not zero at once but fade, `w (mask + (1 - mask) beta_t)`, with
      `beta_t = 1 - t / decay_steps` or `exp(-5 t / decay_steps)`, `t` steps after the first mask. Their gradient fades
      alike with `SparsityConfig(gradient="hard")`, and is full, as in the source, with "ste". After `decay_steps` they
      are zero.
    * Layers with `SparsityConfig(every_step=True)` make their own masks in every step, from `start_step` on;
      `freeze_step` ends that.

    All state is in the layers and in the optimizer's step count, so an interrupted training continues with the same
    masks. `EarlyStopping(restore_best_weights=True)` could go back to an epoch before the last shot: let it begin
    after that one, with `start_from_epoch`.

    Args:
        start_step: training step before which the first mask is made; the model is dense until then.
        num_shots: number of times the masks are made.
        interval: training steps between two shots.
        gradual: prune step by step instead of to the final pattern at once.
        decay: None, "linear" or "exponential".
        decay_steps: steps after which pruned weights are gone.
        freeze_step: step from which on every-step masks stay; None: never.
        schedule: instead of the first four, a tfmot pruning schedule (`PolynomialDecay`, `ConstantSparsity`). tfmot
            counts zeros: its final sparsity 0.75 is our 1:4. A layer is never pruned beyond its own N:M.

    Raises:
        ValueError: a number below its minimum, arguments that exclude each other, a model without sparse layers,
            arguments that would do nothing for those it has, or "decay" of codes without a zero ("midrise").

    Source: arXiv 2312.08553 and google/praxis `sparsity_modes.py` (one-shot, few-shot); structure decay and mask decay:
    arXiv 2209.07617.

    Example:

    >>> import keras, numpy as np, keras_usm_lite as usm
    >>> model = keras.Sequential([keras.Input((8,)), usm.NMSparseDense(2, "2:4")])
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((4, 8)), np.ones((4, 2)), verbose=0, callbacks=[NMPruning()])
    >>> float(np.mean(model.layers[0].mask))
    0.5
    """

    def __init__(
        self,
        start_step=0,
        num_shots=1,
        interval=1,
        gradual=False,
        decay=None,
        decay_steps=0,
        freeze_step=None,
        schedule=None,
    ):
        super().__init__()
        minimum = {"start_step": (start_step, 0), "num_shots": (num_shots, 1), "interval": (interval, 1)}
        if decay not in FADES:
            raise ValueError(f"decay={decay!r} is not known; choose one of {FADES}.")
        minimum["decay_steps"] = (decay_steps, 0 if decay is None else 1)
        minimum["freeze_step"] = (0 if freeze_step is None else freeze_step, 0)
        for name, (value, least) in minimum.items():
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if decay is None and decay_steps:
            raise ValueError(
                f"decay_steps={decay_steps} without decay: choose 'linear' or 'exponential', or leave it out."
            )
        if gradual and num_shots == 1:
            raise ValueError("gradual=True prunes shot by shot: choose num_shots of at least 2.")
        shots = Shots(start_step, num_shots, interval, gradual)
        if schedule is not None and shots != Shots():
            raise ValueError("schedule replaces start_step, num_shots, interval and gradual; leave those out.")
        self.shots = shots if schedule is None else TfmotSchedule(schedule)
        first = self.shots.first
        if freeze_step is not None and 0 < first >= freeze_step:
            raise ValueError(
                f"freeze_step={freeze_step} comes before any mask: the first is made at start_step={first}. Choose a "
                "later freeze_step, or an earlier start."
            )
        self.decay = decay
        self.decay_steps = decay_steps
        self.freeze_step = freeze_step

    def on_train_begin(self, logs=None):
        """Find the sparse layers and check that there are any to act on."""
        super().on_train_begin(logs)
        layers = [layer for layer in compressed_layers(self.model) if layer.sparsity is not None]
        self._own_masks = [layer for layer in layers if layer.sparsity.every_step]
        self._layers = [layer for layer in layers if not layer.sparsity.every_step]
        idle = self.freeze_step is None and not self.shots.first
        if not self._layers and (idle or not self._own_masks):
            raise ValueError(
                "NMPruning found no layer whose mask it could make. Give layers sparsity='2:4' (or use usm.compress), "
                "or drop the callback; layers with every_step=True need it for start_step and freeze_step only."
            )
        self._check_that_arguments_matter()
        self._done, self._fading = None, True
        self._frozen = None  # unknown: a training may continue, or follow one that froze the masks

    def _check_that_arguments_matter(self):
        if not self._layers and (self.decay or self.shots != Shots(self.shots.first)):
            raise ValueError(
                "All sparse layers have every_step=True and make their own masks: num_shots, interval, gradual, decay "
                "and schedule would do nothing. Leave them out, or train with every_step=False."
            )
        if not self._own_masks and self.freeze_step is not None:
            raise ValueError(
                f"freeze_step={self.freeze_step} would do nothing: it ends the masks of layers with every_step=True, "
                "which this model lacks. Leave it out; masks stay after the last shot."
            )
        for layer in self._layers if self.decay else ():
            if layer.quantization is not None and layer.quantization.codebook == "midrise":
                raise ValueError(
                    f"decay={self.decay!r} lets weights fade to zero, which codes of {layer_path(layer)!r} do not have "
                    "(midrise, as all one-bit ones are). Use codebook='symmetric', or leave decay out."
                )

    def on_step(self, step):
        """Make the masks if one is due, or was due before this training began; let pruned weights fade."""
        self._freeze(step)
        due = self.shots.latest(step)
        if due is None:
            return
        if due != self._done:
            self._done = due
            self.synchronize()
            if step - due < self._steps_per_call() or self._missed(due):
                self.flips = sum(layer.update_mask(n=self.shots.kept(layer.sparsity, due)) for layer in self._layers)
            if self.decay is None:
                for layer in self._layers:
                    layer.mask_fade.assign(0.0)  # what an earlier training with decay left
        if self.decay is not None:
            self._fade(step)

    def _fade(self, step):
        """Set what is left of pruned weights; after `decay_steps` there is nothing more to do."""
        passed = step - self.shots.first
        if not self._fading and passed >= self.decay_steps + self._steps_per_call():
            return
        self._fading = passed < self.decay_steps
        self.synchronize()
        for layer in self._layers:
            layer.mask_fade.assign(fade(self.decay, passed, self.decay_steps))

    def _freeze(self, step):
        """Let every-step layers keep the masks they have, before the first step of masks and after the last."""
        frozen = step < self.shots.first or (self.freeze_step is not None and step >= self.freeze_step)
        if frozen == self._frozen:
            return
        self._frozen = frozen
        self.synchronize()
        for layer in self._own_masks:
            layer.mask_frozen.assign(float(frozen))

    def on_train_end(self, logs=None):
        """Warn if the training ended before the masks were made, or while pruned weights were still fading."""
        self._warn_of_missing_masks()
        if self.decay is not None and self._fading and self._done is not None:
            warnings.warn(
                f"The training ended before pruned weights had faded: decay_steps={self.decay_steps} from step "
                f"{self.shots.first} on. The model is not sparse yet. Train on, or choose fewer decay_steps.",
                stacklevel=2,
            )

    def _warn_of_missing_masks(self):
        denser = [layer for layer in self._layers + self._own_masks if not layer.mask_made]
        if denser:
            warnings.warn(
                f"The training ended with {len(denser)} masks denser than their N:M, such as that of "
                f"{layer_path(denser[0])!r} ({denser[0].sparsity}). Train for more steps, or let the schedule end "
                "earlier.",
                stacklevel=3,
            )

    def _missed(self, due):
        """True if a mask is denser than after this shot: the optimizer has counted past it without this callback."""
        return any(
            int(nm_violations(layer.mask, self.shots.kept(layer.sparsity, due), layer.sparsity.m))
            for layer in self._layers
        )

    def _steps_per_call(self):
        return getattr(self.model, "steps_per_execution", 1) or 1
