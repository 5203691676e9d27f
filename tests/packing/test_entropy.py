"""Coded streams, against entropies in closed form and a range decoder written from the format description."""

import bisect
import hashlib
import struct
import sys
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.packing.entropy import EXPANSION, decode, encode, entropy_bits


def encoded(symbols, alphabet):
    """The smallest stream, whatever the sequence takes without a coder."""
    return next(filter(None, (encode(symbols, alphabet, 10**k) for k in range(1, 7))))


def described_range_decoder(stream, alphabet, count):
    """docs/packed_format.md, section "Coded streams", with Python's own integers."""
    frequencies = struct.unpack(f"<{alphabet}H", stream[4 : 4 + 2 * alphabet])
    words = [word for (word,) in struct.iter_unpack("<I", stream[4 + 2 * alphabet :])] + [0] * (2 * count + 2)
    scale = (2**24 - alphabet) / sum(frequencies)
    starts = [int(sum(frequencies[:symbol]) * scale) + symbol for symbol in range(alphabet)] + [2**24]
    lower, width, value, used = 0, 2**64 - 1, words[0] << 32 | words[1], 2
    symbols = []
    for _ in range(count):
        step = width >> 24
        quantile = (value - lower) % 2**64 // step
        symbol = bisect.bisect_right(starts, quantile) - 1
        symbols.append(symbol)
        lower, width = (lower + step * starts[symbol]) % 2**64, step * (starts[symbol + 1] - starts[symbol])
        if width < 2**32:
            lower, width = lower << 32 & 2**64 - 1, width << 32
            value, used = (value << 32 & 2**64 - 1) | words[used], used + 1
    return symbols


@st.composite
def sequences(draw):
    alphabet = draw(st.sampled_from([2, 3, 6, 15, 256, 257, 12870]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = rng.dirichlet(np.full(alphabet, draw(st.sampled_from([0.01, 0.3, 100.0]))))
    return alphabet, rng.choice(alphabet, draw(st.integers(0, 3000)), p=weights)


@settings(max_examples=60, deadline=None)
@given(sequences())
def test_sequences_come_back(case):
    alphabet, symbols = case
    coder, stream = encoded(symbols, alphabet)
    decoded = decode(stream, coder, alphabet, symbols.size)
    assert decoded.dtype == (np.uint8 if alphabet <= 256 else np.uint16)
    np.testing.assert_array_equal(decoded, symbols)


@pytest.mark.parametrize("alphabet", [2, 6, 15, 70, 256])
def test_the_range_coder_is_the_one_of_the_format_description(alphabet):
    symbols = np.random.default_rng(alphabet).binomial(alphabet - 1, 0.4, 40_000)
    coder, stream = encode(symbols, alphabet, symbols.size)
    assert coder == "range"
    assert struct.unpack("<I", stream[:4])[0] == zlib.crc32(bytes(symbols.tolist()))
    assert described_range_decoder(stream.tobytes(), alphabet, symbols.size) == symbols.tolist()


def test_the_zstandard_stream_is_a_plain_frame_of_the_symbols():
    for alphabet, dtype in ((16, "<u1"), (300, "<u2")):
        symbols = np.tile(np.arange(16), 1000).astype(dtype)
        coder, stream = encoded(symbols, alphabet)
        assert coder == "zstd"
        assert zstandard.ZstdDecompressor().decompress(stream[4:].tobytes()) == symbols.tobytes()


@pytest.mark.parametrize("alphabet", [2, 6, 15, 255])
def test_independent_symbols_take_their_entropy(alphabet):
    symbols = np.random.default_rng(0).binomial(alphabet - 1, 0.3, 200_000)
    coder, stream = encode(symbols, alphabet, 200_000)
    assert coder == "range"
    assert 1 <= 8 * stream.size / entropy_bits(symbols) < 1.001 + (8 * 2 * alphabet + 128) / entropy_bits(symbols)


def test_entropy_in_closed_form():
    assert entropy_bits(np.zeros(100, int)) == 0
    assert entropy_bits(np.arange(256)) == 256 * 8
    assert entropy_bits(np.array([0, 0, 0, 5])) == pytest.approx(3 * np.log2(4 / 3) + 2)
    assert entropy_bits(np.zeros(0, int)) == 0


def test_what_no_coder_makes_smaller_is_left_alone():
    symbols = np.random.default_rng(0).integers(0, 256, 10_000)
    assert encode(symbols, 256, 10_000) is None
    assert encode(np.zeros(0, int), 2, 0) is None


def test_no_stream_stands_for_more_than_64_times_its_bytes():
    symbols = np.zeros(10**6, int)
    coder, stream = encode(symbols, 256, 10**6)
    assert 10**6 <= stream.size * EXPANSION < 10**6 + 4 * EXPANSION
    np.testing.assert_array_equal(decode(stream, coder, 256, 10**6), symbols)


def test_the_bytes_are_always_the_same():
    symbols = np.frombuffer(hashlib.shake_256(b"usm").digest(1000), "uint8") // 16 % 15
    coder, stream = encode(symbols, 15, 1000)
    assert (coder, stream.size, zlib.crc32(stream.tobytes())) == ("range", 518, 3295406484)


def both():
    symbols = np.random.default_rng(0).binomial(14, 0.5, 1000)
    repeated = np.tile(np.arange(15), 100)
    return [(symbols, *encode(symbols, 15, 1000)), (repeated, *encoded(repeated, 15))]


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_stream_is_refused(number):
    symbols, coder, stream = both()[number]
    for length in range(0, stream.size, 3):
        with pytest.raises(ValueError):
            decode(stream[:length], coder, 15, symbols.size)
    for position in range(0, stream.size):
        damaged = stream.copy()
        damaged[position] ^= 1 << position % 8
        try:
            decoded = decode(damaged, coder, 15, symbols.size)
        except ValueError:
            continue
        np.testing.assert_array_equal(decoded, symbols)  # a frequency of no symbol, or a word that is not needed
    for count in (0, symbols.size - 1, symbols.size + 1):
        with pytest.raises(ValueError):
            decode(stream, coder, 15, count)


def test_a_bomb_is_refused_before_it_is_decoded():
    frame = zstandard.ZstdCompressor().compress(bytes(10**8))
    with pytest.raises(ValueError, match="a Zstandard frame of 100000000 bytes where 100 are needed"):
        decode(np.frombuffer(b"\0\0\0\0" + frame, "uint8"), "zstd", 15, 100)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(ValueError, match="where 100 are needed"):
        decode(np.frombuffer(b"\0\0\0\0" + unsized, "uint8"), "zstd", 15, 100)


@pytest.mark.parametrize(
    ("coder", "content", "message"),
    [
        ("range", b"123", "has 3 in all"),
        ("range", bytes(4 + 29), "a table of 30 bytes and words of 4 bytes, but it has 29"),
        ("range", bytes(4 + 30), "the table of frequencies is empty"),
        ("zstd", bytes(4) + b"no frame", "Zstandard frame is damaged"),
    ],
)
def test_a_stream_of_another_form_is_refused(coder, content, message):
    with pytest.raises(ValueError, match=message):
        decode(np.frombuffer(content, "uint8"), coder, 15, 10)


def test_a_symbol_that_does_not_exist_is_refused():
    data = bytes([3, 200])
    stream = struct.pack("<I", zlib.crc32(data)) + zstandard.ZstdCompressor().compress(data)
    with pytest.raises(ValueError, match=r"symbol 200 in a stream of the symbols 0\.\.14"):
        decode(np.frombuffer(stream, "uint8"), "zstd", 15, 2)


@pytest.mark.parametrize("package", ["constriction", "zstandard"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install constriction zstandard"):
        encode(np.zeros(10, int), 2, 10)
