"""Products and inverses of small matrices, the same to the last bit on every machine.

What ingest computes becomes part of an adapter's identity. A matrix library adds in an order of its own that
depends on the processor; here every step is one operation on whole arrays, rounded as IEEE 754 has it.
"""

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
_LN2 = 0.6931471805599453


def product(a: Doubles, b: Doubles) -> Doubles:
    """The product of matrices, or of stacks of them. a: [..., n, k]. b: [..., k, m] -> [..., n, m]."""
    total = a[..., :, :1] * b[..., :1, :]
    for k in range(1, a.shape[-1]):
        total += a[..., :, k : k + 1] * b[..., k : k + 1, :]
    return total


def tanh(x: Doubles) -> Doubles:
    """The hyperbolic tangent, to some 1e-14, of plain operations: a library's differs between processors."""
    y = -2.0 * np.abs(x)
    # exp(y) = 2^n exp(r) with r at most half of ln 2, which a short series gives.
    n = np.rint(np.maximum(y, -700.0) / _LN2)
    r = np.maximum(y, -700.0) - n * _LN2
    series = np.ones_like(r)
    for k in range(16, 0, -1):
        series = 1.0 + series * r / k
    e = np.ldexp(series, n.astype(np.int64))
    return np.copysign((1.0 - e) / (1.0 + e), x)


def cayley(skew: Doubles) -> Doubles:
    """The rotations (I - S) (I + S)^-1 of skew-symmetric matrices. skew: [count, n, n], as the result.

    I + S needs no pivots: its symmetric part is I, so that no leading minor is zero. What is too large for
    that comes out as infinity or NaN.
    """
    size = skew.shape[-1]
    unit = np.eye(size)
    # Both factors are functions of S, so their order is the same: (I + S) X = I - S.
    rows = np.concatenate((unit + skew, unit - skew), axis=-1)
    for k in range(size):
        pivot = rows[:, k] / rows[:, k, k, None]
        rows -= rows[:, :, k, None] * pivot[:, None]
        rows[:, k] = pivot
    return rows[:, :, size:]


def cayley_series(skew: Doubles, terms: int) -> Doubles:
    """What OFT computes of the rotations (I + S) (I - S)^-1: their first powers. skew: [count, n, n].

    I + 2 S + ... + 2 S^(terms - 2) + S^(terms - 1). With three terms the last power is S^3 as with four; with
    two there is I + 2 S, with fewer I. Source: peft 0.21, whose adapters are trained with this.
    """
    total = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    if terms > 1:
        total += 2.0 * skew
    if terms > 2:
        power = product(skew, skew)
        total += 2.0 * power
        for _ in range(3, terms - 1):
            power = product(power, skew)
            total += 2.0 * power
        total += product(power, skew)
    return total


def skew_of(packed: Doubles, size: int) -> Doubles:
    """Skew-symmetric matrices from what is above the diagonal, row by row. packed: [count, n (n - 1) / 2]."""
    upper = np.zeros((len(packed), size, size))
    upper[:, *np.triu_indices(size, 1)] = packed
    return upper - upper.transpose(0, 2, 1)


def shrunk(skew: Doubles, most: float) -> Doubles:
    """Each matrix with a norm above `most` scaled down to it. skew: [count, n, n]."""
    # A running sum has one order; a sum does not.
    squares = np.square(skew).reshape(len(skew), -1).cumsum(axis=1)[:, -1]
    norms = np.sqrt(squares)
    return skew * np.where(norms <= most, 1.0, most / np.where(norms == 0.0, 1.0, norms))[:, None, None]
