"""A process that uploads or downloads large adapters with the SDK, some at once."""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.client import Publication, StoreClient
from adaptermesh.core.errors import MeshError, Reason

BASE_NAME = "large"
_HIDDEN = 2048
_LAYERS = 8
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
_WEIGHTS = "adapter_model.safetensors"
_RANK_BYTES = 2 * _HIDDEN * 4 * len(_MODULES) * _LAYERS
"""Of all tensors together, for each unit of rank."""
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": _HIDDEN,
    "intermediate_size": 2 * _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 64,
}


def base_facts() -> BaseFacts:
    """The base that such adapters are for."""
    return BaseFacts.from_config(BASE_NAME, _CONFIG, f"sha256:{'a' * 64}")


def write_adapter(folder: Path, size_bytes: int, seed: int) -> None:
    """An adapter as peft saves it, of about that size."""
    rank = max(1, size_bytes // _RANK_BYTES)
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in range(_LAYERS):
        for module in _MODULES:
            path = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{path}.lora_A.weight"] = draw.standard_normal((rank, _HIDDEN), np.float32)
            tensors[f"{path}.lora_B.weight"] = draw.standard_normal((_HIDDEN, rank), np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / _WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": _MODULES, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does: `count` transfers at once."""

    kind: str
    """"upload" or "download"."""
    target: str
    size_bytes: int
    count: int
    seed: int
    """Each seed is other content; uploads take those from here on, a download takes the version of this."""


@contextlib.contextmanager
def running(job: Job) -> Iterator["subprocess.Popen[str]"]:
    """A process that gets ready, says so in a line, and begins when it is sent one."""
    arguments = (job.kind, job.target, str(job.size_bytes), str(job.count), str(job.seed))
    command = [sys.executable, "-m", "tests.bench.peers.transfer_client", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


async def run(job: Job) -> None:
    """All of it, in this process."""
    with tempfile.TemporaryDirectory(prefix="adaptermesh-bench-") as folder:
        sources = [Path(folder) / f"source-{job.seed + index}" for index in range(job.count)]
        if job.kind == "upload":
            for index, source in enumerate(sources):
                write_adapter(source, job.size_bytes, job.seed + index)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        async with asyncio.TaskGroup() as group:
            for index, source in enumerate(sources):
                one = (
                    _upload(job, source, job.seed + index) if job.kind == "upload" else _download(job, source)
                )
                group.create_task(one)
        print("done", flush=True)


async def _upload(job: Job, source: Path, seed: int) -> None:
    """Again whenever the store is full and says so."""
    async with StoreClient(job.target) as store:
        while True:
            try:
                await store.upload(source, f"bench/{name_of(seed)}", Publication(BASE_NAME))
                return
            except MeshError as error:
                if error.reason is not Reason.OVERLOADED:
                    raise
                await asyncio.sleep(error.retry_after or 1.0)


async def _download(job: Job, place: Path) -> None:
    async with StoreClient(job.target) as store:
        await store.download(f"bench/{name_of(job.seed)}:v1", place)


def name_of(seed: int) -> str:
    """An adapter's name."""
    return f"large-{seed}"


if __name__ == "__main__":
    kind, target, *numbers = sys.argv[1:]
    asyncio.run(run(Job(kind, target, *map(int, numbers))))
