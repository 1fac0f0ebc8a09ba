import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.gateway.request import Caller, ChatTurn, Target
from adaptermesh.gateway.validation import read_caller, read_generate

CALLER = Caller("req-1", "default", Target())


def chat(*turns: tuple[str, str]) -> inference_pb2.Chat:
    return inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    )


def sampling(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="x", sampling=inference_pb2.SamplingParams(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("input", inference_pb2.GenerateRequest()),
        ("text", inference_pb2.GenerateRequest(text="")),
        ("text", inference_pb2.GenerateRequest(text="x" * (2**20 + 1))),
        ("text", inference_pb2.GenerateRequest(text="é" * (2**19 + 1))),
        ("chat.messages", inference_pb2.GenerateRequest(chat=chat())),
        ("chat.messages", inference_pb2.GenerateRequest(chat=chat(*[("user", "x")] * 1025))),
        ("chat.messages", inference_pb2.GenerateRequest(chat=chat(("user", "")))),
        ("chat.messages", inference_pb2.GenerateRequest(chat=chat(*[("user", "x" * 2**19)] * 3))),
        ("chat.messages[1].role", inference_pb2.GenerateRequest(chat=chat(("user", "x"), ("robot", "y")))),
        ("chat.messages[0].role", inference_pb2.GenerateRequest(chat=chat(("", "x")))),
        ("token_ids.ids", inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds())),
        ("token_ids.ids", inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1] * 131073))),
        ("token_ids.ids[1]", inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1, -1]))),
        ("base_model", inference_pb2.GenerateRequest(text="x", base_model="b" * 257)),
        ("sampling.max_tokens", sampling(max_tokens=0)),
        ("sampling.max_tokens", sampling(max_tokens=131073)),
        ("sampling.temperature", sampling(temperature=-0.1)),
        ("sampling.temperature", sampling(temperature=2.1)),
        ("sampling.temperature", sampling(temperature=float("nan"))),
        ("sampling.top_p", sampling(top_p=0.0)),
        ("sampling.top_p", sampling(top_p=1.01)),
        ("sampling.top_k", sampling(top_k=-1)),
        ("sampling.seed", sampling(seed=-1)),
        ("sampling.stop", sampling(stop=["x"] * 17)),
        ("sampling.stop", sampling(stop=[""])),
        ("sampling.stop", sampling(stop=["x" * 257])),
        ("sampling.min_p", sampling(min_p=1.5)),
        ("sampling.repetition_penalty", sampling(repetition_penalty=0.0)),
        ("sampling.presence_penalty", sampling(presence_penalty=-2.5)),
        ("sampling.frequency_penalty", sampling(frequency_penalty=2.5)),
        ("sampling.stop_token_ids", sampling(stop_token_ids=[-1])),
        ("sampling.stop_token_ids", sampling(stop_token_ids=[1] * 65)),
        ("sampling.logprobs", sampling(logprobs=21)),
        ("sampling.prompt_logprobs", sampling(prompt_logprobs=21)),
        ("sampling.prompt_logprobs", sampling(prompt_logprobs=-1)),
        ("n", inference_pb2.GenerateRequest(text="x", n=9)),
        ("n", inference_pb2.GenerateRequest(text="x", n=-1)),
        ("priority", inference_pb2.GenerateRequest(text="x", priority=101)),
        ("priority", inference_pb2.GenerateRequest(text="x", priority=-101)),
    ],
)
def test_a_bad_field_is_named(field: str, request_: inference_pb2.GenerateRequest) -> None:
    with pytest.raises(MeshError) as caught:
        read_generate(request_, CALLER)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field


def test_the_largest_inputs_are_taken() -> None:
    assert read_generate(inference_pb2.GenerateRequest(text="x" * 2**20), CALLER).prompt.text == "x" * 2**20
    many = inference_pb2.GenerateRequest(chat=chat(*[("user", "x")] * 1024))
    assert len(read_generate(many, CALLER).prompt.chat or ()) == 1024


def test_absent_sampling_means_the_defaults() -> None:
    assert read_generate(inference_pb2.GenerateRequest(text="x"), CALLER).sampling == SamplingParams()


def test_zero_is_not_absent() -> None:
    assert read_generate(sampling(temperature=0.0), CALLER).sampling.temperature == 0.0
    assert read_generate(sampling(seed=0), CALLER).sampling.seed == 0


def test_a_conversation_keeps_its_order_and_empty_turns() -> None:
    request = inference_pb2.GenerateRequest(chat=chat(("system", ""), ("user", "a"), ("assistant", "b")))
    prompt = read_generate(request, CALLER).prompt
    assert prompt.chat == (ChatTurn("system", ""), ChatTurn("user", "a"), ChatTurn("assistant", "b"))
    assert prompt.operation == "chat"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("x-request-id", "a b", Reason.INVALID_FIELD),
        ("x-request-id", "a" * 129, Reason.INVALID_FIELD),
        ("x-tenant-id", "Acme", Reason.INVALID_NAME),
        ("x-model-task", "financial ner", Reason.INVALID_NAME),
        ("x-model-task", "-ner", Reason.INVALID_NAME),
        ("x-model-task", "n" * 64, Reason.INVALID_NAME),
        ("x-cohort-key", "c" * 257, Reason.INVALID_FIELD),
        ("x-adapter-id", "no-slash", Reason.INVALID_REF),
        ("x-adapter-id", "acme/ner:3", Reason.INVALID_REF),
        ("x-adapter-id", "acme/ner@sha256:12", Reason.INVALID_REF),
        ("x-adapter-id", "Acme/ner", Reason.INVALID_NAME),
        ("x-adapter-id", "acme/" + "n" * 300, Reason.INVALID_REF),
        ("x-feed-position", "-1", Reason.INVALID_FIELD),
        ("x-feed-position", "1e3", Reason.INVALID_FIELD),
        ("x-feed-position", "9" * 19, Reason.INVALID_FIELD),
    ],
)
def test_bad_metadata_is_named(key: str, value: str, reason: Reason) -> None:
    with pytest.raises(MeshError) as caught:
        read_caller({key: value}, "req-1")
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.reason is reason
    assert caught.value.metadata["field"] == key


@pytest.mark.parametrize(
    ("metadata", "target", "asked"),
    [
        ({}, Target(), "base"),
        ({"x-model-task": "ner"}, Target(task="ner"), "ner"),
        ({"x-adapter-id": "base"}, Target(ref="base"), "base"),
        ({"x-adapter-id": "acme/ner"}, Target(ref="acme/ner"), "acme/ner"),
        ({"x-model-task": "ner", "x-adapter-id": "base"}, Target(ref="base"), "base"),
        (
            {"x-model-task": "ner", "x-adapter-id": "acme/ner@p"},
            Target(ref="acme/ner@p"),
            "acme/ner@p",
        ),
    ],
)
def test_metadata_selects_the_target(metadata: dict[str, str], target: Target, asked: str) -> None:
    caller = read_caller(metadata, "req-1")
    assert caller.target == target
    assert caller.target.asked == asked


def test_a_task_is_checked_even_where_a_ref_overrides_it() -> None:
    with pytest.raises(MeshError, match="x-model-task"):
        read_caller({"x-model-task": "BAD", "x-adapter-id": "base"}, "req-1")


KEYS = st.sampled_from(["x-tenant-id", "x-model-task", "x-adapter-id", "x-feed-position"])


@given(st.dictionaries(KEYS, st.text()))
def test_metadata_is_taken_or_refused_and_never_a_crash(metadata: dict[str, str]) -> None:
    try:
        read_caller(metadata, "req-1")
    except MeshError as error:
        assert error.code is Code.INVALID_ARGUMENT
