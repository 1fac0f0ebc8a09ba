"""The merge of one module's deltas, each method against a plain dense reference."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.artifact.merging_arithmetic import (
    LowRank,
    Part,
    concatenated,
    cut,
    cut_sum,
    dare,
    kept_entries,
    ties,
    trimmed,
)

Array = npt.NDArray[Any]
MODULE = "model.layers.0.self_attn.q_proj"


def part(seed: int, rank: int, inputs: int, outputs: int, weight: float = 1.0, scale: float = 1.0) -> Part:
    random = np.random.default_rng(seed)
    return Part(
        a=random.standard_normal((rank, inputs)).astype(np.float32),
        b=random.standard_normal((outputs, rank)).astype(np.float32),
        scales=np.full(rank, scale),
        weight=weight,
        member=f"sha256:{seed:064x}",
    )


def delta(one: Part) -> Array:
    """In double precision, without the weight."""
    result: Array = (one.b.astype(np.float64) * one.scales) @ one.a.astype(np.float64)
    return result


def weighted_sum(parts: list[Part]) -> Array:
    result: Array = np.sum([one.weight * delta(one) for one in parts], axis=0)
    return result


def product(merged: LowRank) -> Array:
    result: Array = merged.b.astype(np.float64) @ merged.a.astype(np.float64)
    return result


def close(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)


weights = st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3)


@st.composite
def modules(draw: st.DrawFn) -> list[Part]:
    inputs, outputs = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    count = draw(st.integers(1, 4))
    return [
        part(
            draw(st.integers(0, 2**32)),
            draw(st.integers(1, 6)),
            inputs,
            outputs,
            draw(weights),
            draw(st.floats(0.1, 8)),
        )
        for _ in range(count)
    ]


@given(modules())
def test_concatenation_is_the_weighted_sum_of_the_deltas(parts: list[Part]) -> None:
    merged = concatenated(parts)
    assert merged.a.shape[0] == merged.b.shape[1] == sum(len(one.a) for one in parts)
    assert merged.a.dtype == merged.b.dtype == np.float32
    close(product(merged), weighted_sum(parts), 1e-6)


def test_concatenating_one_with_weight_1_changes_no_bit() -> None:
    one = part(1, 4, 16, 8, scale=2.0)
    merged = concatenated([one])
    np.testing.assert_array_equal(merged.a, one.a)
    np.testing.assert_array_equal(merged.b, one.b * np.float32(2))


@given(modules())
def test_cutting_to_full_rank_keeps_the_sum(parts: list[Part]) -> None:
    full = sum(len(one.a) for one in parts)
    merged = cut_sum(parts, min(full, len(parts[0].b), parts[0].a.shape[1]))
    close(product(merged), weighted_sum(parts))
    assert merged.kept == pytest.approx(merged.total)


@given(modules(), st.integers(1, 6))
def test_what_cutting_loses_is_the_tail_of_the_singular_values(parts: list[Part], rank: int) -> None:
    expected = weighted_sum(parts)
    rank = min(rank, sum(len(one.a) for one in parts), *expected.shape)
    merged = cut_sum(parts, rank)
    values = np.linalg.svd(expected, compute_uv=False)
    assert merged.total == pytest.approx(np.square(values).sum(), rel=1e-5)
    assert merged.kept == pytest.approx(np.square(values[:rank]).sum(), rel=1e-5)
    lost = np.linalg.norm(product(merged) - expected)
    assert lost == pytest.approx(np.sqrt(np.square(values[rank:]).sum()), abs=1e-4 * values[0])


@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (9, 9), (1, 7), (7, 1)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_dense_matrix_is_cut_as_its_singular_values_say(shape: tuple[int, int], rank: int) -> None:
    matrix = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    merged = cut(matrix, min(rank, *shape))
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    close(product(merged), (left[:, :rank] * values[:rank]) @ right[:rank])
    assert merged.kept == pytest.approx(np.square(values[:rank]).sum(), rel=1e-6)
    assert merged.total == pytest.approx(np.square(values).sum(), rel=1e-6)


def test_a_wide_matrix_is_cut_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(3).standard_normal((6, 50)).astype(np.float32)
    whole = cut(matrix, 4)
    monkeypatch.setattr("adaptermesh.artifact.merging_arithmetic._BLOCK_ENTRIES", 40)
    close(product(cut(matrix, 4)), product(whole))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_nothing_is_cut_to_nothing(shape: tuple[int, int]) -> None:
    merged = cut(np.zeros(shape, np.float32), 2)
    assert not merged.a.any() or not merged.b.any()
    assert (merged.kept, merged.total) == (0.0, 0.0)


def test_the_factors_share_the_singular_values_and_have_one_sign() -> None:
    parts = [part(1, 3, 12, 10), part(2, 2, 12, 10, weight=-0.5)]
    for merged in (cut_sum(parts, 3), cut(weighted_sum(parts).astype(np.float32), 3)):
        np.testing.assert_allclose(
            np.linalg.norm(merged.a, axis=1), np.linalg.norm(merged.b, axis=0), rtol=1e-5
        )
        assert (merged.b[np.abs(merged.b).argmax(axis=0), range(3)] > 0).all()


def plain_ties(parts: list[Part], density: float) -> Array:
    deltas = []
    for one in parts:
        values = one.dense().astype(np.float64)
        keep = max(1, int(density * values.size))
        order = np.argsort(-np.abs(values).ravel(), kind="stable")
        mask = np.zeros(values.size, bool)
        mask[order[:keep]] = True
        deltas.append(values * mask.reshape(values.shape))
    sign = np.where(np.sum(deltas, axis=0) >= 0, 1, -1)
    result = np.zeros_like(deltas[0])
    for index in np.ndindex(result.shape):
        chosen = [
            one.weight * values[index]
            for one, values in zip(parts, deltas, strict=True)
            if np.sign(values[index]) == sign[index]
        ]
        result[index] = sum(chosen) / len(chosen) if chosen else 0.0
    return result


@given(modules(), st.floats(0.01, 1))
def test_ties_is_what_its_paper_says(parts: list[Part], density: float) -> None:
    close(ties(parts, density), plain_ties(parts, density), 1e-5)


def test_trimming_keeps_an_exact_number_of_entries_also_among_equals() -> None:
    ones = np.ones((4, 5), np.float32)
    assert np.flatnonzero(trimmed(ones, 0.25)).tolist() == [0, 1, 2, 3, 4]
    mixed = np.array([[1, -3, 2], [-2, 0, 2]], np.float32)
    np.testing.assert_array_equal(trimmed(mixed, 0.5), [[0, -3, 2], [-2, 0, 0]])
    assert np.count_nonzero(trimmed(mixed, 0.01)) == 1
    np.testing.assert_array_equal(trimmed(mixed, 1.0), mixed)


def plain_dare(parts: list[Part], density: float, seed: int) -> Array:
    result = np.zeros((len(parts[0].b), parts[0].a.shape[1]))
    for one in parts:
        key = hashlib.sha256(f"adaptermesh.merge.dare\n{seed}\n{MODULE}\n{one.member}".encode()).digest()
        generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
        values = one.dense()
        words: list[int] = []
        while len(words) < values.size:
            word = int(generator.random_raw())
            words += [word & 0xFFFFFFFF, word >> 32]
        for place, word in zip(np.ndindex(values.shape), words, strict=False):
            if word / 2**32 < density:
                result[place] += one.weight * float(values[place]) / density
    return result


@given(modules(), st.sampled_from([0.125, 0.5, 0.75, 1.0]), st.integers(0, 2**32 - 1))
def test_dare_is_what_its_paper_says(parts: list[Part], density: float, seed: int) -> None:
    close(dare(parts, density, seed, MODULE), plain_dare(parts, density, seed), 1e-5)


def test_what_dare_keeps_is_the_same_on_every_machine_and_differs_by_seed_module_and_member() -> None:
    kept = kept_entries(1001, 0.25, 7, MODULE, "sha256:a")
    packed = hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()
    assert packed == "d510a57b4faef232e61156f13ad1b22dd05675cd61ed8470c5acdf6f2c2111b0"
    assert 200 < np.count_nonzero(kept) < 300
    for other in ((8, MODULE, "sha256:a"), (7, "other", "sha256:a"), (7, MODULE, "sha256:b")):
        assert not np.array_equal(kept, kept_entries(1001, 0.25, *other))


def test_what_dare_keeps_does_not_depend_on_the_blocks_it_is_drawn_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = kept_entries(1001, 0.25, 7, MODULE, "m")
    monkeypatch.setattr("adaptermesh.artifact.merging_arithmetic._BLOCK_ENTRIES", 64)
    np.testing.assert_array_equal(kept_entries(1001, 0.25, 7, MODULE, "m"), whole)


def test_dare_does_not_depend_on_the_order_of_the_members() -> None:
    parts = [part(1, 2, 8, 6), part(2, 3, 8, 6, weight=0.5)]
    close(dare(parts, 0.5, 0, MODULE), dare(parts[::-1], 0.5, 0, MODULE), 1e-6)
