"""Audio comes in as mono float32 at the rate asked for, whatever decodes it; soundfile is the judge."""

import os
import subprocess
import sys
import wave

import numpy as np
import pytest
import soundfile

from keras_usm_lite.data.audio import AudioError, load_audio, write_wav

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "24.wav": ("WAV", "PCM_24"),
    "flac": ("FLAC", "PCM_16"),
    "24.flac": ("FLAC", "PCM_24"),
    "8.flac": ("FLAC", "PCM_S8"),
    "opus": ("OGG", "OPUS"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def tone(rate=16000, seconds=0.5, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_is_decoded_like_soundfile_does(tmp_path, ending):
    path = tmp_path / f"tone.{ending}"
    container, subtype = FORMATS[ending]
    soundfile.write(path, tone(), 16000, format=container, subtype=subtype)
    audio = load_audio(path)
    assert audio.dtype == np.float32 and audio.ndim == 1
    np.testing.assert_allclose(audio, soundfile.read(path, dtype="float32")[0], atol=2e-6)
    assert np.abs(audio[: len(tone())] - tone()).mean() < 0.02


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_channels_are_averaged(tmp_path, ending):
    path = tmp_path / f"stereo.{ending}"
    soundfile.write(path, np.stack([tone(), 0.5 * tone()], axis=1), 16000)
    np.testing.assert_allclose(load_audio(path), 0.75 * tone(), atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_another_rate_is_converted(tmp_path, rate):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(rate), rate)
    audio = load_audio(path, sample_rate=16000)
    assert audio.dtype == np.float32 and audio.shape == (8000,)
    inner = slice(400, -400)  # the filter rings at the ends
    np.testing.assert_allclose(audio[inner], tone()[inner], atol=5e-3)


def test_what_lies_above_the_new_nyquist_rate_is_filtered_out(tmp_path):
    path = tmp_path / "whistle.wav"
    soundfile.write(path, tone(48000, hertz=15000), 48000)
    assert np.abs(load_audio(path)[400:-400]).max() < 0.01


def test_samples_beyond_full_scale_are_clipped(tmp_path):
    path = tmp_path / "loud.wav"
    soundfile.write(path, 4 * tone(), 16000, subtype="FLOAT")
    assert np.abs(load_audio(path)).max() == 1.0


def test_integers_written_as_floats_are_refused_rather_than_clipped_to_noise(tmp_path):
    path = tmp_path / "scaled.wav"
    soundfile.write(path, 32768 * tone(), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"scaled.wav: it holds samples up to \d+.*Divide them"):
        load_audio(path)


def test_written_pcm_is_read_back_bit_for_bit(tmp_path):
    pcm = np.random.default_rng(0).integers(-32768, 32768, 1000)
    pcm[:2] = -32768, 32767
    write_wav(tmp_path / "noise.wav", pcm / 32768.0, 8000)
    with wave.open(str(tmp_path / "noise.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 1000)
    np.testing.assert_array_equal(soundfile.read(tmp_path / "noise.wav", dtype="int16")[0], pcm)
    np.testing.assert_array_equal(load_audio(tmp_path / "noise.wav", 8000), (pcm / 32768.0).astype("float32"))
    assert os.listdir(tmp_path) == ["noise.wav"]


def test_overdriven_audio_is_clipped_when_written(tmp_path):
    write_wav(tmp_path / "loud.wav", np.array([2.0, -2.0], np.float32))
    np.testing.assert_array_equal(soundfile.read(tmp_path / "loud.wav", dtype="int16")[0], [32767, -32768])


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros((5, 2)), r"shape \(5, 2\)"),
        (np.zeros(0), r"shape \(0,\)"),
        (np.zeros(5, np.int16), "int16"),
        (np.array([0.0, np.nan]), "NaN"),
    ],
)
def test_unsuitable_samples_are_not_written(tmp_path, audio, reason):
    with pytest.raises(AudioError, match=f"a.wav: cannot write .*{reason}"):
        write_wav(tmp_path / "a.wav", audio)
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_reported_with_its_path(tmp_path):
    with pytest.raises(AudioError, match="gone.wav: there is no such file"):
        load_audio(tmp_path / "gone.wav")


@pytest.mark.parametrize("name", ["junk.wav", "junk.flac", "junk.opus", "junk.mp3", "junk.raw"])
@pytest.mark.parametrize("content", [b"", b"not audio at all" * 20])
def test_a_file_that_is_no_audio_is_reported_with_its_path(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=name):
        load_audio(tmp_path / name)


def test_a_file_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(AudioError, match="empty.wav: the file holds no samples"):
        load_audio(tmp_path / "empty.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, value):
    soundfile.write(tmp_path / "bad.wav", np.array([0.0, value]), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="bad.wav: the file holds NaN or infinite samples"):
        load_audio(tmp_path / "bad.wav")


def test_off_tensorflow_no_tensorflow_is_imported(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    soundfile.write(tmp_path / "a.flac", tone(), 16000)
    script = (
        "import sys; from keras_usm_lite.data.audio import load_audio\n"
        "print(load_audio('a.wav').shape, load_audio('a.flac').shape, 'tensorflow' in sys.modules)"
    )
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": root}
    output = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.split("\n")[0] == "(8000,) (8000,) False"


@pytest.mark.parametrize("rate", [0, 1, 2**31 - 1])
def test_a_header_with_an_impossible_sampling_rate_is_refused(tmp_path, rate):
    write_wav(tmp_path / "a.wav", np.zeros(160))
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=rf"a\.wav: .*{rate} samples per second|a\.wav: cannot be decoded"):
        load_audio(tmp_path / "a.wav")
