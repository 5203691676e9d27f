"""examples/finetune_usm_lite.py: refuses before it works, never mixes two runs, and fails if its files are wrong."""

import importlib
import json
import os
import pathlib
import types

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import Utterance, write_manifest
from keras_usm_lite.models.presets import PRESETS

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

WORDS = ("up", "down", "left")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "examples"))
    monkeypatch.setitem(PRESETS, "tiny", {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3,
                                          "subsampling_channels": 4})  # fmt: skip
    return importlib.import_module("finetune_usm_lite")


def make_corpus(folder, seed=0):
    """Three words, each a tone of its own, in noise; one recording of "train" is broken."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for split, size in {"train": 9, "dev": 2, "test": 3}.items():
        rows = []
        for number in range(size):
            path, word = str(folder / f"{split}-{number}.wav"), WORDS[number % 3]
            tone = np.sin(np.arange(8000) * (0.1 + 0.2 * (number % 3)))
            write_wav(path, 0.3 * tone + 0.01 * draw.normal(size=8000))
            rows.append(Utterance(path, 0.5, word, split))
        write_manifest(folder / f"{split}.tsv", rows)
    (folder / "train-8.wav").write_bytes(b"not audio")
    return folder


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--sparsity", "4:2"], "got n=4, m=2"),
        (["--sparsity", "half"], "sparsity='half' is not understood"),
        (["--sparsity", "3:5"], "not a multiple of 5"),
        (["--scale", "max"], "--scale: invalid choice: 'max'"),
        (["--bits", "5"], "--bits: invalid choice: 5"),
        (["--preset", "huge"], "preset='huge' is not known; choose one of tiny"),
        (["--epochs", "0"], "--epochs: 0 is below 1"),
        (["--float-model", "/nowhere/float.keras"], "--float-model: there is no file '/nowhere/float.keras'"),
        (["--pretrained", "/nowhere/encoder.h5"], "--pretrained: there is no file '/nowhere/encoder.h5'"),
        (["--on-bad", "ask"], "--on-bad: invalid choice: 'ask'"),
    ],
)
def test_what_could_only_fail_later_is_refused_when_the_arguments_are_read(example, capsys, options, complaint):
    with pytest.raises(SystemExit) as caught:
        example.main(options)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(("bits", "sparsity"), [("8", "none"), ("3", "2:4"), ("2", "1:16")])
def test_what_fits_is_accepted(example, bits, sparsity):
    assert example.parse_arguments(["--bits", bits, "--sparsity", sparsity]).sparsity == sparsity


def test_a_run_is_not_continued_on_another_corpus_or_with_other_arguments(example, tmp_path):
    one, other = (usm.data.open_corpus(make_corpus(tmp_path / name, seed)) for seed, name in enumerate("ab"))

    def start(corpus, bits=4, **free):
        example.remember_arguments(
            types.SimpleNamespace(output=str(tmp_path), bits=bits, **free), corpus, example.FREE_ARGUMENTS
        )

    start(one)
    start(one, data="a", on_bad="raise", control=True)
    with pytest.raises(SystemExit, match=r"corpus 'a', now 'b'(?s:.*)Give another --output"):
        start(other)
    with pytest.raises(SystemExit, match=r"\(bits 4, now 2\)"):
        start(one, bits=2)
    write_manifest(one.splits["dev"], usm.data.read_manifest(one.splits["dev"])[:1])
    with pytest.raises(SystemExit, match="manifests '[0-9a-f]{16}', now"):
        start(one)


@pytest.mark.parametrize(
    ("exact", "texts", "complaints"),
    [
        (True, ["up"] * 100, []),
        (True, ["up"] * 99 + ["down"], []),
        (
            True,
            ["up"] * 98 + ["down"] * 2,
            ["LiteRT's word error rate differs from Keras' by 0.0200, allowed are 0.01"],
        ),
        (False, ["up"] * 100, ["the packed file does not reload to bit-identical effective kernels"]),
    ],
)
def test_the_gate_names_a_packed_file_that_reloads_differently_and_word_errors_of_litert(
    example, exact, texts, complaints
):
    spoken = ["up"] * 100
    rates = {"fine-tuned": usm.error_rates(spoken, spoken), "fine-tuned, LiteRT": usm.error_rates(spoken, texts)}
    assert example.failures(exact, rates) == complaints


@pytest.mark.parametrize(
    ("sparsity", "scale", "expected"),
    [
        (None, "mse", ["QuantizationSchedule"]),
        ("2:4", "mse", ["NMPruning", "QuantizationSchedule"]),  # masks first: scales fit them
        ("2:4", "absmax", ["NMPruning"]),
        (None, "absmax", []),
    ],
)
def test_searched_scales_follow_the_kernel_in_every_epoch_with_and_without_sparsity(example, sparsity, scale, expected):
    args = types.SimpleNamespace(scale=scale, bits=4, finetune_epochs=2)
    quantization = usm.QuantizationConfig(4, scale=scale)
    model = keras.Sequential([keras.Input((8,)), usm.QuantDense(2, quantization, sparsity=sparsity)])
    callbacks = example.schedules(usm, model, args, steps=7)
    assert [type(callback).__name__ for callback in callbacks] == expected
    if scale == "mse":
        assert callbacks[-1].scale_interval == 7


def test_the_backup_lasts_until_the_model_is_saved(example, tmp_path):
    def fit(model, train, dev, tokenizer, epochs, callbacks, backup_dir):
        (tmp_path / "backup-float").mkdir()
        assert backup_dir == str(tmp_path / "backup-float")

    class Unsaved(keras.Sequential):
        def save(self, path):
            raise OSError("the disk is full")

    library = types.SimpleNamespace(compile_ctc=lambda *_: None, fit_ctc=fit)
    task = types.SimpleNamespace(batches={"train": [], "dev": []}, tokenizer=None)
    arguments = types.SimpleNamespace(output=str(tmp_path)), "float", 1, 1e-3
    with pytest.raises(OSError, match="disk is full"):
        example.train(library, task, Unsaved([keras.layers.Dense(1)]), *arguments)
    assert os.listdir(tmp_path) == ["backup-float"]
    (tmp_path / "backup-float").rmdir()
    example.train(library, task, keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), *arguments)
    assert os.listdir(tmp_path) == ["float.keras"]


@pytest.fixture
def shortened(example, monkeypatch):
    """The script without what takes long: training, the exports, LiteRT, which hears `heard` or what Keras hears."""

    def train(usm, task, model, args, name, *_, **__):
        example.save_model(model, os.path.join(args.output, f"{name}.keras"))
        return model

    def write_files(usm, keras, task, float_model, model, folder):
        path = usm.save_packed(model, os.path.join(folder, "model.usm"))
        return {"packed .usm": os.path.getsize(path)}, {"packed .usm": path, "compressed .tflite": None}

    monkeypatch.setattr(example, "train", train)
    monkeypatch.setattr(example, "write_files", write_files)
    heard = []
    monkeypatch.setattr(example, "run_litert", lambda usm, task, path, texts: (heard or texts, [], 0.01))
    return example.main, heard


@pytest.mark.filterwarnings("ignore:Left out")
def test_the_report_tells_what_was_made_in_this_start_and_the_gate_comes_after_it(
    shortened, tmp_path, monkeypatch, capsys
):
    main, heard = shortened
    output = tmp_path / "output"
    options = ["--data", str(make_corpus(tmp_path / "tones")), "--output", str(output), "--sparsity", "none"]
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path / "home"))
    main(options)
    first = json.loads((output / "report.json").read_text())
    assert first["seconds"].keys() == {"float training", "fine-tuning", "files"}
    assert all(taken >= 0 for taken in first["seconds"].values())
    assert first["packed_reloads_bit_identical"] and first["left_out"] == {"train": 1, "dev": 0, "test": 0}
    assert "train-8.wav" in json.loads((output / "left_out.json").read_text())["train"][0]["path"]
    share = f"{first['compressed_tensors']} of {first['tensors']} tensors compressed"
    assert share in capsys.readouterr().out and 0 < first["compressed_tensors"] < first["tensors"]

    heard[:] = [" ".join(WORDS)] * 3
    with pytest.raises(SystemExit, match="FAILED: LiteRT's word error rate differs"):
        main(options)
    second = json.loads((output / "report.json").read_text())
    assert second["seconds"]["float training"] == second["seconds"]["fine-tuning"] == "loaded"
    assert second["error_rates"]["fine-tuned"] == first["error_rates"]["fine-tuned"]
    assert "fine-tuning loaded" in capsys.readouterr().out


def test_a_packed_file_of_other_integers_is_noticed(example, tmp_path):
    model, other = (keras.Sequential([keras.Input((8,)), usm.QuantDense(4, "int4")]) for _ in range(2))
    path = usm.save_packed(model, tmp_path / "model.usm")
    assert example.check_packed(usm, model, path) and not example.check_packed(usm, other, path)


def test_texts_that_litert_hears_otherwise_are_counted(example):
    class Recognizer:
        def __init__(self, path, tokenizer):
            self.texts = iter(["up", "down up"])

        def transcribe(self, audio):
            return next(self.texts), 0.5

    library = types.SimpleNamespace(LiteRTRecognizer=Recognizer)
    rows = [Utterance("/a.wav", 2.0, "up", "x"), Utterance("/b.wav", 3.0, "down", "x")]
    task = types.SimpleNamespace(tokenizer=None, utterances={"test": rows}, audio=lambda utterance: None)
    texts, differing, factor = example.run_litert(library, task, "model.tflite", ["up", "down"])
    assert (texts, differing, factor) == (["up", "down up"], [("down", "down up")], 1.0 / 5.0)


@pytest.mark.filterwarnings("ignore:Left out")
def test_the_control_is_the_float_model(example, shortened, tmp_path, monkeypatch):
    trained = {}

    def train(usm, task, model, args, name, *_, **__):
        trained[name] = len(usm.compressed_layers(model))
        example.save_model(model, os.path.join(args.output, f"{name}.keras"))
        return model

    monkeypatch.setattr(example, "train", train)
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path / "home"))
    output = tmp_path / "output"
    shortened[0](
        ["--data", str(make_corpus(tmp_path / "tones")), "--output", str(output), "--sparsity", "none", "--control"]
    )
    assert trained["float"] == trained["control"] == 0 < trained["compressed"]
    rates = json.loads((output / "report.json").read_text())["error_rates"]
    assert rates["float, fine-tuned"] == rates["float"]  # the same weights here


@pytest.mark.filterwarnings("ignore:Left out")
def test_a_float_model_of_other_labels_is_refused(example, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path / "home"))
    corpus = str(make_corpus(tmp_path / "tones"))
    for words in (("up", "down", "right"), ("up", "down", "left", "right")):
        other = tmp_path / f"other-{len(words)}"
        other.mkdir()
        usm.USMForCTC(1 + len(words)).save(other / "float.keras")
        usm.save_tokenizer(usm.WordTokenizer(sorted(words)), other / "tokenizer.json")
        options = ["--data", corpus, "--output", str(other / "run"), "--float-model", str(other / "float.keras")]
        with pytest.raises(SystemExit, match=f"for other labels than tones has .{1 + len(words)} and 4 with the blank"):
            example.main(options)
