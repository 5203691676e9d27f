"""What can go wrong in a training gives a message that names the value and the fix, and costs no good state.

Cache files that are damaged or cannot be written: `tests/data/test_feature_cache.py`; manifests:
`tests/data/test_manifest.py`; damaged packed files: `tests/packing/`. Kills: `benchmarks/survival.py`.
"""

import os

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.callbacks.step_callback import StepCallback
from keras_usm_lite.optimizers.slowed import schedule_factor

TINY = {"num_layers": 1, "dim": 16, "num_heads": 2, "subsampling_channels": 4}
EPOCHS = 3
STEPS = 2  # of an epoch


class Features(list):
    """Noise, as many utterances as labels."""

    def __init__(self, num_frames):
        rng = np.random.default_rng(0)
        super().__init__(rng.normal(size=(n, 80)).astype("float32") for n in num_frames)
        self.num_frames = np.array(num_frames)


def batches(labels=((1, 2),) * 8, frames=None, **options):
    frames = [24] * len(labels) if frames is None else frames
    return usm.data.SpeechBatches(Features(frames), labels, **{"batch_frames": 96, "num_buckets": 1, **options})


def recogniser():
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(3, quantization="int4", sparsity="2:4", **TINY)
    usm.compile_ctc(model, 1e-3, steps=EPOCHS * STEPS, warmup=0.0)
    model.run_eagerly = keras.backend.backend() == "tensorflow"  # tracing takes longer than these few steps
    return model


def fit(model, *callbacks, train=None, **options):
    train = batches() if train is None else train
    callbacks = [usm.callbacks.NMPruning(start_step=1), *callbacks]
    dev = batches(shuffle=False)
    return usm.fit_ctc(model, train, dev, usm.WordTokenizer(["a", "b"]), EPOCHS, callbacks, verbose=0, **options)


def values(model):
    return [keras.ops.convert_to_numpy(variable) for variable in [*model.variables, *model.optimizer.variables]]


def restored(folder):
    """A new model in the state of the backup."""
    model, backup = recogniser(), usm.callbacks.Backup(folder)
    model.optimizer.build(model.trainable_variables)
    backup.set_model(model)
    backup.restore()
    return model


class Spoil(StepCallback):
    """Make a weight a NaN in the second epoch, in as many trainings."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def on_step(self, step):
        if step == STEPS + 1 and self.times:
            self.times -= 1
            self.synchronize()
            self.model.head.bias.assign(np.full(3, np.nan))


def test_a_loss_that_is_no_number_stops_the_training_and_the_backup_is_the_last_good_state(tmp_path):
    with pytest.raises(
        usm.callbacks.NonFiniteError, match=r"loss is nan after batch 1 of epoch 1.*training\.zip holds"
    ):
        fit(recogniser(), Spoil(1), backup_dir=tmp_path)
    good = restored(tmp_path)
    assert int(good.optimizer.iterations) == STEPS
    assert all(np.isfinite(value).all() for value in values(good))


def test_without_a_backup_the_message_says_how_to_get_one():
    with pytest.raises(usm.callbacks.NonFiniteError, match="lower the learning rate.*With backup_dir and recover=3"):
        fit(recogniser(), Spoil(1))


def test_recovery_goes_back_to_the_beginning_of_the_epoch_and_on_at_half_the_rate(tmp_path):
    model = recogniser()
    message = "after batch 1 of epoch 1 .*Going back to .*training.zip at half the learning rate"
    with pytest.warns(UserWarning, match=message):
        history = fit(model, Spoil(2), backup_dir=tmp_path, recover=2)
    assert schedule_factor(model) == 0.25
    assert history.epoch == [0, 1, 2] and np.isfinite(history.history["loss"]).all()
    assert all(np.isfinite(value).all() for value in values(model))
    assert int(model.optimizer.iterations) == EPOCHS * STEPS
    for layer in usm.compressed_layers(model):
        if layer.sparsity is not None:
            assert float(np.mean(keras.ops.convert_to_numpy(layer.mask))) == 0.5
    assert restored(tmp_path).optimizer.iterations == EPOCHS * STEPS


def test_recovery_gives_up_and_keeps_the_backup(tmp_path):
    with pytest.warns(UserWarning), pytest.raises(usm.callbacks.NonFiniteError, match="which 2 lower learning rates"):
        fit(recogniser(), Spoil(3), backup_dir=tmp_path, recover=2)
    assert schedule_factor(restored(tmp_path)) == 0.25  # what was learnt about the rate stays


def test_recovery_without_a_backup_is_refused():
    with pytest.raises(ValueError, match="recover=3 needs a place to go back to; pass backup_dir"):
        fit(recogniser(), recover=3)


def test_an_alignment_that_cannot_be_is_refused_before_training():
    labels = [[1, 2]] * 3 + [[1, 1, 1, 2]] + [[1, 2]] * 4  # 4 labels, 2 blanks between equal ones; 20 frames give 5
    frames = [24, 24, 24, 20, 24, 24, 24, 24]
    message = r"1 of 8 utterances cannot be aligned .*features\[3\] gives 5 output frames, CTC needs 6 for labels\[3\]"
    with pytest.raises(ValueError, match=message + ".*Leave them out"):
        fit(recogniser(), train=batches(labels, frames))
    frames[3] = 21  # 6 output frames
    batches(labels, frames).check_alignments(lambda n: -(-n // 4))


def test_an_empty_utterance_is_refused():
    with pytest.raises(ValueError, match="Utterance 1 has 0 frames; leave it out"):
        usm.data.SpeechBatches(Features([8, 0, 8]), [[1]] * 3)


def test_a_bucket_without_utterances_neither_breaks_nor_moves_the_model():
    """A part of the data may have none of some length: its batches have empty rows only, of weight 0."""
    empty = batches(((1, 2),), shard=(1, 2))
    (x, y, weight), model = empty[0], recogniser()
    assert not weight.any()
    model.optimizer.learning_rate = keras.optimizers.schedules.PiecewiseConstantDecay([100], [0.1, 0.1])
    model.optimizer.weight_decay = 0.0
    before = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    assert float(model.train_on_batch(x, y, sample_weight=weight)) == 0.0
    for variable, old in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old, err_msg=variable.path)


def kept(model, folder, epoch):
    """Write a backup and return the callback and the bytes."""
    model.optimizer.build(model.trainable_variables)
    backup = usm.callbacks.Backup(folder)
    backup.set_model(model)
    backup.on_train_begin()
    backup.save(epoch)
    return backup, (folder / "training.zip").read_bytes()


def test_a_full_disk_leaves_the_backup_before_it(tmp_path, full_disk):
    backup, before = kept(recogniser(), tmp_path, epoch=1)
    message = r"backup of epoch 2, the one before is intact \(.*too large\); free space .*training\.zip"
    with full_disk(len(before) // 2), pytest.raises(OSError, match=message):
        backup.save(2)
    assert os.listdir(tmp_path) == ["training.zip"]
    assert (tmp_path / "training.zip").read_bytes() == before


def test_a_backup_in_a_folder_that_cannot_be_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = recogniser()
    with pytest.raises(OSError, match="backup of epoch 0, there is none before it .*choose a writable folder"):
        fit(model, backup_dir=tmp_path / "file" / "backup")
    assert int(model.optimizer.iterations) == 0


def test_a_packed_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "model.usm"
    with pytest.raises(OSError, match="model.usm: cannot be written .*free space or choose a writable folder"):
        usm.save_packed(usm.USMForCTC(3, quantization="int4", **TINY), path)
