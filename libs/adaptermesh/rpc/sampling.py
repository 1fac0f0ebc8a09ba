"""Sampling parameters and log probabilities on the wire: the same for client, gateway and worker."""

from collections.abc import Iterable

from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams


def sampling_message(params: SamplingParams) -> inference_pb2.SamplingParams:
    """The message, every value spelt out."""
    return inference_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        stop=params.stop,
        ignore_eos=params.ignore_eos,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def read_sampling(message: inference_pb2.SamplingParams) -> SamplingParams:
    """The parameters, unchecked; an absent field has its default."""
    default = SamplingParams()
    has = message.HasField
    return SamplingParams(
        max_tokens=message.max_tokens if has("max_tokens") else default.max_tokens,
        temperature=message.temperature if has("temperature") else default.temperature,
        top_p=message.top_p if has("top_p") else default.top_p,
        top_k=message.top_k,
        seed=message.seed if has("seed") else None,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty if has("repetition_penalty") else default.repetition_penalty
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if has("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if has("prompt_logprobs") else None,
    )


def logprobs_messages(logprobs: Iterable[TokenLogprobs]) -> list[inference_pb2.TokenLogprobs]:
    return [
        inference_pb2.TokenLogprobs(
            token_id=token.token_id,
            logprob=token.logprob,
            top=[inference_pb2.TopLogprob(token_id=other, logprob=value) for other, value in token.top],
        )
        for token in logprobs
    ]


def read_logprobs(messages: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            message.token_id,
            message.logprob,
            tuple((other.token_id, other.logprob) for other in message.top),
        )
        for message in messages
    )
