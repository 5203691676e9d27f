"""README.md: its code runs as it stands, on a small corpus and for fewer epochs."""

import pathlib
import re

import keras
import pytest

import keras_usm_lite as usm

PAGE = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
SIZE = "num_layers=1, dim=16, num_heads=2, kernel_size=3, subsampling_channels=4"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="writes .tflite and SavedModel files")
def test_the_code_trains_a_float_model_and_a_compressed_one_and_writes_every_file(
    tmp_path, monkeypatch, capsys, write_three_words
):
    write_three_words(tmp_path / "my_corpus")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path / "home"))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for longer, shorter in (
        ('vocab_size, "tiny")', f"vocab_size, {SIZE})"),
        ("epochs=30", "epochs=1"),
        ("10 * len(train)", "5 * len(train)"),
        ("epochs=10", "epochs=5"),
    ):
        assert longer in code
        code = code.replace(longer, shorter)
    names = {}
    exec(code, names)
    layers = usm.compressed_layers(names["model"])
    assert {(layer.active_bits, str(layer.sparsity)) for layer in layers} == {(4, "2:4")}
    assert "WER" in capsys.readouterr().out
    sizes = [(tmp_path / name).stat().st_size for name in ("small.usm", "model.usm", "model.tflite")]
    assert sizes == sorted(sizes) and (tmp_path / "saved_model").is_dir()
