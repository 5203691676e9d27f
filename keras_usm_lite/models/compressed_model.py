"""`CompressedModel`: a compressed copy of a subclassed model that remembers how it was made."""

import json

import keras

from keras_usm_lite.quantization_config import QuantizationConfig
from keras_usm_lite.rewrite import build_again, walk_layers
from keras_usm_lite.sparsity_config import SparsityConfig


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class CompressedModel(keras.Model):
    """What `compress` returns for a model whose own configuration cannot mention its compressed layers.

    It behaves as the model inside: same inputs, same outputs, same weights. Its configuration is the configuration of
    the original model plus the rules; loading rebuilds the original and compresses it again, then reads the weights.

    Args:
        model: the compressed copy.
        template: the original model, or its serialised configuration.
        rules: the rules given to `compress`.
        chosen: which rule each layer fell under, see `compression.apply_rules`.

    Example:

    >>> import keras_usm_lite as usm
    >>> small = usm.compress(usm.USMForCTC(9, num_layers=1), {"ffn|attention": ("int4", "2:4")})
    >>> type(small).__name__, type(small.model).__name__
    ('CompressedModel', 'USMForCTC')
    """

    def __init__(self, model, template, rules, chosen, **kwargs):
        kwargs.setdefault("name", model.name)
        # Inputs are left to the model inside. Keras scales losses by the policy of the model that is compiled.
        super().__init__(**kwargs, autocast=False, dtype=model.dtype_policy)
        self.model = model
        if isinstance(template, keras.Model):
            template = keras.saving.serialize_keras_object(template)
            template.pop("compile_config", None)
        self._template = json.dumps(template)  # as text: Keras would track a dict, and from_config may change it
        self.rules = {
            pattern: (QuantizationConfig.resolve(pair[0]), SparsityConfig.resolve(pair[1]))
            for pattern, pair in rules.items()
        }
        self.chosen = tuple(chosen)
        if hasattr(model, "output_names"):  # by which losses and metrics may be named
            self.output_names = model.output_names
        self.supports_masking = getattr(model, "supports_masking", False)
        self.built = True

    @property
    def template(self):
        """The serialised configuration of the original model."""
        return json.loads(self._template)

    def call(self, inputs, *args, training=None, **kwargs):
        """Call the compressed copy."""
        return self.model(inputs, *args, training=training, **kwargs)

    def compute_output_shape(self, input_shape):
        """The output shape of the model inside."""
        return self.model.compute_output_shape(input_shape)

    def compute_output_spec(self, *args, **kwargs):
        """Shape and type as `call` gives them: the model inside need not have a `compute_output_shape`."""
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def get_config(self):
        """Return the original model's configuration, the rules, which layer they took, and what is frozen now."""
        rules = {
            pattern: tuple(None if config is None else config.get_config() for config in pair)
            for pattern, pair in self.rules.items()
        }
        config = {"name": self.name, "template": self.template, "rules": rules, "chosen": list(self.chosen)}
        frozen = [number for number, layer in enumerate(walk_layers(self)) if not layer.trainable]
        if frozen or '"trainable": false' in self._template:  # it may have been frozen, or set free, since then
            config["frozen"] = frozen
        return config

    @classmethod
    def from_config(cls, config):
        """Rebuild the original model and compress it again."""
        from keras_usm_lite.compression import apply_rules  # it returns this class: import when it is needed

        template = config["template"]
        original = keras.saving.deserialize_keras_object({**template, "build_config": None})
        if not original.built and template.get("build_config"):
            build_again(original, template["build_config"], original.name)
        model = apply_rules(original, config["rules"], config["chosen"])
        if "frozen" in config:
            for number, layer in enumerate(walk_layers(model)):  # parents first: what they say goes for all below
                layer.trainable = number not in config["frozen"]
        return model
