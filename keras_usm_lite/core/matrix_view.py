"""A kernel of any shape as the matrix `[inputs, outputs]` on which every formula is defined."""

import dataclasses
import math

from keras import ops


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """Which axes of a kernel are summed over, and which make an output.

    `matrix = reshape(transpose(kernel, reduced + kept), [rows, columns])`; rows run along the reduction axis, so N:M
    groups are consecutive rows, and every column has its own scale.

    Attributes:
        shape: shape of the kernel.
        reduced: axes that are summed over, the slowest first.
        kept: the other axes.

    Example:

    >>> view = MatrixView(shape=(3, 8, 16), reduced=(0, 1), kept=(2,))  # a convolution: 3 taps, 8 inputs, 16 filters
    >>> view.rows, view.columns
    (24, 16)
    """

    shape: tuple
    reduced: tuple
    kept: tuple

    @property
    def rows(self):
        """Number of products summed into one output."""
        return math.prod(self.shape[axis] for axis in self.reduced)

    @property
    def columns(self):
        """Number of output channels."""
        return math.prod(self.shape[axis] for axis in self.kept)

    def to_matrix(self, kernel):
        """Return the kernel as `[rows, columns]`.

        Example:

        >>> tuple(MatrixView((2, 3, 4), (1,), (0, 2)).to_matrix(ops.ones((2, 3, 4))).shape)
        (3, 8)
        """
        return ops.reshape(ops.transpose(kernel, self.reduced + self.kept), (self.rows, self.columns))

    def from_matrix(self, matrix):
        """Return a matrix `[rows, columns]` in the shape of the kernel.

        Example:

        >>> tuple(MatrixView((2, 3, 4), (1,), (0, 2)).from_matrix(ops.ones((3, 8))).shape)
        (2, 3, 4)
        """
        order = self.reduced + self.kept
        tensor = ops.reshape(matrix, tuple(self.shape[axis] for axis in order))
        return ops.transpose(tensor, tuple(order.index(axis) for axis in range(len(order))))
