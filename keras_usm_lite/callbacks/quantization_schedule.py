"""`QuantizationSchedule`: how many bits the weights have, and when."""

import warnings

from keras import ops

from keras_usm_lite.callbacks.step_callback import StepCallback
from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.layers.compressed_kernel import FLOAT_BITS
from keras_usm_lite.quantization_config import BITS
from keras_usm_lite.rewrite import layer_path


class QuantizationSchedule(StepCallback):
    """Lower the bits of all quantized layers of the model in stages, such as float, 8 bits, 4 bits.

    Before training step `t` layer `l` gets `bits_l(t) = max(bits of the stage of t, layer.quantization.bits)`: no layer
    goes below the bits it was configured with. At the start of a stage the stored scales are estimated anew: "mse"
    ones always, "learned" ones if the layer's bits change. "absmax" scales follow the kernel by themselves.

    All state is in the layers and in the optimizer's step count, so an interrupted training continues with the same
    bits and scales. Where masks are made before the same step, list `NMPruning` first: scales then fit the new masks. A
    `ModelCheckpoint(save_best_only=True)` may prefer an epoch of an early stage, at more than the configured bits.

    Args:
        stages: `[(step, bits), ...]`: from training step `step` on, so many bits: 8, 4, 3, 2, 1, or None for a float
            warm-up. Steps increase; the first is 0.
        scale_interval: estimate "mse" scales anew before every training step that is a multiple of this; None: only at
            the start of a stage.
        freeze_step: training step from which on all scales keep their values (`layer.freeze_scale()`), not before the
            start of the last stage; None: never.

    Raises:
        ValueError: stages or steps that cannot work, a model without quantized layers, 8 bits for a "midrise" layer,
            or a layer whose bits should change although its scale is frozen.

    Example:

    >>> import keras, numpy as np, keras_usm_lite as usm
    >>> model = keras.Sequential([keras.Input((8,)), usm.QuantDense(2, "int4")])
    >>> model.compile("sgd", "mse")
    >>> schedule = QuantizationSchedule([(0, None), (1, 8), (3, 4)], freeze_step=3)
    >>> history = model.fit(np.ones((4, 8)), np.ones((4, 2)), batch_size=1, verbose=0, callbacks=[schedule])
    >>> model.layers[0].active_bits, float(model.layers[0].scale_frozen)
    (4, 1.0)
    """

    def __init__(self, stages, scale_interval=None, freeze_step=None):
        super().__init__()
        self.stages = _checked_stages(stages)
        if scale_interval is not None and not _is_step(scale_interval, least=1):
            raise ValueError(f"scale_interval must be None or an integer of at least 1, got {scale_interval!r}.")
        last = self.stages[-1][0]
        if freeze_step is not None and not _is_step(freeze_step, least=last):
            raise ValueError(
                f"freeze_step must be None or an integer of at least {last}, the start of the last stage, because a "
                f"frozen scale fits no other bits; got {freeze_step!r}."
            )
        self.scale_interval = scale_interval
        self.freeze_step = freeze_step

    def bits_at(self, step):
        """Bits of the stage that training step `step` lies in; `FLOAT_BITS` in a float warm-up.

        Example:

        >>> schedule = QuantizationSchedule([(0, 8), (500, 4)])
        >>> schedule.bits_at(499), schedule.bits_at(500)
        (8, 4)
        """
        bits = [bits for start, bits in self.stages if start <= step][-1]
        return FLOAT_BITS if bits is None else bits

    def on_train_begin(self, logs=None):
        """Find the quantized layers and check that there are any."""
        super().on_train_begin(logs)
        self._layers = [layer for layer in compressed_layers(self.model) if layer.quantization is not None]
        if not self._layers:
            raise ValueError(
                "QuantizationSchedule found no quantized layer. Give layers quantization='int4' (or use usm.compress), "
                "or drop the callback."
            )
        wide = [bits for _, bits in self.stages if bits is not None and bits > 4]
        odd = [layer for layer in self._layers if layer.quantization.codebook == "midrise"]
        if wide and odd:
            raise ValueError(
                f"Layer {layer_path(odd[0])!r} has the codebook 'midrise', of at most 4 bits, but a stage has "
                f"{wide[0]}. Use None (float), 4, 3 or 2 bits in the stages."
            )
        self._previous = None

    def on_step(self, step):
        """Set bits, estimate scales and freeze them, whatever has fallen due since the last call."""
        first = self._previous is None
        previous = step - (getattr(self.model, "steps_per_execution", 1) or 1) if first else self._previous
        self._previous = step
        estimate = any(previous < start <= step for start, _ in self.stages)
        if self.scale_interval is not None:
            estimate |= previous // self.scale_interval < step // self.scale_interval
        freeze = self.freeze_step is not None and self.freeze_step <= step
        if not (first or estimate or freeze and previous < self.freeze_step):
            return
        self.synchronize()
        for layer in self._layers:
            if _set_bits(layer, max(self.bits_at(step), layer.quantization.bits)):
                layer.update_scale()
            elif estimate:
                layer.update_scale(only=("mse",))
            if freeze and not _is_frozen(layer):
                layer.freeze_scale()

    def on_train_end(self, logs=None):
        """Warn if the training ended before the schedule did."""
        unfinished = [
            f"{layer_path(layer)} ({'float' if layer.active_bits > 8 else layer.active_bits} instead of "
            f"{layer.quantization.bits})"
            for layer in self._layers
            if layer.active_bits > layer.quantization.bits
        ]
        if unfinished:
            warnings.warn(
                f"The quantization schedule {self.stages} left {len(unfinished)} layers above their configured bits: "
                f"{', '.join(unfinished[:5])}{', ...' if len(unfinished) > 5 else ''}. Train for more steps, or let "
                "the last stage begin earlier and at the configured bits.",
                stacklevel=2,
            )


def _checked_stages(stages):
    example = "[(0, None), (500, 8), (1000, 4)]"
    pairs = isinstance(stages, (list, tuple)) and all(isinstance(s, (list, tuple)) and len(s) == 2 for s in stages)
    if not stages or not pairs:
        raise ValueError(f"stages must be (step, bits) pairs such as {example}, got {stages!r}.")
    steps = [step for step, _ in stages]
    if not all(_is_step(step, least=0) for step in steps) or steps[0] != 0 or sorted(set(steps)) != steps:
        raise ValueError(
            f"The steps of the stages must be increasing integers that start at 0, as in {example}, got {steps}."
        )
    for _, bits in stages:
        if bits is not None and (bits not in BITS or isinstance(bits, bool)):
            raise ValueError(f"The bits of a stage must be None (float) or one of {BITS}, got {bits!r}.")
    return [tuple(stage) for stage in stages]


def _is_step(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _set_bits(layer, bits):
    """Put a layer at so many bits; return whether that is a change."""
    if layer.active_bits == bits:
        return False
    if _is_frozen(layer):
        raise ValueError(
            f"Layer {layer_path(layer)!r} cannot go from {layer.active_bits} to {bits} bits: its scale is frozen "
            "(by load_packed or freeze_scale). Thaw it with layer.scale_frozen.assign(0.0), or drop the schedule."
        )
    layer.bits.assign(float(bits))
    return True


def _is_frozen(layer):
    return bool(ops.convert_to_numpy(layer.scale_frozen))
