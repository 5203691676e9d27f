"""Codes and masks as streams: what is written is read, and an archive takes the entropy."""

import dataclasses

import numpy as np
import pytest

from keras_usm_lite.core.quantize import code_range
from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.patterns import indices_to_mask, pattern_table
from keras_usm_lite.packing.streams import pack_codes, pack_mask, unpack_codes, unpack_mask

CODEBOOKS = [("symmetric", 8), ("symmetric", 3), ("full", 4), ("asymmetric", 8), ("midrise", 1), ("midrise", 4)]


def entry(rows, columns, bits=4, codebook="symmetric", n=2, m=4):
    masks = None if n is None else "enumerative"
    return PackedEntry("layer", rows, columns, bits, codebook, (1, columns), n, m, "bits", masks, "float32")


def normal_codes(rows, columns, bits, codebook, seed=0):
    """Codes as rounding a normal kernel with an absmax scale gives them."""
    lowest, highest = code_range(bits, codebook)
    step = 2 if codebook == "midrise" else 1
    codes = np.random.default_rng(seed).normal(size=(rows, columns)) * highest / 4.5
    codes = np.round((codes - lowest) / step) * step + lowest
    return np.clip(codes, lowest, highest).astype("int8")


def random_mask(rows, columns, n, m, seed=0):
    indices = np.random.default_rng(seed).integers(0, len(pattern_table(n, m)), (rows // m, columns))
    return indices_to_mask(indices, n, m)


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(("codebook", "bits"), CODEBOOKS)
def test_codes_come_back(codebook, bits, archive):
    about = entry(512, 96, bits, codebook, n=None, m=None)
    codes = normal_codes(512, 96, bits, codebook)
    form, stream = pack_codes(codes, about, archive)
    assert archive or form == "bits"
    np.testing.assert_array_equal(unpack_codes(stream, dataclasses.replace(about, codes=form)), codes)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
@pytest.mark.parametrize(("archive", "masks"), [(False, "enumerative"), (False, "positions"), (True, "enumerative")])
def test_masks_come_back(n, m, archive, masks):
    mask = random_mask(512, 96, n, m)
    mask[:256] = np.tile(mask[:m], (256 // m, 1))  # the same pattern again and again
    form, stream = pack_mask(mask, n, m, archive, masks)
    assert form in (("range", "zstd") if archive else (masks,))
    about = dataclasses.replace(entry(512, 96, n=n, m=m), masks=form)
    np.testing.assert_array_equal(unpack_mask(stream, about), mask)


def test_an_archive_of_int4_and_2_of_4_is_within_5_percent_of_its_entropy():
    """The claim of the archive form, with the entropy counted here: codes of survivors and patterns of a layer."""
    rows, columns = 1024, 512
    mask, codes = random_mask(rows, columns, 2, 4), normal_codes(rows, columns, 4, "symmetric")
    kept = codes.T[mask.T].reshape(columns, -1).T
    about = entry(rows, columns)
    form, stream = pack_codes(kept, about, True)
    mask_form, mask_stream = pack_mask(mask, 2, 4, True, "enumerative")
    _, counts = np.unique(kept, return_counts=True)
    entropy = -np.sum(counts * np.log2(counts / kept.size))
    groups = mask.T.reshape(-1, 4) @ [1, 2, 4, 8]
    _, counts = np.unique(groups, return_counts=True)
    entropy -= np.sum(counts * np.log2(counts / groups.size))
    assert (form, mask_form) == ("range", "range")
    assert 1 <= 8 * (stream.size + mask_stream.size) / entropy < 1.001 < 1.05
    assert stream.size + mask_stream.size < about.plain_size("codes") + about.plain_size("patterns")


def test_structure_that_the_entropy_does_not_see_is_found_by_zstandard():
    form, stream = pack_codes(np.tile(normal_codes(512, 16, 4, "symmetric"), (1, 6)), entry(1024, 96), True)
    mask_form, mask_stream = pack_mask(np.tile(random_mask(1024, 16, 2, 4), (1, 6)), 2, 4, True, "enumerative")
    assert (form, mask_form) == ("zstd", "zstd")
    assert stream.size < 512 * 96 / 2 / 3 and mask_stream.size < 256 * 96 * 13 / 5 / 8 / 3


def test_a_number_that_is_no_code_is_refused():
    about = entry(4, 1, n=None, m=None)
    with pytest.raises(ValueError, match="the number 15 stands for no code of the 'symmetric' codebook.* 15 codes"):
        unpack_codes(np.array([0xF0, 0x00], "uint8"), about)
    np.testing.assert_array_equal(unpack_codes(np.array([0xE0, 0x00], "uint8"), about), [[-7], [7], [-7], [-7]])
