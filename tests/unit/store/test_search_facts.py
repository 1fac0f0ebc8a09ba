from adaptermesh.store.search_facts import MAX_SCORES, SearchFacts, search_facts


def entry(task: str, metric: str, value: float | None) -> dict[str, object]:
    return {"task": task, "dataset": "", "split": "", "metric": metric, "value": value}


def test_of_several_results_of_a_metric_the_first_one_counts_for_it_and_for_its_task() -> None:
    metrics = [
        entry("", "f1", None),
        entry("ner", "accuracy", 0.5),
        entry("qa", "accuracy", 1),
        entry("qa", "accuracy", 2.0),
        entry("", "loss", 3.0),
    ]
    assert search_facts(["en", "de", "en"], metrics) == SearchFacts(
        ("en", "de"), {"accuracy": 0.5, "ner/accuracy": 0.5, "qa/accuracy": 1.0, "loss": 3.0}
    )


def test_scores_are_bounded_in_number_and_length() -> None:
    found = search_facts([], [entry("", str(number), 1.0) for number in range(300)])
    assert len(found.scores) == MAX_SCORES
    assert search_facts([], [entry("t" * 200, "m", 1.0)]).scores == {"m": 1.0}
