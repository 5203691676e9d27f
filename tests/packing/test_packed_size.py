"""The claim of the packed format: whole files as small as the arithmetic says."""

import os

import numpy as np

import keras_usm_lite as usm


def test_small_with_int4_and_2_of_4_is_one_file_of_at_most_9_4_percent_of_its_fp32_weights(tmp_path):
    model = usm.USMForCTC(41, "small", quantization="int4", sparsity="2:4")
    usm.update_masks(model)
    size = os.path.getsize(usm.save_packed(model, tmp_path / "small.usm"))
    weights = sum(int(np.prod(weight.shape)) for weight in usm.USMForCTC(41, "small").weights)
    assert 0.09 < size / (4 * weights) <= 0.094
