"""Claims about the espeak-ng binding."""

import time

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")

from keras_usm_lite.data.espeak import Espeak, _short_path

TEXT = "zoom in record five"


@pytest.fixture(scope="module")
def espeak():
    return Espeak()


def test_speech_is_float32_at_16_khz_within_range(espeak):
    audio = espeak.synthesize(TEXT)
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert 0.05 < np.abs(audio).max() <= 1.0
    assert 0.5 < len(audio) / espeak.sample_rate < 3.0


def test_resampling_keeps_the_pitch(espeak):
    """The strongest autocorrelation peak of a low monotone voice and of a high one differ as asked for."""

    def period(pitch):
        audio = espeak.synthesize("aaaaaaaah", variant="m1", pitch=pitch, pitch_range=0).astype(np.float64)
        middle = audio[len(audio) // 3 : 2 * len(audio) // 3]
        correlation = np.correlate(middle, middle, "full")[len(middle) :]
        return (40 + np.argmax(correlation[40:320])) / espeak.sample_rate

    # Human-like voices lie between 60 and 400 Hz; a wrong rate would shift both.
    assert 1 / 400 < period(80) < 0.8 * period(10) < 1 / 60


def test_a_higher_rate_speaks_faster(espeak):
    assert len(espeak.synthesize(TEXT, rate=220)) < 0.8 * len(espeak.synthesize(TEXT, rate=120))


def test_variants_and_accents_sound_different(espeak):
    spectra = [
        np.abs(np.fft.rfft(espeak.synthesize(TEXT, voice=voice, variant=variant), 32768))
        for voice, variant in (("en-us", "f3"), ("en-us", "m1"), ("en-gb-scotland", "f3"))
    ]
    for i, j in ((0, 1), (0, 2)):
        assert np.corrcoef(spectra[i], spectra[j])[0, 1] < 0.9


def test_every_variant_speaks(espeak):
    variants = espeak.list_variants()
    assert len(variants) > 90 and variants == sorted(variants)
    for variant in variants:
        assert np.abs(espeak.synthesize("go", variant=variant)).max() > 0.01, variant


def test_new_instances_answer_the_same_calls_with_the_same_samples():
    def speak_all():
        new = Espeak()
        variants = ("f3", "f3", "Mr serious", "klatt3", "whisper", "Alicia", "croak")
        return [new.synthesize(TEXT, variant=variant) for variant in variants]

    first = speak_all()
    Espeak().synthesize("something else in between", rate=300)
    time.sleep(1.1)  # espeak-ng likes to seed its noise with the time of day, in seconds
    for a, b in zip(first, speak_all(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_instances_do_not_disturb_each_other():
    alone = Espeak()
    expected = [alone.synthesize(TEXT), alone.synthesize(TEXT)]
    one, other = Espeak(), Espeak()
    first = one.synthesize(TEXT)
    other.synthesize("hello", variant="f5", rate=300)
    np.testing.assert_array_equal(first, expected[0])
    np.testing.assert_array_equal(one.synthesize(TEXT), expected[1])


def test_nothing_to_say_is_silence(espeak):
    assert not espeak.synthesize("").any()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"voice": "xx-nowhere"}, "xx-nowhere"),
        ({"variant": "nobody"}, "nobody"),
        ({"rate": 79}, "80 and 450"),
        ({"pitch": 100}, "0 and 99"),
        ({"pitch_range": -1}, "pitch_range"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(espeak, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        espeak.synthesize(TEXT, **arguments)


def test_a_long_data_path_is_reached_by_a_short_link(tmp_path):
    data = tmp_path / ("long" * 40) / "espeak-ng-data"
    data.mkdir(parents=True)
    (data / "phontab").write_text("here")
    link = tmp_path / "espeak-ng-data"
    assert _short_path(str(data), str(tmp_path)) == str(link)
    assert (link / "phontab").read_text() == "here"
    assert _short_path("/data", str(tmp_path)) == "/data"


def test_a_long_data_path_works(tmp_path, monkeypatch):
    espeakng_loader = pytest.importorskip("espeakng_loader")
    data = tmp_path / ("long" * 40) / "espeak-ng-data"
    data.parent.mkdir()
    data.symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(data))
    assert len(Espeak().synthesize(TEXT)) > 8000
