"""examples/pretrain_best_rq.py: continues where it was, also when it was at the end, and never as another run."""

import importlib
import pathlib

import h5py
import numpy as np
import pytest

from keras_usm_lite.callbacks import Backup
from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import Utterance, write_manifest
from keras_usm_lite.models.presets import PRESETS

OPTIONS = ["--epochs", "3", "--batch-frames", "160", "--codebooks", "2", "--codebook-size", "8"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the script, with a model so small that it compiles soon, on noise."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "examples"))
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PRESETS, "tiny", {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3,
                                          "subsampling_channels": 4})  # fmt: skip
    draw = np.random.default_rng(0)
    for split, size in {"train": 10, "dev": 2, "test": 1}.items():
        rows = [Utterance(str(tmp_path / f"{split}-{number}.wav"), 0.4, "up", split) for number in range(size)]
        for row in rows:
            write_wav(row.path, 0.1 * draw.normal(size=6400))
        write_manifest(tmp_path / f"{split}.tsv", rows)
    script = importlib.import_module("pretrain_best_rq")
    return lambda output, *options: script.main(["--data", str(tmp_path), "--output", str(output), *OPTIONS, *options])


def arrays(path):
    """The arrays of a weights file, by name."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return found


def test_an_interrupted_run_ends_with_the_encoder_of_a_whole_one_and_a_finished_one_keeps_it(
    run, tmp_path, monkeypatch, capsys
):
    run(tmp_path / "whole")
    output = tmp_path / "interrupted"

    def save_and_stop(backup, epoch, write=Backup.save):
        write(backup, epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Backup, "save", save_and_stop)
        run(output)
    run(output)
    assert sorted(path.name for path in output.iterdir()) == ["arguments.json", "encoder.weights.h5"]
    expected, found = arrays(tmp_path / "whole" / "encoder.weights.h5"), arrays(output / "encoder.weights.h5")
    assert len(expected) > 20 and sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)

    before = (output / "encoder.weights.h5").stat()
    capsys.readouterr()
    run(output)
    assert "This run is finished" in capsys.readouterr().out
    assert (output / "encoder.weights.h5").stat() == before


def test_other_arguments_and_another_corpus_are_refused_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_usm_lite.data.SpeechTask.prepare", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"other arguments \(epochs 3, now 4; seed 0, now 1\). Give another --output"):
        run(tmp_path / "run", "--epochs", "4", "--seed", "1")
    with open(tmp_path / "dev.tsv", "a") as file:
        file.write("more.wav\t1.0\tup\tanna\n")
    with pytest.raises(SystemExit, match="manifests '.*', now '"):
        run(tmp_path / "run")


def test_numbers_below_one_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--codebook-size", "0")
    assert "argument --codebook-size: 0 is below 1" in capsys.readouterr().err
