"""Optimizers for learning masks."""

from keras_usm_lite.optimizers.step_adamw import StepAdamW

__all__ = ["StepAdamW"]
