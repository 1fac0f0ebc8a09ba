import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Invoke, document


def line(trace_id: str, span_id: str, start_ns: int, **fields: object) -> str:
    record: dict[str, object] = {
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": "",
        "name": "gateway.request",
        "kind": "server",
        "service": "gateway",
        "instance": "1",
        "start_ns": start_ns,
        "end_ns": start_ns + 5_000_000,
        "attributes": {"adaptermesh.adapter.version": "acme/ner:v1", "adaptermesh.switch.kind": "cold"},
        "links": [],
        "status": "unset",
        "status_message": "",
    }
    return json.dumps(record | fields) + "\n"


@pytest.fixture(autouse=True)
def _traces(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "traces"
    folder.mkdir(parents=True)
    (folder / "gateway-1.jsonl").write_text(
        line("aa" * 16, "01", 10**18) + line("ab" * 16, "02", 2 * 10**18, status="error")
    )


def test_traces_are_listed_newest_first(invoke: Invoke) -> None:
    result = invoke("trace", "ls")
    assert result.exit_code == 0, result.output
    _, newest, oldest = result.stdout.splitlines()
    assert newest.startswith("abababababab")
    assert "failed" in newest
    assert "acme/ner:v1" in oldest
    (trace,) = document(invoke("trace", "ls", "-n", "1", "--json"))["traces"]
    assert trace["trace_id"] == "ab" * 16


def test_a_trace_is_shown_by_the_first_digits_of_its_id(invoke: Invoke) -> None:
    result = invoke("trace", "show", "aaa")
    assert result.exit_code == 0, result.output
    assert "switch cold" in result.stdout
    assert "━" in result.stdout
    assert "adaptermesh.switch.kind = cold" in invoke("trace", "show", "aaa", "-a").stdout
    assert document(invoke("trace", "show", "aaa", "--json"))["spans"][0]["span_id"] == "01"


def test_an_unknown_or_ambiguous_id_is_an_error(invoke: Invoke) -> None:
    assert "trace 'ff' does not exist" in invoke("trace", "show", "ff").stderr
    result = invoke("trace", "show", "a")
    assert result.exit_code == 1
    assert "give more digits" in result.stderr


def test_another_folder_of_traces_may_be_named(invoke: Invoke, tmp_path: Path) -> None:
    for options in (("--traces", str(tmp_path)), ("--home", str(tmp_path / "other"))):
        result = invoke("trace", "ls", *options)
        assert result.exit_code == 0
        assert "no traces in" in result.stdout
