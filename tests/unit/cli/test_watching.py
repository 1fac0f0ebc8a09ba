"""`adapters watch` against a real store."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.unit.cli.conftest import Invoke, Publish


def test_each_change_is_a_line(publish: Publish, invoke: Invoke) -> None:
    publish(seed=1), publish("acme/other", seed=2)
    invoke("alias", "set", "acme/ner@prod", "v1", "--actor", "ada", "-m", "first")
    invoke("adapters", "deprecate", "acme/ner:v1", "--reason", "old")
    everything = invoke("adapters", "watch", "--after", "0", "--once")
    assert everything.exit_code == 0
    kinds = [line.split()[3] for line in everything.stdout.splitlines()]
    published = ["version_published", "version_published"]
    assert kinds == ["base_model_registered", *published, "alias_set", "version_status_set"]
    assert "acme/ner@prod -> v1 by ada: first" in everything.stdout
    assert "acme/ner:v1 deprecated: old" in everything.stdout


def test_programs_get_one_object_a_line(publish: Publish, invoke: Invoke) -> None:
    publish()
    lines = invoke("adapters", "watch", "--after", "1", "--once", "--json").stdout.splitlines()
    (change,) = map(json.loads, lines)
    assert (change["position"], change["kind"]) == (2, "version_published")
    assert change["record"]["ref"] == "acme/ner:v1"
    assert change["time"].startswith("20")


def test_only_what_was_asked_for_is_shown(publish: Publish, invoke: Invoke) -> None:
    publish("acme/ner", seed=1), publish("acme/other", seed=2), publish("shop/ner", seed=3)
    invoke("alias", "set", "acme/ner@prod", "v1")

    def shown(*options: str) -> int:
        return len(invoke("adapters", "watch", *options, "--after", "0", "--once").stdout.splitlines())

    assert shown() == 5
    assert shown("acme") == 3
    assert shown("acme/ner") == 2
    assert shown("acme/ner", "--kind", "alias_set") == 1
    assert shown("--kind", "alias_set", "--kind", "version_published") == 4
    assert shown("nobody") == 0


def test_a_watch_from_now_on_begins_with_nothing_and_one_from_a_snapshot_with_all(
    publish: Publish, invoke: Invoke
) -> None:
    publish()
    assert invoke("adapters", "watch", "--once").stdout == ""
    shown = invoke("adapters", "watch", "--from-snapshot", "--once").stdout.splitlines()
    assert [line.split()[1] for line in shown] == ["base_model_registered", "version_published"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "everything"), "'everything' is none of"),
        (("--from-snapshot", "--after", "1"), "--from-snapshot begins"),
        (("--after", "-1"), "Invalid value"),
        (("Bad Name",), "Invalid value"),
    ],
)
def test_what_can_not_be_meant_is_a_usage_error(invoke: Invoke, options: tuple[str, ...], words: str) -> None:
    result = invoke("adapters", "watch", *options)
    assert (result.exit_code, words in result.stderr) == (2, True)


def test_a_position_that_is_gone_or_not_yet_there_is_an_error(publish: Publish, invoke: Invoke) -> None:
    publish()
    result = invoke("adapters", "watch", "--after", "99")
    assert (result.exit_code, "FEED_POSITION_EXPIRED" in result.stderr) == (1, True)
    assert "--from-snapshot" in result.stderr


def test_a_watch_ends_when_it_is_interrupted(publish: Publish) -> None:
    publish()
    command = [sys.executable, "-m", "adaptermesh.cli", "adapters", "watch", "--after", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert json.loads(lines[1])["kind"] == "version_published"
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (130, b"", b"")
