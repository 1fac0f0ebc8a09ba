"""What the way through the modules refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.attention import Span, plan_attention
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.forward.plain import paged_attention
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.slots import AdapterPlan


def attend(module: Any, **arguments: Any) -> torch.Tensor:
    """One token, one head."""
    cpu, token = torch.device("cpu"), torch.zeros(1, dtype=torch.int64)
    plan = plan_attention([Span(0, 1, (1,))], 1, 4, torch.float32, cpu)
    one = torch.ones(1, 1, 1, 4)
    out, _ = paged_attention(
        module,
        one,
        one,
        one,
        None,
        adaptermesh_batch=StepBatch(token, token, token, plan, AdapterPlan()),
        adaptermesh_cache=KvCache(KvShape(1, 1, 4, 1, 4), torch.float32, cpu),
        **arguments,
    )
    return out


def test_arguments_without_meaning_for_attention_are_let_through() -> None:
    module = SimpleNamespace(layer_idx=0)
    out = attend(module, dropout=0.0, position_ids=torch.zeros(1, 1), use_cache=False, s_aux=None)
    torch.testing.assert_close(out, torch.ones(1, 1, 1, 4))


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_an_argument_that_would_be_lost_is_refused(name: str) -> None:
    with pytest.raises(MeshError, match=f"asks for {name}") as caught:
        attend(SimpleNamespace(layer_idx=0), **{name: torch.ones(1)})
    assert (caught.value.code, caught.value.reason) == (Code.FAILED_PRECONDITION, Reason.ADAPTER_UNSUPPORTED)


def test_a_window_without_tokens_is_refused() -> None:
    with pytest.raises(MeshError, match="has a window of 0 tokens"):
        attend(SimpleNamespace(layer_idx=0), sliding_window=0)


@pytest.mark.parametrize(("module", "argument"), [(False, None), (True, False)])
def test_attention_that_is_not_causal_is_refused(module: bool, argument: bool | None) -> None:
    with pytest.raises(MeshError, match="is not causal"):
        attend(SimpleNamespace(layer_idx=0, is_causal=module), is_causal=argument)
