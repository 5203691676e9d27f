"""Model sizes by name."""

# Widths are multiples of 16, so that every N:M pattern up to M = 16 divides every kernel.
PRESETS = {
    "tiny": {"num_layers": 4, "dim": 96, "num_heads": 4, "kernel_size": 9, "subsampling_channels": 32},
    "small": {"num_layers": 6, "dim": 256, "num_heads": 4, "kernel_size": 5, "subsampling_channels": 32},
    "usm_0.6b": {"num_layers": 24, "dim": 1024, "num_heads": 8, "kernel_size": 5, "subsampling_channels": 128},
    "usm_2b": {"num_layers": 32, "dim": 1536, "num_heads": 16, "kernel_size": 5, "subsampling_channels": 128},
}


def preset(name):
    """Return the encoder arguments of a preset.

    "tiny" (1M parameters) and "small" (10M) are made for phones and for experiments on a CPU; "usm_0.6b" and "usm_2b"
    are the encoders of USM (arXiv 2303.01037, table 2).

    Raises:
        ValueError: an unknown name.

    Example:

    >>> preset("usm_2b")["dim"]
    1536
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
