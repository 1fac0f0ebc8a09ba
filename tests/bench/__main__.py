"""`python -m tests.bench`: measures the scenarios and writes docs/benchmarks/cpu.json and cpu.md."""

import argparse
import sys
import time
from pathlib import Path

from tests.bench.bench import Bench, Settings
from tests.bench.environments import KINDS, SetupError
from tests.bench.machine import busy_cores, describe_commit, describe_machine
from tests.bench.peer import ROOT
from tests.bench.report import markdown, merge, record, today
from tests.bench.scenarios.table import SCENARIOS
from tests.bench.workload import TINY, Scale

_CACHE = ROOT / ".cache" / "bench"
_OUT = ROOT / "docs" / "benchmarks"
# Figures that mean nothing stay out of the documents.
_TINY_OUT = _CACHE / "tiny"
_QUIET_CORES = 0.1


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    settings = Settings(
        model=options.model,
        cache=_CACHE,
        rounds=options.rounds,
        scale=TINY if options.tiny else Scale(),
        without=frozenset(options.without),
    )
    bench = Bench(settings)
    for name in options.scenarios or SCENARIOS:
        _measure(bench, name, options.out or (_TINY_OUT if options.tiny else _OUT))
    return 0


def _measure(bench: Bench, name: str, out: Path) -> None:
    """Runs one scenario and writes its results at once: a later one that fails takes nothing along."""
    scenario, busy = SCENARIOS[name], busy_cores()
    print(f"{name}: {scenario.title}", flush=True)
    if busy > _QUIET_CORES:
        print(f"  {busy} cores are busy with other work, which blurs the figures", flush=True)
    start = time.monotonic()
    result = scenario.run(bench)
    about = {
        "title": scenario.title,
        "about": scenario.about,
        "bound": scenario.bound,
        "date": today(),
        "commit": describe_commit(ROOT),
        "rounds": bench.settings.rounds,
        "busy_cores": busy,
        "seconds": round(time.monotonic() - start),
    }
    file = out / "cpu.json"
    report = merge(file, describe_machine(), {name: record(result, about)}, tuple(SCENARIOS))
    (out / "cpu.md").write_text(markdown(report, file.name))
    for figure in result.figures:
        reached = {True: "reached", False: "not reached", None: "no target"}[figure.reached]
        print(f"  {figure.name}: {figure.spread.median:.3f} ({reached})", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--scenarios", nargs="+", choices=SCENARIOS, metavar="NAME", help=", ".join(SCENARIOS)
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is measured (5)")
    parser.add_argument("--out", type=Path, help="folder of the results (docs/benchmarks)")
    parser.add_argument(
        "--model", type=Path, default=Path.home() / ".adaptermesh/models/smollm2-135m-instruct"
    )
    parser.add_argument("--without", nargs="+", choices=KINDS, default=[], help="peers to leave out")
    parser.add_argument("--tiny", action="store_true", help="a few tokens only, to try the harness")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        sys.exit(f"error: {error}")
