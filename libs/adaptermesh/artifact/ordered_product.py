"""Products of matrices whose sums have one order, so that a version has the same digest on every machine.

A BLAS adds in the order that suits the machine. What is computed at ingest is small enough to do without.
"""

import numpy as np
import numpy.typing as npt

from adaptermesh.artifact.matrices import product
from adaptermesh.artifact.plan import Floats


def matmul(left: Floats, right: Floats) -> Floats:
    """left: [.., n, k], right: [.., k, m]; summed over k from the first to the last, in float64."""
    return product(left.astype(np.float64), right.astype(np.float64)).astype(np.float32)


def kron_sum(left: Floats, right: Floats) -> Floats:
    """The sum over n of kron(left[n], right[n]). left: [n, i, j], right: [n, a, b]; gives [i * a, j * b]."""
    _, i, j = left.shape
    _, a, b = right.shape
    total: npt.NDArray[np.float64] = np.zeros((i, a, j, b), np.float64)
    for one, other in zip(left, right, strict=True):
        total += one[:, None, :, None].astype(np.float64) * other[None, :, None, :]
    return total.reshape(i * a, j * b).astype(np.float32)
