import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.card import MAX_DEPTH, MAX_METRICS, CardFacts, card_facts
from adaptermesh.artifact.card_text import split_card
from adaptermesh.core.digests import canonical_json

CARD = """---
license: apache-2.0
language:
- en
- no
tags: [finance, ner, "base_model:adapter:/home/me/model"]
datasets: conll2003
metrics:
- f1
- accuracy
model-index:
- name: ner
  results:
  - task: {type: token-classification, name: Token classification}
    dataset: {type: conll2003, name: CoNLL 2003, split: test}
    metrics:
    - {type: f1, value: 0.91}
    - {name: exact match, value: 1e-1}
---
# Names

Finds names.
"""


def test_a_card_says_license_languages_tags_data_and_metrics_by_task_and_split() -> None:
    place = {"task": "token-classification", "dataset": "conll2003", "split": "test"}
    nowhere = {"task": "", "dataset": "", "split": ""}
    assert card_facts(CARD) == CardFacts(
        license="apache-2.0",
        languages=("en", "no"),
        tags=("finance", "ner"),
        training_data=({"name": "conll2003"},),
        metrics=(
            {**place, "metric": "f1", "value": 0.91},
            {**place, "metric": "exact match", "value": 0.1},
            {**nowhere, "metric": "accuracy", "value": None},
        ),
    )


@pytest.mark.parametrize("text", ["", "# Names", "---\n---\nNames", "----\n", "a\n---\nb: c\n---\n"])
def test_a_card_without_front_matter_says_nothing(text: str) -> None:
    assert card_facts(text) == CardFacts()


def test_a_card_is_split_into_front_matter_and_text() -> None:
    front, body = split_card(CARD)
    assert front.startswith("\nlicense: apache-2.0")
    assert body.strip() == "# Names\n\nFinds names."


@pytest.mark.parametrize(
    ("front", "why"),
    [
        ("a: [", "expected"),
        ("- a", "not a list of keys and values"),
        ("a: &x [1]\nb: *x", "refers to another part"),
        ("tags: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nests deeper"),
        ("[" * 50_000, "nests deeper"),
        ("a: " + "x" * 70_000, "bytes"),
        ("a: [" + "x," * 20_000 + "]", "parts"),
        ("a: \x01", "special characters"),
    ],
)
def test_front_matter_that_can_not_be_read_is_warned_of_and_left_out(front: str, why: str) -> None:
    facts = card_facts(f"---\n{front}\n---\nNames")
    assert facts == CardFacts(warnings=facts.warnings)
    assert why in facts.warnings[0]


def test_what_names_code_is_only_text() -> None:
    facts = card_facts("---\nlicense: !!python/object/apply:os.system ['echo no']\ntags: [a]\n---\n")
    assert (facts.license, facts.tags) == ("echo no", ("a",))


def test_values_that_do_not_fit_are_counted() -> None:
    results = "[{metrics: [{type: f1, value: .nan}, {type: f1, value: 95%}, {value: 1}, 7]}, no]"
    facts = card_facts(f"---\ntags: [a, a, {'b' * 65}]\nmodel-index: [{{results: {results}}}]\n---\n")
    assert (facts.tags, facts.metrics) == (("a",), ())
    assert facts.warnings == (
        "the card's 'tags': 1 of its values are not taken",
        "the card's 'model-index': 5 of its values are not taken",
    )


def test_no_card_fills_a_manifest() -> None:
    metrics = ", ".join(f"{{type: m{n}, value: {n}}}" for n in range(MAX_METRICS + 3))
    facts = card_facts(f"---\nmodel-index: [{{results: [{{metrics: [{metrics}]}}]}}]\n---\n")
    assert len(facts.metrics) == MAX_METRICS
    assert facts.warnings


@given(st.text(alphabet="ab:-[]{}&*!|>\"' \n\t#,?1.", max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_reading_and_all_it_gives_is_json(text: str) -> None:
    facts = card_facts(f"---\n{text}\nmodel-index: {text}\n---\n")
    canonical_json([list(facts.metrics), list(facts.training_data), list(facts.tags)])
