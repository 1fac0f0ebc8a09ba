"""The README's commands, run as they stand there against a running mesh."""

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from adaptermesh.testing import Rig

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADAPTERS = ROOT / "deploy" / "demo" / "adapters"


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("adaptermesh ")]


def environment(rig: Rig) -> dict[str, str]:
    ends = rig.mesh.endpoints
    return {
        **os.environ,
        "ADAPTERMESH_GATEWAY": ends.gateway,
        "ADAPTERMESH_ROUTER": ends.router,
        "ADAPTERMESH_STORE": ends.store,
        "ADAPTERMESH_HOME": str(rig.mesh.config.home),
    }


async def run(rig: Rig, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=environment(rig),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_every_command_of_the_readme_works_in_its_order(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "my-adapter").symlink_to(ADAPTERS / "pirate-v1")
    seen = set()
    for command in commands():
        words = shlex.split(command, comments=True)[1:]
        words = [str(tmp_path / word) if word.startswith("./") else word for word in words]
        if words[0] == "rollback":
            # "after a later version disappoints"
            v2 = ["adapters", "upload", str(ADAPTERS / "text-to-sql-v1"), "acme/my-task"]
            assert (await run(rig, "-m", "adaptermesh.cli", *v2, "--base", rig.base_model))[0] == 0
            assert (await run(rig, "-m", "adaptermesh.cli", "alias", "set", words[1], "v2"))[0] == 0
        code, output = await run(rig, "-m", "adaptermesh.cli", *words)
        assert code == 0, f"{command}\n{output}"
        seen.add(words[0])
    assert {"status", "generate", "trace", "adapters", "alias", "routes", "rollback"} <= seen
    assert (await rig.store.resolve("acme/my-task@prod")).version.number == 1


async def test_the_python_example_of_the_readme_works(rig: Rig) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code, output = await run(rig, "-c", example.replace("127.0.0.1:7700", rig.mesh.endpoints.gateway))
    assert code == 0, output
    assert "demo/financial-ner:v1" in output
