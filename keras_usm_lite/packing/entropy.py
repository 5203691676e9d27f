"""Symbols of a small alphabet in about as many bits as their entropy: the streams of an archive."""

import struct
import zlib

import numpy as np

EXPANSION = 64  # a stream stands for at most so many times its own bytes; see `decode`
_LARGEST = 65535  # of the frequencies in a model table, which are uint16
_ZSTD_LEVEL = 9


def entropy_bits(symbols):
    """Return the zeroth-order entropy of a sequence, `sum_s count_s log2(count / count_s)`.

    No code that looks at each symbol by itself takes fewer bits for the sequence.

    Args:
        symbols: 1-D array of non-negative integers.

    Returns:
        Bits, a float.

    Example:

    >>> entropy_bits(np.array([0, 1, 2, 3]))
    8.0
    """
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(np.sum(counts * np.log2(symbols.size / counts)))


def encode(symbols, alphabet, plain_size):
    """Write a sequence with whichever coder makes it smaller, if one does.

    * "range": range coder with one static table of frequencies, `ceil(65535 count_s / max count)`
    * "zstd": the symbols as bytes (two each, low byte first, if `alphabet > 256`), compressed by Zstandard

    Both streams start with the CRC-32 of the symbols as bytes. The bytes are laid out in `docs/packed_format.md`. Words
    of zeros are added to a range-coded stream of less than 1/64 of `plain_size`, which `decode` would not be given.

    Args:
        symbols: 1-D array of integers, `0 <= symbol < alphabet`.
        alphabet: number of symbols that may occur, at least 2.
        plain_size: bytes that the sequence takes without a coder.

    Returns:
        `(coder, stream)` with a uint8 array, or None if neither is smaller than `plain_size`.

    Raises:
        ImportError: `constriction` or `zstandard` is not installed.

    Source: G. N. N. Martin, Range encoding (1979); R. Bamler, arXiv 2201.01741 (constriction); RFC 8878 (Zstandard).

    Example:

    >>> coder, stream = encode(np.array([3, 0, 0, 0] * 500), alphabet=4, plain_size=500)
    >>> bool((decode(stream, coder, alphabet=4, count=2000)[:4] == [3, 0, 0, 0]).all())
    True
    """
    _, zstandard = _coders()
    symbols = np.asarray(symbols, _symbol_dtype(alphabet))
    checksum = struct.pack("<I", zlib.crc32(symbols.tobytes()))
    zstd = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(symbols.tobytes())
    coded = checksum + _range_encode(symbols, alphabet)
    missing = max(-(-plain_size // EXPANSION) - len(coded), 0)
    streams = {"range": coded + bytes(-(-missing // 4) * 4), "zstd": checksum + zstd}
    usable = [key for key, stream in streams.items() if plain_size / EXPANSION <= len(stream) < plain_size]
    if not usable:
        return None
    coder = min(usable, key=lambda key: len(streams[key]))
    return coder, np.frombuffer(streams[coder], np.uint8)


def decode(stream, coder, alphabet, count):
    """Read back the sequence that `encode` wrote.

    Memory is taken for `count` symbols, which the caller knows from the model; a stream that claims another length
    is refused before it is decoded.

    Args:
        stream: uint8 array.
        coder: "range" or "zstd".
        alphabet: number of symbols that may occur.
        count: length of the sequence.

    Returns:
        Array `[count]`, uint8 (uint16 if `alphabet > 256`).

    Raises:
        ValueError: the stream is cut off, damaged, or not of `count` symbols.
        ImportError: `constriction` or `zstandard` is not installed.
    """
    stream = stream.tobytes()
    if len(stream) < 4:
        raise ValueError(f"a coded stream starts with 4 bytes of checksum, but this one has {len(stream)} in all.")
    read = {"range": _range_decode, "zstd": _zstd_decode}[coder]
    symbols = read(stream[4:], alphabet, count)
    if zlib.crc32(symbols.tobytes()) != struct.unpack("<I", stream[:4])[0]:
        raise ValueError(f"{count} symbols decoded by {coder} do not have the checksum of the stream.")
    if symbols.size and symbols.max() >= alphabet:
        raise ValueError(f"symbol {symbols.max()} in a stream of the symbols 0..{alphabet - 1}.")
    return symbols


def _coders():
    try:
        import constriction
        import zstandard
    except ImportError as error:
        raise ImportError(
            "Packed archives need the packages constriction and zstandard: pip install constriction zstandard. "
            "Files written with archive=False do not."
        ) from error
    return constriction, zstandard


def _symbol_dtype(alphabet):
    return np.dtype("<u1" if alphabet <= 256 else "<u2")


def _table_model(frequencies):
    """The coder's model; whole numbers in float64 give the same table on every machine."""
    constriction, _ = _coders()
    return constriction.stream.model.Categorical(frequencies.astype(np.float64), perfect=False)


def _range_encode(symbols, alphabet):
    constriction, _ = _coders()
    counts = np.bincount(symbols, minlength=alphabet)
    frequencies = -(-counts * _LARGEST // max(counts.max(), 1))
    encoder = constriction.stream.queue.RangeEncoder()
    if symbols.size:
        encoder.encode(symbols.astype(np.int32), _table_model(frequencies))
    return frequencies.astype("<u2").tobytes() + encoder.get_compressed().astype("<u4").tobytes()


def _range_decode(stream, alphabet, count):
    constriction, _ = _coders()
    table = 2 * alphabet
    if len(stream) < table or (len(stream) - table) % 4:
        raise ValueError(
            f"a range-coded stream is a table of {table} bytes and words of 4 bytes, but it has {len(stream)} bytes."
        )
    if count == 0:
        return np.zeros(0, _symbol_dtype(alphabet))
    frequencies = np.frombuffer(stream[:table], "<u2")
    if not frequencies.any():
        raise ValueError("the table of frequencies is empty.")
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(stream[table:], "<u4").astype(np.uint32))
    try:
        symbols = decoder.decode(_table_model(frequencies), count)
    except AssertionError as error:  # how constriction says that no symbol fits
        raise ValueError(f"the range-coded stream is damaged ({error})") from error
    return symbols.astype(_symbol_dtype(alphabet))


def _zstd_decode(stream, alphabet, count):
    _, zstandard = _coders()
    dtype = _symbol_dtype(alphabet)
    try:
        size = zstandard.frame_content_size(stream)
        if size != count * dtype.itemsize:
            raise ValueError(f"a Zstandard frame of {size} bytes where {count * dtype.itemsize} are needed.")
        data = zstandard.ZstdDecompressor().decompress(stream, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the Zstandard frame is damaged ({error}).") from error
    return np.frombuffer(data, dtype)
