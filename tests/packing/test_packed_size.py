"""The claims of the packed format: whole files as small as the arithmetic says, archives near their entropy."""

import os

import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.packing.packed_reader import PackedReader
from keras_usm_lite.packing.streams import unpack_codes


@pytest.fixture(scope="module")
def small():
    model = usm.USMForCTC(64, "small", quantization="int4", sparsity="2:4")
    usm.update_masks(model)
    return model


def test_small_with_int4_and_2_of_4_is_one_file_of_at_most_9_4_percent_of_its_fp32_weights(small, tmp_path):
    size = os.path.getsize(usm.save_packed(small, tmp_path / "small.usm"))
    weights = sum(int(np.prod(weight.shape)) for weight in usm.USMForCTC(64, "small").weights)
    assert 0.09 < size / (4 * weights) <= 0.094


def test_the_code_streams_of_its_archive_are_within_5_percent_of_the_entropy_of_the_codes(small, tmp_path):
    """Without masks and scales, and with the entropy counted here."""
    file = PackedReader(usm.save_packed(small, tmp_path / "small.usm", archive=True))
    size = entropy = 0
    for entry in file.layers:
        stream = file.layer_arrays(entry)["codes"]
        _, counts = np.unique(unpack_codes(stream, entry), return_counts=True)
        size += 8 * stream.size
        entropy += np.sum(counts * np.log2(counts.sum() / counts))
    assert entropy < size < 1.002 * entropy
