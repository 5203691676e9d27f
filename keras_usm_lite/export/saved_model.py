"""`export_saved_model`: a SavedModel, small on disk, that takes features or raw audio."""

import os

import keras
import numpy as np
from keras import ops

from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.data.corpora.cache import replacing_folder
from keras_usm_lite.export.bake import bake
from keras_usm_lite.export.packed_kernel import PackedKernel
from keras_usm_lite.export.serving import require_tensorflow, serving_model
from keras_usm_lite.layers.log_mel import LogMel
from keras_usm_lite.rewrite import layer_path, walk_layers


def export_saved_model(model, path, frontend=None, packed=True):
    """Write a recogniser as a SavedModel with two signatures, for any batch size and length.

    * `serving_default`: `features` float32 `[batch, frames, bins]` -> `logits`
    * `audio`: `audio` float32 `[batch, samples]` in [-1, 1], 16 kHz -> `logits`

    The file loads anywhere `tf.saved_model.load` does, without this package and without Keras. It holds the kernels in
    their packed bits, as `save_packed` does, and the graph that unpacks them when the file is loaded; a call then costs
    what it costs with float kernels.

    Args:
        model: `USMForCTC` or its compressed copy.
        path: folder to write; replaced as a whole if it is a SavedModel already, or a link to one.
        frontend: the `LogMel` the model was trained with, if it is not the default.
        packed: False stores the effective kernels in float32, for converters that do not run initialisers.

    Returns:
        `path`.

    Raises:
        RuntimeError: the backend is not TensorFlow.
        FileExistsError: `path` exists and is not a SavedModel.
        ValueError: the front end does not fit, or a layer cannot be packed yet: its mask is not made or still fading,
            or it is in a float warm-up.

    Example:

    >>> import tempfile, tensorflow as tf, keras_usm_lite as usm
    >>> model = usm.USMForCTC(4, quantization="int4", num_layers=1, dim=16, num_heads=2, subsampling_channels=4)
    >>> path = export_saved_model(model, os.path.join(tempfile.mkdtemp(), "model"))
    >>> signatures = tf.saved_model.load(path).signatures
    >>> tuple(signatures["audio"](audio=tf.zeros((2, 16000)))["logits"].shape)
    (2, 25, 4)
    """
    require_tensorflow("export_saved_model")
    import tensorflow as tf

    path = os.fspath(path)
    if os.path.exists(path) and not os.path.exists(os.path.join(path, "saved_model.pb")):
        raise FileExistsError(f"{path!r} exists and is not a SavedModel; choose another folder.")
    baked = bake(model)
    kernels = _packed_kernels(model, baked) if packed else []
    content, signatures = _serving_module(baked, kernels, frontend)
    with replacing_folder(os.path.realpath(path)) as temporary:  # a link stays a link, to the new model
        tf.saved_model.save(content, temporary, signatures)
    return path


def _packed_kernels(model, baked):
    """Pair the kernels of the float copy with their packed forms: a list of `(variable, view, PackedKernel)`."""
    float_layers = {layer_path(layer): layer for layer in walk_layers(baked)}
    kernels = []
    for layer in compressed_layers(model):
        path = layer_path(layer)
        float_layer = float_layers[path]
        variable = float_layer.embeddings if isinstance(float_layer, keras.layers.Embedding) else float_layer.kernel
        kernel, view = PackedKernel(layer, path), layer.kernel_view
        unpacked = ops.cast(view.from_matrix(kernel.read()), variable.dtype)
        if not np.array_equal(unpacked, ops.convert_to_numpy(variable)):
            raise RuntimeError(f"Layer {path!r}: the packed kernel is not the trained one; please report this.")
        kernels.append((variable, view, kernel))
    return kernels


def _serving_module(baked, kernels, frontend):
    """Return what is stored, and its signatures.

    Only what the graph reads is tracked. (`keras.export.ExportArchive` tracks each Keras variable and the TensorFlow
    variable inside it, and TensorFlow stores both.)
    """
    import tensorflow as tf

    served = serving_model(baked, batch=None)
    (features,) = served.inputs
    frontend = frontend if frontend is not None else LogMel(num_mel_bins=features.shape[-1])
    (audio,) = serving_model(baked, frontend.sample_rate, batch=None, frontend=frontend).inputs

    def logits_of_features(features):
        state = [(variable, view.from_matrix(kernel.read())) for variable, view, kernel in kernels]
        with keras.StatelessScope(state_mapping=state):
            return {"logits": served(features, training=False)}

    from_features = _concrete(logits_of_features, features)
    from_audio = _concrete(lambda audio: from_features(ops.cast(frontend(audio), "float32")), audio)
    module = tf.Module()
    module.variables_read = list(from_features.graph.variables)
    module.packed = [kernel.arrays for _, _, kernel in kernels]
    module.unpacked = [kernel.resource for _, _, kernel in kernels]
    return module, {"serving_default": from_features, "audio": from_audio}


def _concrete(function, tensor):
    import tensorflow as tf

    signature = [tf.TensorSpec(tensor.shape, "float32", name=tensor.name)]
    return tf.function(function, input_signature=signature, autograph=False).get_concrete_function()
