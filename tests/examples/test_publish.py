"""examples/publish.py: a folder whose card tells of the very files in it, whole or not at all."""

import importlib
import json
import pathlib
import types

import keras
import ml_dtypes
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.data.audio import load_audio, write_wav

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
TEXTS = {"train": ["no yes", "yes"], "dev": ["yes"], "test": ["yes", "no yes", "yes please"]}
FILES = ["README.md", "card.json", "model.tflite", "model.usm", "tokenizer.json"]


@pytest.fixture(scope="module")
def publish():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("publish")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of noise with texts."""
    folder, draw = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for split, texts in TEXTS.items():
        rows = []
        for number, text in enumerate(texts):
            path = str(folder / f"{split}-{number}.wav")
            write_wav(path, 0.1 * draw.normal(size=16000))
            rows.append(usm.data.Utterance(path, 1.0, text, f"speaker of {split}"))
        usm.data.write_manifest(folder / f"{split}.tsv", rows)
    return folder


def recogniser(vocab_size=3, seed=0):
    """A model that has made up its mind: it always says "yes"."""
    keras.utils.set_random_seed(seed)
    model = usm.USMForCTC(
        vocab_size, quantization="int4", sparsity="2:4", num_layers=1, dim=16, num_heads=2, subsampling_channels=4
    )
    model.head.bias.assign(np.eye(vocab_size)[2] * 20)
    usm.update_masks(model)
    return model


@pytest.fixture(scope="module")
def published(publish, corpus, tmp_path_factory):
    """`run(model) -> folder` publishes a model file; and the folder of one published from a `.keras` file."""
    home = tmp_path_factory.mktemp("saved models")
    recogniser().save(home.parent / "model.keras")

    def run(model, *options, folder=home):
        names = ["--data", corpus, "--name", "yes", "--licence", "free", "--made", "by hand", "--folder", folder]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KERAS_USM_LITE_HOME", str(home.parent / "cache"))
            publish.main([str(argument) for argument in (model, *names, *options)])
        return folder / "yes"

    return run, run(home.parent / "model.keras")


def test_the_card_tells_of_the_files_beside_it(published, corpus):
    _, folder = published
    card = json.loads((folder / "card.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == FILES and list(folder.parent.iterdir()) == [folder]
    assert card["tflite"] == (folder / "model.tflite").stat().st_size
    assert card["packed"] == (folder / "model.usm").stat().st_size
    assert card["words"] == 5 and card["wer"] == card["litert_wer"] == 2 / 5 and card["differing"] == 0
    assert (card["low"], card["high"]) == (
        0.0,
        0.5,
    )  # only the second text is right, as 1 of 27 draws of three know alone
    assert card["cer"] == pytest.approx((3 + 0 + 7) / (6 + 3 + 10))
    assert card["packed_share"] == pytest.approx(card["packed"] / (4 * card["weights"]))
    assert card["tflite_share"] == pytest.approx(card["tflite"] / (4 * card["weights"]))
    recognizer = usm.LiteRTRecognizer(folder / "model.tflite", usm.load_tokenizer(folder / "tokenizer.json"))
    assert recognizer.transcribe(load_audio(corpus / "test-0.wav"))[0] == "yes"
    assert "40.00%; 0 of 3 texts differ" in (folder / "README.md").read_text()


def contents(folder, names=FILES):
    return {name: (folder / name).read_bytes() for name in names}


def test_a_published_packed_file_is_published_anew_with_the_file_that_was_verified(published, monkeypatch):
    run, folder = published
    kept, verify, verified = ["model.usm", "tokenizer.json"], usm.verify_litert, []
    before, card = contents(folder, kept), json.loads((folder / "card.json").read_text())

    def watched(model, path, *arguments, **options):
        verified.append(pathlib.Path(path).read_bytes())
        return verify(model, path, *arguments, **options)

    monkeypatch.setattr(usm, "verify_litert", watched)
    assert run(folder / "model.usm") == folder
    assert contents(folder, kept) == before and verified == [(folder / "model.tflite").read_bytes()]
    again = json.loads((folder / "card.json").read_text())
    assert {**again, "tflite": 0, "tflite_share": 0} == {**card, "tflite": 0, "tflite_share": 0}


def test_an_archive_is_smaller_and_its_card_and_tflite_are_those_of_what_it_reads_back_to(published, tmp_path):
    run, plain = published
    folder = run(plain / "model.usm", "--archive", folder=tmp_path)
    card = json.loads((folder / "card.json").read_text())
    assert card["packed"] == (folder / "model.usm").stat().st_size < (plain / "model.usm").stat().st_size
    assert "| `model.usm`, an archive |" in (folder / "README.md").read_text()
    (layer, *_), (before, *_) = (usm.compressed_layers(usm.load_packed(one / "model.usm")) for one in (folder, plain))
    codes, scale = (np.array(part) for part in layer.quantized_kernel())
    np.testing.assert_array_equal(codes, np.array(before.quantized_kernel()[0]))
    rounded = np.array(before.kernel_scale).astype(ml_dtypes.bfloat16).astype("float32")
    np.testing.assert_array_equal(scale, rounded)


def test_a_file_that_fails_the_gate_or_is_too_large_changes_nothing(published, publish, monkeypatch, tmp_path):
    run, folder = published
    before = contents(folder)
    always = before["model.tflite"]
    monkeypatch.setattr(usm, "export_litert", lambda model, path, **_: pathlib.Path(path).write_bytes(always))
    recogniser(seed=1).save(tmp_path / "other.keras")
    with pytest.raises(usm.ParityError, match="does not hold the 4-bit integers"):
        run(tmp_path / "other.keras")
    monkeypatch.setattr(publish, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="a published model has at most 1,000"):
        run(folder / "model.usm")
    assert contents(folder) == before and list(folder.parent.iterdir()) == [folder]


def test_what_is_no_model_of_the_corpus_is_refused_before_any_work(published, tmp_path):
    run, folder = published
    for path in (folder / "model.tflite", tmp_path / "none.keras"):
        with pytest.raises(SystemExit, match="is no .keras or .usm file; give what"):
            run(path, folder=tmp_path)
    recogniser(vocab_size=5).save(tmp_path / "other.keras")
    with pytest.raises(SystemExit, match="other labels than .* has .5 and 3 with the blank.. Give the corpus"):
        run(tmp_path / "other.keras", folder=tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_folder_that_is_no_published_model_is_not_replaced(published, tmp_path):
    run, folder = published
    (tmp_path / "yes").mkdir()
    (tmp_path / "yes" / "thesis.txt").write_text("two years of work")
    with pytest.raises(SystemExit):
        run(folder / "model.usm", folder=tmp_path)
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(SystemExit):
            run(folder / "model.usm", "--name", name, folder=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["yes", "thesis.txt"]


def test_the_card_says_if_test_speakers_were_heard_in_training(publish):
    def task(**speakers):
        rows = {split: [usm.data.Utterance("", 1.0, "", name) for name in names] for split, names in speakers.items()}
        return types.SimpleNamespace(utterances=rows)

    assert "in no other split" in publish.describe_split(task(train="ab", dev="c", test="de"))
    assert publish.describe_split(task(train="ab", dev="c", test="cd")) == (
        "1 of 2 test speakers are in other splits too"
    )
