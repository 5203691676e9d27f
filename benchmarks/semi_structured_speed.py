"""How fast a GPU multiplies by 2:4 kernels on its sparse tensor cores, against the same kernels stored densely.

    KERAS_BACKEND=torch python benchmarks/semi_structured_speed.py

Both products run in bfloat16 through `torch.nn.functional.linear` on the feed-forward shapes of USM; the integer codes
are the same and so are the results, up to the order of summation. Without a GPU nothing is measured.
"""

import statistics

import numpy as np
import torch

import keras_usm_lite as usm
from keras_usm_lite.interop import to_torch_semi_structured

SHAPES = [(1024, 4096), (4096, 1024), (1536, 6144), (6144, 1536)]  # inputs, outputs of usm_0.6b and usm_2b
TOKENS = (256, 2048, 16384)
REPEATS = 50


def layer_2_4(inputs, outputs):
    layer = usm.QuantDense(outputs, "int4", "2:4", use_bias=False)
    layer.build((None, inputs))
    layer.update_mask()
    return layer


def microseconds(function, *arguments):
    """Return the median time of a call on the GPU."""
    for _ in range(10):
        function(*arguments)
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(*arguments)
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def main():
    if not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no GPU: nothing measured. tests/test_interop.py checks the values.")
        return
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bfloat16, median of {REPEATS}")
    for inputs, outputs in SHAPES:
        layer = layer_2_4(inputs, outputs)
        sparse, scale = to_torch_semi_structured(layer, device="cuda")
        kernel = torch.from_numpy(np.asarray(layer.effective_kernel().detach().cpu())).cuda()
        dense = (kernel.T / scale[:, None]).round().bfloat16().contiguous()
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            linear = torch.nn.functional.linear
            difference = (linear(x, sparse) - linear(x, dense)).abs().max() / linear(x, dense).abs().max()
            dense_time, sparse_time = microseconds(linear, x, dense), microseconds(linear, x, sparse)
            print(
                f"{tokens:6d} x {inputs} -> {outputs}: dense {dense_time:.1f} us, 2:4 {sparse_time:.1f} us, "
                f"{dense_time / sparse_time:.2f}x, relative difference {float(difference):.1e}"
            )


if __name__ == "__main__":
    main()
