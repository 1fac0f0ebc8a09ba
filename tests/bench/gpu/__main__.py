"""`python -m tests.bench.gpu`: measures the engine on a card; writes docs/benchmarks/gpu.json and gpu.md."""

import argparse
import gc
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.figures import ratio
from tests.bench.gpu.engine_lanes import EngineLanes, copied_bytes_per_second
from tests.bench.gpu.peft_lanes import PeftLanes
from tests.bench.gpu.shape import LLAMA_8B, TINY, Shape, write_shape
from tests.bench.machine import busy_cores, describe_commit
from tests.bench.report import merge, page, record, today
from tests.bench.result import Lane, Result

_ROOT = Path(__file__).parents[3]
_CACHE = _ROOT / ".cache" / "bench"
_INTRODUCTION = """# Benchmarks on a GPU

Made by `make bench-gpu`; the numbers behind these tables are in `gpu.json`. The model has the shape of Llama
3.1 8B and random weights, which changes no time. Decodes are counted while all rows decode, without their
prompts. The bound is what a decode step reads at least (matrices, adapters, contexts) at the speed at which a
copy on this card moves bytes, in the same run. A figure is the median over the rounds, with its quartiles in
brackets.
"""
_ORDER = ("decode", "first_token", "peft")
_TITLES = {
    "decode": "Decodes of many rows, the base alone and every row with an adapter of its own",
    "first_token": "The first token of a long prompt, its adapter on the device or in host memory",
    "peft": "transformers and peft beside it",
}


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("there is no CUDA card here; to try the harness: --tiny --device cpu", file=sys.stderr)
        return 2
    shape = TINY if options.tiny else LLAMA_8B
    # Figures that mean nothing stay out of the documents.
    out = options.out or (_CACHE / "tiny" if options.tiny else _ROOT / "docs" / "benchmarks")
    folder = write_shape(shape, options.cache)
    found = _engine(shape, folder, options)
    if "peft" not in options.without:
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
        found["peft"] = _peft(shape, folder, options, found["decode"])
    report = {name: record(result, _about(name, shape, options)) for name, result in found.items()}
    merged = merge(out / "gpu.json", _machine(options.device), report, _ORDER)
    (out / "gpu.md").write_text(page(_INTRODUCTION, _machine_line(options.device), merged))
    for result in found.values():
        for figure in result.figures:
            print(f"{figure.name}: {figure.spread.median:.3f}", flush=True)
    return 0


def _engine(shape: Shape, folder: Path, options: argparse.Namespace) -> dict[str, Result]:
    lanes = EngineLanes(shape, folder, options.cache, options.device, options.attention)
    start = time.monotonic()
    lanes.warm()
    print(f"warm after {time.monotonic() - start:.1f} s; attention: {lanes.attention}", flush=True)
    rounds = range(options.rounds)
    moved = [copied_bytes_per_second(options.device, shape.copy_bytes) for _ in rounds]
    base = [lanes.decode(mixed=False) for _ in rounds]
    mixed = [lanes.decode(mixed=True) for _ in rounds]
    bounds = {
        is_mixed: [shape.rows * speed / lanes.decode_bytes(mixed=is_mixed) for speed in moved]
        for is_mixed in (False, True)
    }
    versions = {"adaptermesh": {**_versions("torch", "triton", "transformers"), "attention": lanes.attention}}
    decode = Result(
        (
            ratio("base decode / memory bound", base, bounds[False]),
            ratio("mixed decode / memory bound", mixed, bounds[True]),
            ratio("mixed decode / base decode", mixed, base),
        ),
        (
            _lane("copy on the card", "GB/s", [speed / 1e9 for speed in moved]),
            _lane("memory bound, base", "tok/s", bounds[False]),
            _lane("base", "tok/s", base),
            _lane("memory bound, mixed", "tok/s", bounds[True]),
            _lane("mixed", "tok/s", mixed),
        ),
        versions=versions,
    )
    first = _first_token(lanes, rounds, versions)
    lanes.close()
    return {"decode": decode, "first_token": first}


def _first_token(lanes: EngineLanes, rounds: range, versions: dict[str, dict[str, str]]) -> Result:
    resident_name = "a000#0"
    bare: list[float] = []
    resident: list[float] = []
    copied: list[float] = []
    for _ in rounds:
        bare.append(lanes.first_token(None))
        resident.append(lanes.first_token(resident_name))
        copied.append(lanes.first_token_after_copy())
    size = lanes.adapter_bytes / 1e6
    return Result(
        (
            ratio("first token, adapter copied / resident", copied, resident, at_most=True),
            ratio("first token, adapter resident / base", resident, bare, at_most=True),
        ),
        (
            _lane("base", "ms", bare),
            _lane("adapter on the device", "ms", resident),
            _lane(f"adapter of {size:.0f} MB in host memory", "ms", copied),
        ),
        versions=versions,
    )


def _peft(shape: Shape, folder: Path, options: argparse.Namespace, ours: Result) -> Result:
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    lanes = PeftLanes(shape, str(folder), options.device, dtype)
    rounds = range(options.rounds)
    lanes.decode(mixed=False)
    bare = [lanes.decode(mixed=False) for _ in rounds]
    lanes.attach()
    lanes.decode(mixed=True)
    mixed = [lanes.decode(mixed=True) for _ in rounds]
    values = {lane.name: lane.values for lane in ours.lanes}
    return Result(
        (
            ratio("base decode / transformers generate", values["base"], bare),
            ratio("mixed decode / peft adapter_names", values["mixed"], mixed),
        ),
        (
            _lane("transformers generate", "tok/s", bare),
            _lane("peft adapter_names", "tok/s", mixed),
        ),
        versions={"peft": _versions("peft", "transformers", "torch")},
    )


def _lane(name: str, unit: str, values: list[float]) -> Lane:
    return Lane(name, unit, tuple(values))


def _about(name: str, shape: Shape, options: argparse.Namespace) -> dict[str, object]:
    about = {
        "decode": f"{shape.rows} rows of {shape.prompt_tokens} + {shape.output_tokens} tokens, greedy; "
        f"{shape.adapters} adapters of rank {shape.rank} on all seven projections, in turn.",
        "first_token": f"A prompt of {shape.long_prompt} tokens alone, to its first token. The adapter in "
        "host memory is one that the device has not seen; its copy and the prompt run side by side.",
        "peft": f"The same rows by `generate`, {shape.peft_tokens} tokens each; adapters by `adapter_names`.",
    }
    return {
        "title": _TITLES[name],
        "about": about[name],
        "date": today(),
        "commit": describe_commit(_ROOT),
        "rounds": options.rounds,
        "busy_cores": busy_cores(1.0),
    }


def _machine(device: str) -> dict[str, object]:
    where: dict[str, object] = {"python": platform.python_version(), "system": platform.system()}
    if device == "cpu":
        return {"card": "none", **where}
    facts = torch.cuda.get_device_properties(device)
    return {
        "card": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        **where,
    }


def _machine_line(device: str) -> str:
    return "Card: " + ", ".join(f"{name} {value}" for name, value in _machine(device).items()) + "."


def _versions(*names: str) -> dict[str, str]:
    found: Callable[[str], str] = importlib.metadata.version
    versions = {}
    for name in names:
        try:
            versions[name] = found(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the harness")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the harness")
    parser.add_argument("--attention", default="auto", help="the engine's `attention`")
    parser.add_argument("--without", nargs="*", default=[], choices=["peft"], help="what to leave out")
    parser.add_argument("--cache", type=Path, default=_CACHE / "gpu")
    parser.add_argument("--out", type=Path, default=None)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
