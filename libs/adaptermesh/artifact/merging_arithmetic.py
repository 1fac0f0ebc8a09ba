"""What becomes of one module's low-rank deltas when adapters are merged: numpy only, one module at a time.

A delta is what an adapter adds to a module's weight, `scale * B A`, [out, in]. Concatenation rounds each
product of B and its factor once, to float32, and gives the same bytes everywhere. What multiplies matrices or
decomposes them agrees between machines to rounding only: their BLAS libraries add in different orders.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_BLOCK_ENTRIES = 2**22
"""Entries of a dense delta that are in memory in double precision, or as random words, at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """One member's low-rank delta at a module: `b @ diag(scales) @ a`, and the weight it has in the merge.

    a: [rank, in] float32. b: [out, rank] float32. scales: [rank] float64. `member` tells it from the others.
    """

    a: Floats
    b: Floats
    scales: Doubles
    weight: float
    member: str

    def dense(self) -> Floats:
        """The delta without its weight: [out, in] float32."""
        return _scaled(self.b, self.scales) @ self.a


@dataclass(frozen=True, slots=True)
class LowRank:
    """A merged module, `b @ a`, and how much of what it stands for it holds.

    a: [rank, in] float32. b: [out, rank] float32. `kept` and `total` are squared Frobenius norms: of `b @ a`,
    and of what it was cut from; equal where nothing was cut.
    """

    a: Floats
    b: Floats
    kept: float
    total: float


def concatenated(parts: Sequence[Part]) -> LowRank:
    """The weighted sum of the deltas, exactly: rows of A and columns of B side by side, so the ranks add up.

    Its norms are not computed: `kept` and `total` are 1.
    """
    a = np.concatenate([part.a for part in parts])
    b = np.concatenate([_scaled(part.b, part.scales * part.weight) for part in parts], axis=1)
    return LowRank(a, b, 1.0, 1.0)


def cut_sum(parts: Sequence[Part], rank: int) -> LowRank:
    """The weighted sum of the deltas, cut to a rank as `cut` does it.

    If the sum's rank is below both widths, the full matrix is never made: b = Q R and a' = P S give
    b a = Q (R S') P', whose inner part is small and has the same singular values.
    """
    joined = concatenated(parts)
    if joined.a.shape[0] >= min(joined.b.shape[0], joined.a.shape[1]):
        return cut(joined.b @ joined.a, rank)
    q_b, r_b = np.linalg.qr(joined.b.astype(np.float64))
    q_a, r_a = np.linalg.qr(joined.a.astype(np.float64).T)
    left, values, right = np.linalg.svd(r_b @ r_a.T)
    energy = np.square(values)
    root = np.sqrt(values[:rank])
    b = (q_b @ left[:, :rank]) * root
    a = root[:, None] * (right[:rank] @ q_a.T)
    return _signed(a, b, float(energy[:rank].sum()), float(energy.sum()))


def cut(matrix: Floats, rank: int) -> LowRank:
    """A matrix [out, in] cut to a rank: none of that rank is nearer to it (Eckart and Young, 1936).

    Its singular vectors on the shorter side are the eigenvectors of the matrix times its transpose, which is
    added up in double precision: exact to float32, and no larger than the shorter side squared.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = cut(matrix.T, rank)
        return _signed(turned.b.T, turned.a.T, turned.kept, turned.total)
    blocks = _column_blocks(matrix)
    gram = np.zeros((len(matrix), len(matrix)))
    for block in blocks:
        columns = matrix[:, block].astype(np.float64)
        gram += columns @ columns.T
    total = float(np.trace(gram))
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]
    projected = np.concatenate([vectors.T @ matrix[:, block].astype(np.float64) for block in blocks], axis=1)
    energy = np.square(projected).sum(axis=1)
    # Split evenly between A and B: the square root of each singular value.
    root = np.sqrt(np.sqrt(energy))
    a = projected / np.where(root > 0, root, 1.0)[:, None]
    return _signed(a, vectors * root, min(float(energy.sum()), total), total)


def ties(parts: Sequence[Part], density: float) -> Floats:
    """TIES of dense deltas: [out, in] float32.

    Each delta is trimmed to its largest entries by magnitude; the sign of each entry is elected by the sum of
    what is left; the result is the mean of the weighted deltas that have that sign there. Weights do not
    vote, and the mean counts heads, not weights. Each delta is made twice, so that memory does not grow with
    the members.

    Source: TIES-Merging (arXiv:2306.01708), algorithm 1, with a trim for each module as in peft's `ties_svd`.
    """
    votes = trimmed(parts[0].dense(), density)
    for part in parts[1:]:
        votes += trimmed(part.dense(), density)
    positive = votes >= 0
    del votes
    total = np.zeros(positive.shape, np.float32)
    heads = np.zeros(positive.shape, np.uint8)
    for part in parts:
        delta = trimmed(part.dense(), density)
        agrees = np.where(positive, delta > 0, delta < 0)
        delta *= agrees
        total += np.float32(part.weight) * delta
        heads += agrees
    total /= np.maximum(heads, np.uint8(1))
    return total


def dare(parts: Sequence[Part], density: float, seed: int, module: str) -> Floats:
    """DARE of dense deltas: [out, in] float32.

    Of each delta every entry is kept with probability `density`, else set to zero; what is kept is divided by
    `density`; the result is the weighted sum. Which entries are kept depends on `seed`, the module's path and
    the member alone: neither on the order of the members nor on the machine.

    Source: DARE (arXiv:2311.03099), section 3.2, on the delta of each module, then a weighted sum.
    """
    total = np.zeros((len(parts[0].b), parts[0].a.shape[1]), np.float32)
    for part in parts:
        delta = part.dense()
        delta *= kept_entries(delta.size, density, seed, module, part.member).reshape(delta.shape)
        total += np.float32(part.weight / density) * delta
    return total


def trimmed(delta: Floats, density: float) -> Floats:
    """Sets all but the `density` share of entries largest in magnitude to zero; at least one is kept.

    Among equals the first ones in the order of the rows are kept, so that their number is exact.
    """
    keep = max(1, int(density * delta.size))
    if keep >= delta.size:
        return delta
    magnitude = np.abs(delta).ravel()
    least = np.partition(magnitude, magnitude.size - keep)[magnitude.size - keep]
    kept = magnitude > least
    kept[np.flatnonzero(magnitude == least)[: keep - np.count_nonzero(kept)]] = True
    result: Floats = delta * kept.reshape(delta.shape)
    return result


def kept_entries(size: int, density: float, seed: int, module: str, member: str) -> Bools:
    """For each of `size` entries whether DARE keeps it: [size] bool.

    The raw words of Philox (a counter-based generator, whose stream numpy guarantees), keyed by seed, module
    and member; an entry is kept if its 32 bits are below `density`.
    """
    name = f"adaptermesh.merge.dare\n{seed}\n{module}\n{member}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    bound = round(density * 2**32)
    kept = np.empty(size, np.bool_)
    for start in range(0, size, _BLOCK_ENTRIES):
        count = min(_BLOCK_ENTRIES, size - start)
        words = generator.random_raw((count + 1) // 2)
        kept[start : start + count] = words.astype("<u8").view("<u4")[:count] < bound
    return kept


def _scaled(b: Floats, scales: Doubles) -> Floats:
    """B with its columns multiplied, rounded once."""
    return (b.astype(np.float64) * scales).astype(np.float32)


def _column_blocks(matrix: Floats) -> list[slice]:
    width = max(1, _BLOCK_ENTRIES // len(matrix))
    return [slice(start, start + width) for start in range(0, matrix.shape[1], width)]


def _signed(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating], kept: float, total: float) -> LowRank:
    """Gives each pair of vectors the sign that makes the largest entry of B's column positive, in float32."""
    largest = np.abs(b).argmax(axis=0)
    signs = np.where(b[largest, np.arange(b.shape[1])] < 0, -1.0, 1.0)
    return LowRank(
        np.ascontiguousarray(a * signs[:, None], np.float32),
        np.ascontiguousarray(b * signs, np.float32),
        kept,
        total,
    )
