"""`conformer_layout`: how the weights of a Conformer are split over the devices of a mesh (JAX backend)."""

import keras

# Projections whose outputs are split feed those whose inputs are split: one exchange of activations per pair.
SPLIT_OUTPUTS = r".*/(up|expand|query|key|value)"
SPLIT_INPUTS = r".*/(down|project|output)"


def conformer_layout(mesh, axis="model"):
    """Return the layout map of a `USMForCTC` or `USMEncoder` for `keras.distribution.ModelParallel`.

    A kernel `[inputs, outputs]` that widens or reads (`up`, `expand`, `query`, `key`, `value`) is split along its
    outputs, one that narrows or writes (`down`, `project`, `output`) along its inputs. A mask is split like its kernel,
    bias and scales along outputs only. Everything else is replicated, the front end and the CTC head included. The
    optimizer's moments follow their weights.

    With `d` devices on `axis` and width `w`, a device holds `23 w^2 / d` weights of a block.

    Args:
        mesh: a `keras.distribution.DeviceMesh` with an axis for the weights; their widths must be multiples of its
            size.
        axis: the name of that axis.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: the mesh has no such axis.

    Source: Megatron-LM (arXiv 1909.08053), section 3.

    Example:

    >>> mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])
    >>> layout = conformer_layout(mesh)
    >>> layout["encoder/block_0/ffn_start/up/kernel"].axes, layout["encoder/block_0/ffn_start/down/mask"].axes
    ((None, 'model'), ('model', None))
    """
    if axis not in mesh.axis_names:
        raise ValueError(
            f"The mesh has the axes {mesh.axis_names}, none of them is {axis!r}. Name its axis for weights."
        )
    layout = keras.distribution.LayoutMap(mesh)
    layout[f"{SPLIT_OUTPUTS}/(kernel|mask|kernel_scale|kernel_zero_point)$"] = (None, axis)
    layout[f"{SPLIT_OUTPUTS}/bias$"] = (axis,)
    layout[f"{SPLIT_INPUTS}/(kernel|mask)$"] = (axis, None)
    return layout
