"""export_saved_model: both signatures served by plain TensorFlow from a small file; only its like is ever replaced."""

import gc
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.packing.packed_layer import pack_layer

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

BINS = 16
SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": BINS}
INPUTS = {"features": (2, 50, BINS), "audio": (3, 9000)}
FEATURES = np.random.default_rng(1).normal(size=(1, 40, BINS)).astype("float32")

# A fresh interpreter without this package and Keras, nor any way to import them.
SERVE = """
import sys
sys.modules["keras_usm_lite"] = sys.modules["keras"] = sys.modules["tf_keras"] = None
import numpy as np
import tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
assert sorted(signatures) == ["audio", "serving_default"], sorted(signatures)
inputs = np.load(sys.argv[2])
outputs = {
    "features": signatures["serving_default"](features=tf.constant(inputs["features"])),
    "audio": signatures["audio"](audio=tf.constant(inputs["audio"])),
}
np.savez(sys.argv[3], **{f"{kind} {name}": value.numpy() for kind, d in outputs.items() for name, value in d.items()})
assert not [name for name in sys.modules if name.startswith(("keras_usm_lite.", "keras."))]
"""


def array(tensor):
    return ops.convert_to_numpy(tensor)


def recogniser():
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(9, quantization="int4", sparsity="2:4", **SIZE)
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(array(weight) + 0.1 * draw.normal(size=weight.shape))
    usm.update_masks(model)
    return model


def older(path):
    """Make a folder that looks like a SavedModel."""
    path.mkdir(parents=True)
    (path / "saved_model.pb").write_bytes(b"older")
    return path


def serve(path, folder):
    """Random inputs, and what both signatures make of them in another process."""
    draw = np.random.default_rng(1)
    inputs = {name: 0.1 * draw.normal(size=shape).astype("float32") for name, shape in INPUTS.items()}
    np.savez(folder / "inputs.npz", **inputs)
    arguments = [sys.executable, "-I", "-c", SERVE, path, folder / "inputs.npz", folder / "outputs.npz"]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return inputs, np.load(folder / "outputs.npz")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and the SavedModel made of it in the place of an older one."""
    path = older(tmp_path_factory.mktemp("saved") / "new folder" / "model")
    (path / "left over").write_bytes(b"older")
    model = recogniser()
    assert usm.export_saved_model(model, path) == str(path)
    return model, path


@pytest.fixture(scope="module")
def loaded(saved):
    import tensorflow as tf

    return tf.saved_model.load(saved[1])


def logits_of(loaded):
    return loaded.signatures["serving_default"](features=FEATURES)["logits"].numpy()


def test_a_fresh_process_without_this_package_serves_the_logits_of_the_model(saved, tmp_path):
    model, path = saved
    inputs, outputs = serve(path, tmp_path)
    assert sorted(outputs) == ["audio logits", "features logits"]
    np.testing.assert_allclose(outputs["features logits"], array(model(inputs["features"])), rtol=1e-5, atol=1e-5)
    from_audio = array(model(usm.LogMel(BINS)(inputs["audio"])))
    np.testing.assert_allclose(outputs["audio logits"], from_audio, rtol=1e-4, atol=1e-4)


def test_the_file_holds_packed_kernels_and_every_other_weight_once(saved):
    import tensorflow as tf

    model, path = saved
    compressed = usm.compressed_layers(model)
    others = usm.bake(model).count_params() - sum(math.prod(layer.kernel.shape) for layer in compressed)
    arrays = [array for layer in compressed for array in pack_layer(layer, "")[1].values()]
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    stored = [reader.get_tensor(name) for name, _ in tf.train.list_variables(str(path / "variables" / "variables"))]
    tensors = [tensor for tensor in stored if isinstance(tensor, np.ndarray)]  # beside them is the graph of objects
    assert sum(tensor.nbytes for tensor in tensors) == 4 * others + sum(array.nbytes for array in arrays)


def test_plain_float_kernels_are_stored_once_and_give_the_same_logits(saved, loaded, tmp_path):
    import tensorflow as tf

    model, _ = saved
    usm.export_saved_model(model, tmp_path / "plain", packed=False)
    data = tmp_path / "plain" / "variables" / "variables.data-00000-of-00001"
    assert 0 <= data.stat().st_size - 4 * usm.bake(model).count_params() < 10_000
    np.testing.assert_array_equal(logits_of(loaded), logits_of(tf.saved_model.load(tmp_path / "plain")))


def test_a_session_serves_it_as_tensorflow_serving_does(saved):
    import tensorflow as tf

    model, path = saved
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signature = tf.compat.v1.saved_model.load(session, ["serve"], str(path)).signature_def["serving_default"]
        feed = {signature.inputs["features"].name: FEATURES}
        logits = session.run(signature.outputs["logits"].name, feed)
    np.testing.assert_allclose(logits, array(model(FEATURES)), rtol=1e-5, atol=1e-5)


def test_dropping_one_of_two_loaded_copies_leaves_the_other_intact(saved, loaded):
    import tensorflow as tf

    before = logits_of(loaded)
    dropped = tf.saved_model.load(saved[1])
    np.testing.assert_array_equal(logits_of(dropped), before)
    del dropped
    gc.collect()
    np.testing.assert_array_equal(logits_of(loaded), before)


def test_the_front_end_and_a_compressed_copy_go_into_the_file(tmp_path):
    import tensorflow as tf

    rules = {"ffn": ("int2", None), "depthwise|subsampling": ("int8", None)}  # convolutions are compressed layers too
    small = usm.compress(usm.USMForCTC(9, **SIZE), rules)
    frontend = usm.LogMel(BINS, normalization="running")
    usm.export_saved_model(small, tmp_path / "model", frontend=frontend)
    audio = 0.1 * np.random.default_rng(1).normal(size=(1, 9000)).astype("float32")
    logits = tf.saved_model.load(tmp_path / "model").signatures["audio"](audio=audio)["logits"].numpy()
    np.testing.assert_allclose(logits, array(small(frontend(audio))), rtol=1e-4, atol=1e-4)
    assert np.abs(logits - array(small(usm.LogMel(BINS)(audio)))).max() > 1e-3


def test_an_older_saved_model_is_replaced_and_nothing_else_is_left(saved):
    _, path = saved
    assert list(path.parent.iterdir()) == [path]
    assert not (path / "left over").exists() and (path / "saved_model.pb").read_bytes() != b"older"


def test_at_no_moment_is_the_older_model_gone_and_the_new_one_not_there(tmp_path, monkeypatch):
    path, replace, found = older(tmp_path / "model"), os.replace, []

    def watched(source, target):
        replace(source, target)
        found.append([file.read_bytes() == b"older" for file in tmp_path.rglob("saved_model.pb")])

    monkeypatch.setattr(os, "replace", watched)
    usm.export_saved_model(recogniser(), path)
    assert found and all(sorted(state) == [False, True] for state in found)  # both are complete when folders move
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_model_stays_a_link_to_the_new_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = older(tmp_path / "elsewhere" / "model"), tmp_path / "link"
    link.symlink_to(target)
    assert usm.export_saved_model(recogniser(), link) == str(link)
    assert link.is_symlink() and (target / "saved_model.pb").read_bytes() != b"older"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_is_no_saved_model_is_refused_and_kept(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"precious")
    for name in ("photos", "file"):
        with pytest.raises(FileExistsError, match=f"{name}' exists and is not a SavedModel; choose another folder"):
            usm.export_saved_model(recogniser(), tmp_path / name)
    assert (tmp_path / "photos" / "one.png").read_bytes() == (tmp_path / "file").read_bytes() == b"precious"


def test_a_mask_that_is_not_made_is_refused_with_the_fix(tmp_path):
    model = usm.USMForCTC(9, quantization="int4", sparsity="2:4", **SIZE)
    with pytest.raises(ValueError, match="mask does not obey 2:4 yet.*update_masks"):
        usm.export_saved_model(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_older_model_alone(tmp_path):
    path = older(tmp_path / "model")
    with pytest.raises(ValueError, match="takes 16 mel bins.*front end with 80 bins"):
        usm.export_saved_model(recogniser(), path, frontend=usm.LogMel(80))
    assert (path / "saved_model.pb").read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]
