import dataclasses

import pytest

from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.rpc.sampling import logprobs_messages, read_logprobs, read_sampling, sampling_message

GIVEN = SamplingParams(
    max_tokens=5,
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    seed=11,
    stop=("a", "b"),
    ignore_eos=True,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    stop_token_ids=(3, 4),
    logprobs=2,
    prompt_logprobs=3,
)


def test_every_parameter_survives_the_wire() -> None:
    default = SamplingParams()
    for field in dataclasses.fields(SamplingParams):
        assert getattr(GIVEN, field.name) != getattr(default, field.name), "the test needs another value"
    wire = inference_pb2.SamplingParams.FromString(sampling_message(GIVEN).SerializeToString())
    assert read_sampling(wire) == GIVEN


def test_absent_fields_have_their_defaults() -> None:
    assert read_sampling(inference_pb2.SamplingParams()) == SamplingParams()
    assert read_sampling(sampling_message(SamplingParams())) == SamplingParams()


def test_zero_is_not_absent() -> None:
    zeros = inference_pb2.SamplingParams(
        max_tokens=0, temperature=0, top_p=0, seed=0, repetition_penalty=0, logprobs=0, prompt_logprobs=0
    )
    found = read_sampling(zeros)
    assert (found.max_tokens, found.temperature, found.top_p, found.seed) == (0, 0, 0, 0)
    assert (found.repetition_penalty, found.logprobs, found.prompt_logprobs) == (0, 0, 0)


def test_log_probabilities_survive_the_wire() -> None:
    found = read_logprobs(
        logprobs_messages([TokenLogprobs(7, -0.5, ((7, -0.5), (9, -1.25))), TokenLogprobs(8, -3.0)])
    )
    assert found == (TokenLogprobs(7, -0.5, ((7, -0.5), (9, -1.25))), TokenLogprobs(8, -3.0))
    assert found[0].logprob == pytest.approx(-0.5)
