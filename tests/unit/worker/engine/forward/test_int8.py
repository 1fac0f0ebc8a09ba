"""The base's layers in 8 bits: close to the exact product, the same for a row whatever is beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from adaptermesh.core.errors import Code, MeshError
from adaptermesh.worker.engine.forward import int8
from adaptermesh.worker.engine.forward.int8 import Int8Linear, int8_is_exact

Prompts = Callable[[int, int], list[list[int]]]

needs_vnni = pytest.mark.skipif(
    not int8_is_exact(), reason="needs a CPU whose sums of byte products are exact (VNNI)"
)


def plain_int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same, number by number in float64."""
    rows = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    outs = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    product = (x / rows).round().double() @ (weight / outs).round().double().T
    return (product * rows.double() * outs.double().T).float()


@needs_vnni
@pytest.mark.parametrize("tokens", [1, 2, 16, 49, 130])
@pytest.mark.parametrize("shape", [(8, 16), (96, 33), (64, 128)])
def test_a_product_equals_the_plain_formula(tokens: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(tokens)
    weight, x = torch.randn(*shape), torch.randn(tokens, shape[1]) * torch.logspace(-3, 3, tokens)[:, None]
    found = Int8Linear(weight, None)(x)
    # A number that lies between two steps may be rounded to either side.
    step = x.abs().amax(-1, keepdim=True) / 127 * weight.abs().max()
    assert bool(((found - plain_int8(x, weight)).abs() <= 1.01 * step).all())
    error = (found - linear(x, weight)).norm(dim=-1) / linear(x, weight).norm(dim=-1)
    assert error.max() < 0.05


def test_a_bias_is_added_exactly() -> None:
    weight, bias, x = torch.randn(8, 16), torch.randn(8), torch.randn(3, 16)
    torch.testing.assert_close(
        Int8Linear(weight, bias)(x), Int8Linear(weight, None)(x) + bias, rtol=0.0, atol=0.0
    )


def test_a_token_does_not_feel_its_neighbours() -> None:
    weight, x = torch.randn(40, 64), torch.randn(7, 64)
    alone = Int8Linear(weight, None)(x[2:3])
    x[3] *= 1e6
    torch.testing.assert_close(Int8Linear(weight, None)(x)[2:3], alone, rtol=0.0, atol=0.0)


def test_tokens_and_outputs_of_zeros_give_zeros() -> None:
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    weight[5] = 0.0
    x[1] = 0.0
    found = Int8Linear(weight, None)(x)
    assert bool(found.isfinite().all())
    assert not bool(found[1].any())
    assert not bool(found[:, 5].any())


@needs_vnni
def test_mixed_rows_give_the_tokens_that_they_give_alone(lab: Any, make_bench: Any, prompts: Prompts) -> None:
    adapters = [lab.adapter(1, 4), None, lab.adapter(2, 8), lab.adapter(1, 4), None]
    inputs = prompts(len(adapters), 5)
    bench = make_bench(quantization="int8")
    alone = []
    for adapter, prompt in zip(adapters, inputs, strict=True):
        alone.append(bench.submit(adapter, prompt, 8))
        bench.run(alone[-1])
    mixed = [bench.submit(a, prompt, 8) for a, prompt in zip(adapters, inputs, strict=True)]
    bench.run(*mixed)
    assert [one.tokens for one in mixed] == [one.tokens for one in alone]
    bench.assert_empty()


@needs_vnni
def test_the_exact_matrices_are_not_kept(make_bench: Any) -> None:
    bench = make_bench(quantization="int8")
    kept = [name for name, weight in bench.base.model.named_parameters() if weight.numel() and "proj" in name]
    assert kept == []


@pytest.mark.parametrize("settings", [{"forward": "plain"}, {"dtype": "bfloat16"}])
def test_int8_is_refused_where_it_would_not_be_used(make_bench: Any, settings: dict[str, str]) -> None:
    with pytest.raises(MeshError, match="quantization: int8 needs") as raised:
        make_bench(quantization="int8", **settings)
    assert raised.value.code is Code.INVALID_ARGUMENT
    assert raised.value.metadata["field"] == "quantization"


def test_int8_is_refused_where_its_sums_overflow(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "int8_is_exact", lambda: False)
    with pytest.raises(MeshError, match="quantization: int8 needs a CPU with VNNI"):
        make_bench(quantization="int8")


def test_an_unknown_quantization_is_refused(make_bench: Any) -> None:
    with pytest.raises(MeshError, match="neither 'none' nor 'int8'"):
        make_bench(quantization="int3")
