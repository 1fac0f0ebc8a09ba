"""The parts of the benchmark harness that decide what its tables say."""

from pathlib import Path

from tests.bench.figures import Figure, Spread, percentile, ratio
from tests.bench.report import markdown, merge, record
from tests.bench.result import Lane, Result, compare
from tests.bench.scenarios.decode_bound import decode_step
from tests.bench.workload import Prompts, Scale, copy_name, cycled, weights_of, zipf

MACHINE = {
    "cpu": "a CPU",
    "cpu_family_model_stepping": "1/2/3",
    "flags": ["avx2"],
    "cores": 2,
    "memory_gib": 4.0,
    "system": "Linux",
    "python": "3.11",
}
ABOUT = {"title": "T", "about": "A", "date": "2026-01-01", "commit": "", "rounds": 3, "busy_cores": 0.0}


def test_a_ratio_is_taken_within_each_round_before_the_median() -> None:
    figure = ratio("f", [10.0, 30.0, 20.0], [10.0, 10.0, 10.0], 2.0)
    assert figure.spread == Spread(2.0, 1.5, 2.5)
    assert figure.reached is True


def test_a_figure_at_most_is_reached_from_below_only() -> None:
    assert ratio("f", [1.0], [1.0], 1.02, at_most=True).reached is True
    assert ratio("f", [1.1], [1.0], 1.02, at_most=True).reached is False
    assert ratio("f", [1.0], [1.0]).reached is None


def test_the_99th_percentile_of_few_values_is_the_largest() -> None:
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile(list(range(1, 201)), 99) == 198


def test_answers_are_compared_up_to_the_shorter_one_and_an_empty_one_differs() -> None:
    check = compare("a", "b", [([1, 2, 3], [1, 2]), ([1, 2], [1, 9]), ([], [1])])
    assert (check.compared, check.different, check.first_differences) == (3, 2, (1, 0))


def test_prompts_are_the_same_for_every_peer_and_new_in_each_round() -> None:
    prompts = Prompts(vocab_size=100, tokens=8)
    assert prompts.draw("x", 1, [None, "a000"]) == prompts.draw("x", 1, [None, "a000"])
    assert prompts.draw("x", 1, [None]) != prompts.draw("x", 2, [None])
    assert prompts.draw("x", 1, [None]) != prompts.draw("y", 1, [None])


def test_registered_adapters_beyond_the_files_repeat_their_weights_under_other_names() -> None:
    names = [copy_name(index, files=64) for index in range(1000)]
    assert len(set(names)) == 1000
    assert {weights_of(name) for name in names} == set(cycled(64, 64))


def test_popular_adapters_are_asked_for_more_often() -> None:
    drawn = zipf(20_000, registered=1000, files=64, round_number=0)
    assert drawn.count("a000") > 1.5 * drawn.count("a001") > drawn.count("a003") > 0


def test_the_decode_step_is_taken_from_the_request_that_began_last() -> None:
    early, late = [0.1, 0.9, 1.0, 1.1], [0.8, 0.9, 1.0, 1.2]
    assert round(decode_step({"times": [early, late]}), 6) == 0.1


def test_scenarios_measured_apart_share_a_report_unless_the_machine_changed(tmp_path: Path) -> None:
    figure = Figure("f", Spread(1.0, 0.9, 1.1), 0.5)
    entry = record(Result((figure,), (Lane("l", "tok/s", (1.0, 2.0, 3.0)),)), ABOUT)
    file = tmp_path / "out" / "cpu.json"
    order = ("one", "two")
    merge(file, MACHINE, {"two": entry}, order)
    report = merge(file, MACHINE, {"one": entry}, order)
    assert list(report["scenarios"]) == ["one", "two"]
    assert "| f | **1** (0.9 to 1.1) | at least 0.5 | yes |" in markdown(report, file.name)
    assert list(merge(file, {**MACHINE, "cores": 3}, {"two": entry}, order)["scenarios"]) == ["two"]


def test_the_standard_workload_is_that_of_the_table() -> None:
    scale = Scale()
    assert (scale.rows, scale.prompt_tokens, scale.output_tokens, scale.adapters) == (16, 64, 64, 8)
    assert (scale.many_rows, scale.registered, scale.slots) == (64, 1000, 64)
