import pytest

from adaptermesh.core.errors import Code, MeshError
from adaptermesh.core.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("max_tokens", SamplingParams(max_tokens=0)),
        ("max_tokens", SamplingParams(max_tokens=131073)),
        ("temperature", SamplingParams(temperature=-0.1)),
        ("temperature", SamplingParams(temperature=float("nan"))),
        ("temperature", SamplingParams(temperature=float("inf"))),
        ("top_p", SamplingParams(top_p=0.0)),
        ("top_p", SamplingParams(top_p=1.01)),
        ("top_p", SamplingParams(top_p=float("nan"))),
        ("top_k", SamplingParams(top_k=-1)),
        ("seed", SamplingParams(seed=-1)),
        ("seed", SamplingParams(seed=2**63)),
        ("stop", SamplingParams(stop=("",))),
        ("stop", SamplingParams(stop=("x" * 257,))),
        ("stop", SamplingParams(stop=("x",) * 17)),
        ("min_p", SamplingParams(min_p=-0.1)),
        ("min_p", SamplingParams(min_p=1.1)),
        ("min_p", SamplingParams(min_p=float("nan"))),
        ("repetition_penalty", SamplingParams(repetition_penalty=0.0)),
        ("repetition_penalty", SamplingParams(repetition_penalty=101.0)),
        ("repetition_penalty", SamplingParams(repetition_penalty=float("inf"))),
        ("presence_penalty", SamplingParams(presence_penalty=-2.1)),
        ("presence_penalty", SamplingParams(presence_penalty=float("nan"))),
        ("frequency_penalty", SamplingParams(frequency_penalty=2.1)),
        ("stop_token_ids", SamplingParams(stop_token_ids=(-1,))),
        ("stop_token_ids", SamplingParams(stop_token_ids=(2**31,))),
        ("stop_token_ids", SamplingParams(stop_token_ids=(1,) * 65)),
        ("logprobs", SamplingParams(logprobs=-1)),
        ("logprobs", SamplingParams(logprobs=21)),
        ("prompt_logprobs", SamplingParams(prompt_logprobs=-1)),
        ("prompt_logprobs", SamplingParams(prompt_logprobs=21)),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field(field: str, params: SamplingParams) -> None:
    with pytest.raises(MeshError) as raised:
        params.check()
    assert raised.value.code is Code.INVALID_ARGUMENT
    assert raised.value.metadata["field"] == f"sampling.{field}"


def test_the_edges_of_every_range_are_legal() -> None:
    SamplingParams(max_tokens=1, temperature=0.0, top_p=1.0, top_k=0, seed=0, stop=("x" * 256,) * 16).check()
    SamplingParams(max_tokens=131072, temperature=2.0, top_p=1e-9, top_k=1_000_000, seed=2**63 - 1).check()
    SamplingParams(min_p=0, repetition_penalty=0.01, presence_penalty=-2, frequency_penalty=-2).check()
    SamplingParams(min_p=1, repetition_penalty=100, presence_penalty=2, frequency_penalty=2).check()
    SamplingParams(prompt_logprobs=0).check()
    SamplingParams(prompt_logprobs=20).check()
    SamplingParams(logprobs=0, stop_token_ids=(0,)).check()
    SamplingParams(logprobs=20, stop_token_ids=(2**31 - 1,) * 64).check()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(presence_penalty=-0.1),
        SamplingParams(frequency_penalty=0.1),
    ],
)
def test_any_penalty_makes_a_request_penalised(params: SamplingParams) -> None:
    assert params.penalised
    assert not SamplingParams(min_p=0.5, temperature=0.5).penalised
