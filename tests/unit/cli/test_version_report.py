import json

from adaptermesh.cli.tables import short_digest
from tests.unit.cli.conftest import Invoke, Publish, document

CARD = """---
language: [en, de]
datasets: conll2003
model-index:
- results:
  - task: {type: ner}
    dataset: {type: conll2003, split: test}
    metrics: [{type: f1, value: 0.91}]
---
# Names

Finds \x1b[31mnames.
"""


def test_show_renders_card_metrics_and_status(publish: Publish, invoke: Invoke) -> None:
    ref = publish(card=CARD)
    shown = invoke("adapters", "show", ref).stdout
    for words in ("active", "en, de", "conll2003", "ner", "test", "f1", "0.91", "# Names\n\nFinds "):
        assert words in shown
    assert "\x1b" not in shown
    assert "model-index" not in shown
    details = document(invoke("adapters", "show", ref, "--json"))
    assert details["card"] == CARD
    assert details["manifest"]["metrics"][0]["value"] == 0.91
    assert details["parents"] == []


def test_show_names_the_parents_and_how_they_were_merged(publish: Publish, invoke: Invoke) -> None:
    first, second = publish(seed=1), publish(seed=2)
    merged = invoke("adapters", "merge", "acme/both", f"{first}=0.7", f"{second}=0.3")
    assert merged.exit_code == 0, merged.output
    invoke("adapters", "revoke", second, "--reason", "bad data")
    shown = invoke("adapters", "show", "acme/both:v1").stdout
    digests = [document(invoke("adapters", "show", ref, "--json")) for ref in (first, second)]
    one, other = (short_digest(details["version"]["digest"]) for details in digests)
    assert f"acme/ner:v1 {one}" in shown
    assert f"acme/ner:v2 (revoked) {other}" in shown
    assert "linear of 0.7 * " in shown
    parents = document(invoke("adapters", "show", "acme/both:v1", "--json"))["parents"]
    assert [parent["ref"] for parent in parents] == [first, second]
    assert parents[1]["status"]["reason"] == "bad data"


def test_a_version_without_a_card_is_shown_too(publish: Publish, invoke: Invoke) -> None:
    shown = invoke("adapters", "show", publish(card=""))
    assert shown.exit_code == 0
    assert json.loads(invoke("adapters", "show", "acme/ner:v1", "--json").stdout)["card"] == ""
