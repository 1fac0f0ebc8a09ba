"""The results as JSON, and as a Markdown table made from it."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.figures import Figure
from tests.bench.result import Check, Lane, Result

_INTRODUCTION = """# Benchmarks on a CPU

Made by `make bench`; the numbers behind these tables are in `{json}`. Each scenario measures all that it
compares in one run, in turns, one process at a time. A figure is the median over the rounds, with its
quartiles in brackets; a ratio is taken within each round. Every prompt is new to every program.
"""


def record(result: Result, about: dict[str, Any]) -> dict[str, Any]:
    """One scenario as JSON. `about`: title, about, bound, date, commit, rounds, busy_cores, seconds."""
    return {
        **about,
        "left_out": list(result.left_out),
        "figures": [_figure(figure) for figure in result.figures],
        "lanes": [_lane(lane) for lane in result.lanes],
        "checks": [_check(check) for check in result.checks],
        "versions": result.versions,
    }


def merge(
    file: Path, machine: dict[str, Any], entries: dict[str, dict[str, Any]], order: Sequence[str]
) -> dict[str, Any]:
    """Puts scenarios among those measured before on the same machine, and writes the file."""
    before = json.loads(file.read_text()) if file.exists() else {}
    found = {**(before.get("scenarios", {}) if before.get("machine") == machine else {}), **entries}
    report = {"machine": machine, "scenarios": {name: found[name] for name in order if name in found}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def markdown(report: dict[str, Any], json_name: str) -> str:
    """The page of the CPU."""
    machine = report["machine"]
    line = (
        f"Machine: {machine['cpu']} (family/model/stepping {machine['cpu_family_model_stepping']}), "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}; of its instruction sets: {', '.join(machine['flags'])}."
    )
    return page(_INTRODUCTION.format(json=json_name), line, report)


def page(introduction: str, machine: str, report: dict[str, Any]) -> str:
    """A page: all figures first, then each scenario's lanes and checks."""
    parts = [introduction, f"{machine}\n", _figures_table(report)]
    parts += [_section(entry) for entry in report["scenarios"].values()]
    return "\n".join(parts)


def _figures_table(report: dict[str, Any]) -> str:
    lines = ["| figure | measured | target | reached |", "|---|---|---|---|"]
    for entry in report["scenarios"].values():
        for figure in entry["figures"]:
            spread = (
                f"**{_number(figure['median'])}** ({_number(figure['low'])} to {_number(figure['high'])})"
            )
            unit = "" if figure["unit"] == "ratio" else f" {figure['unit']}"
            lines.append(f"| {figure['name']} | {spread}{unit} | {_target(figure)} | {_reached(figure)} |")
    return "\n".join(lines) + "\n"


def _target(figure: dict[str, Any]) -> str:
    if figure["target"] is None:
        return ""
    bound = "at most" if figure["at_most"] else "at least"
    return f"{'aim: ' if figure['aim'] else ''}{bound} {figure['target']:g}"


def _reached(figure: dict[str, Any]) -> str:
    return {True: "yes", False: "no", None: ""}[figure["reached"]]


def _section(entry: dict[str, Any]) -> str:
    lines = [
        f"## {entry['title']}",
        "",
        f"{entry['about']}",
        "",
        f"{entry['date']}, commit {entry['commit'] or 'unknown'}, {entry['rounds']} rounds, "
        f"{entry['busy_cores']} cores busy with other work before it.",
        "",
        "| measured | median | quartiles |",
        "|---|---|---|",
    ]
    lines += [
        f"| {lane['name']} | {_number(lane['median'])} {lane['unit']} "
        f"| {_number(lane['low'])} to {_number(lane['high'])} |"
        for lane in entry["lanes"]
    ]
    lines.append("")
    if any(figure["reached"] is False for figure in entry["figures"]) and entry.get("bound"):
        lines += [f"What holds it back: {entry['bound']}", ""]
    lines += [_check_line(check) for check in entry["checks"]]
    if entry["left_out"]:
        lines.append(f"- Left out: {', '.join(entry['left_out'])}.")
    lines += [f"- {name}: {_versions(versions)}" for name, versions in entry["versions"].items()]
    return "\n".join(lines) + "\n"


def _check_line(check: dict[str, Any]) -> str:
    where = ""
    if check["different"]:
        where = f" (first difference at token {', '.join(str(at) for at in check['first_differences'][:8])})"
    return (
        f"- Tokens of {check['ours']} and {check['theirs']}: "
        f"{check['different']} of {check['compared']} answers differ{where}."
    )


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _figure(figure: Figure) -> dict[str, Any]:
    fields = asdict(figure)
    return {**fields.pop("spread"), **fields, "reached": figure.reached}


def _lane(lane: Lane) -> dict[str, Any]:
    return {"name": lane.name, "unit": lane.unit, **asdict(lane.spread), "values": lane.values}


def _check(check: Check) -> dict[str, Any]:
    return {**asdict(check), "different": check.different}
