import json

import pytest

from adaptermesh.client import Code, MeshError, Reason
from tests.unit.cli.conftest import FakeMesh, Invoke


def test_text_is_printed_as_it_comes_and_nothing_else(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("generate", "--task", "pirate", "Hello")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Aye, aye!\n"
    assert result.stderr == ""


def test_verbose_shows_what_served_the_request(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("generate", "--task", "pirate", "Hello", "-v")
    assert result.stdout == "Aye, aye!\n"
    for word in (
        "demo/pirate:v1 aaaaaaaaaaaa",
        "cold, from store",
        "w-1",
        "fetch 10.0 ms (4.0 KiB)",
        "0af7651916cd",
    ):
        assert word in result.stderr


def test_verbose_says_what_the_prefix_cache_had(fakes: FakeMesh, invoke: Invoke) -> None:
    assert "7 in, 3 out" in invoke("generate", "Hello", "-v").stderr
    fakes.gateway.cached_tokens = 4
    assert "7 in (4 of them from the prefix cache), 3 out" in invoke("generate", "Hello", "-v").stderr
    last = invoke("generate", "Hello", "--json").stdout.splitlines()[-1]
    assert json.loads(last)["cached_tokens"] == 4


def test_verbose_warns_of_what_is_deprecated(fakes: FakeMesh, invoke: Invoke) -> None:
    fakes.gateway.warnings = ["acme/ner:v1 is deprecated; use acme/ner:v2"]
    assert fakes.gateway.warnings[0] in invoke("generate", "--adapter", "acme/ner:v1", "Hello", "-v").stderr
    first = invoke("generate", "--adapter", "acme/ner:v1", "Hello", "--json").stdout.splitlines()[0]
    assert json.loads(first)["warnings"] == fakes.gateway.warnings


def test_json_prints_one_line_for_each_event(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("generate", "--adapter", "acme/ner:v1", "Hello", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["started", "delta", "delta", "delta", "finished"]
    assert (events[0]["adapter_version"], events[0]["switch_kind"]) == ("acme/ner:v1", "cold")
    assert events[1]["text"] == "Aye, "
    assert events[4]["timings"]["fetch"] == 0.01


def test_options_reach_the_request(fakes: FakeMesh, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERMESH_TENANT", "acme")
    sampling = ("--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "3", "--seed", "7")
    result = invoke("generate", "-", "--system", "Be brief.", *sampling, "--stop", ";", input="from stdin")
    assert result.exit_code == 0, result.output
    request, sent = fakes.gateway.requests[0], fakes.gateway.metadata[0]
    assert [message.content for message in request.chat.messages] == ["Be brief.", "from stdin"]
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (5, 0.5, 7)
    assert list(request.sampling.stop) == [";"]
    assert sent["x-tenant-id"] == "acme"
    invoke("generate", "Once", "--raw")
    assert fakes.gateway.requests[1].text == "Once"


def test_every_sampling_option_reaches_the_request(fakes: FakeMesh, invoke: Invoke) -> None:
    penalties = ("--repetition-penalty", "1.5", "--presence-penalty", "-1", "--frequency-penalty", "0.5")
    ends = ("--stop-token-id", "3", "--stop-token-id", "4", "--min-p", "0.25")
    result = invoke("generate", "Hello", *penalties, *ends, "--logprobs", "1", "--priority", "-5", "--json")
    assert result.exit_code == 0, result.output
    request = fakes.gateway.requests[0]
    sampling = request.sampling
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -1)
    assert sampling.frequency_penalty == 0.5
    assert (list(sampling.stop_token_ids), sampling.min_p, sampling.logprobs) == ([3, 4], 0.25, 1)
    assert request.priority == -5
    delta = json.loads(result.stdout.splitlines()[1])
    assert delta["logprobs"] == [{"token_id": 0, "logprob": -1.0, "top": [[0, -1.0]]}]


def test_log_probabilities_of_the_prompt_are_lines_of_their_own(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("generate", "Hello", "--prompt-logprobs", "1", "--json")
    assert result.exit_code == 0, result.output
    assert fakes.gateway.requests[0].sampling.prompt_logprobs == 1
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events][:4] == [
        "started",
        "prompt_logprobs",
        "prompt_logprobs",
        "delta",
    ]
    assert events[1]["logprobs"] == [{"token_id": 4, "logprob": -2.0, "top": [[4, -2.0]]}]


def test_several_answers_are_printed_one_after_the_other(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("generate", "Hello", "--n", "2")
    assert result.stdout == "[0] Aye, aye!\n[1] Aye, aye!\n"
    events = [
        json.loads(line) for line in invoke("generate", "Hello", "--n", "2", "--json").stdout.splitlines()
    ]
    assert [event["index"] for event in events if event["event"] == "choice_finished"] == [0, 1]


def test_a_refusal_names_reason_request_and_hint(fakes: FakeMesh, invoke: Invoke) -> None:
    fakes.gateway.refuse = MeshError(
        Code.NOT_FOUND, Reason.TASK_NOT_FOUND, "task 'x' does not exist", metadata={"request_id": "r-1"}
    )
    result = invoke("generate", "--task", "x", "Hello")
    assert result.exit_code == 1
    assert "error: task 'x' does not exist" in result.stderr
    assert "reason: TASK_NOT_FOUND (NOT_FOUND)  request: r-1" in result.stderr
    assert "routes ls" in result.stderr


def test_a_lost_worker_says_to_send_the_request_again(fakes: FakeMesh, invoke: Invoke) -> None:
    fakes.gateway.fail_after = 1
    result = invoke("generate", "Hello")
    assert result.exit_code == 1
    assert result.stdout == "Aye, "
    assert "error: the worker is gone" in result.stderr
    assert "send the request again" in result.stderr


def test_a_mesh_that_does_not_run_is_named_with_the_command_that_starts_one(invoke: Invoke) -> None:
    result = invoke("generate", "Hello", "--gateway", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "error: nothing answers at 127.0.0.1:1" in result.stderr
    assert "hint: start one with `adaptermesh up`" in result.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--temperature", "3"),
        ("--raw", "--system", "x"),
        ("--max-tokens", "no"),
        ("--logprobs", "1"),
        ("--prompt-logprobs", "1"),
    ],
)
def test_wrong_options_are_usage_errors(invoke: Invoke, wrong: tuple[str, ...]) -> None:
    assert invoke("generate", "Hello", *wrong).exit_code == 2


def test_a_wrong_environment_is_a_usage_error(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "wide")
    result = invoke("adapters", "ls")
    assert result.exit_code == 2
    assert "environment" in result.stderr
