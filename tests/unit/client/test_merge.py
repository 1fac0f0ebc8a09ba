"""Merging against a real store: members fetched and verified, the result published with its parents."""

import asyncio
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.client import Code, Merge, MeshError, Progress, Publication, Reason, StoreClient
from adaptermesh.client.canonical_form import receive_canonical
from tests.unit.store.conftest import (
    BASE_NAME,
    base_model,
    make_files,
    make_tensors,
    running_store,
    store_config,
)

Change = npt.NDArray[np.float64]
OTHER = "other-llama"


@dataclass
class Published:
    """A client of a store that has two adapters on one base and one on another."""

    client: StoreClient
    root: Path

    async def upload(self, name: str, base: str = BASE_NAME, **config: Any) -> None:
        folder = self.root / name
        folder.mkdir()
        for path, data in make_files(**config).items():
            (folder / path).write_bytes(data)
        publication = Publication(base, task="ner", license="mit")
        await self.client.upload(folder, f"acme/{name}", publication)

    async def changes(self, ref: str) -> list[Change]:
        """s B A of each module."""
        digest = (await self.client.resolve(ref)).version.digest
        place = self.root / "fetched"
        manifest = Manifest.from_bytes(await self.client.fetch(digest, place))
        entries = {entry.name: entry for entry in manifest.tensors}
        with place.open("rb") as file:
            return [
                op.scale
                * (
                    tensor_from_file(entries[op.tensors["B"]], file).astype(np.float64)
                    @ tensor_from_file(entries[op.tensors["A"]], file)
                )
                for op in manifest.modules
            ]


@pytest.fixture
async def published(tmp_path: Path) -> AsyncIterator[Published]:
    async with running_store(store_config(tmp_path / "store")) as store:
        for base in (base_model(), base_model(OTHER, "others")):
            await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base))
        async with StoreClient(store.target) as client:
            found = Published(client, tmp_path)
            await found.upload("one", seed=1)
            await found.upload("two", seed=2, rank=3)
            await found.upload("far", OTHER, seed=3)
            yield found


async def test_a_merge_becomes_a_version_with_parents_and_recipe(published: Published) -> None:
    client = published.client
    seen: list[Progress] = []
    modules: list[tuple[int, int]] = []
    merged = await client.merge(
        "acme/both",
        Merge((("acme/one:v1", 1.0), ("acme/two:v1", -0.5))),
        progress=seen.append,
        on_module=lambda done, of: modules.append((done, of)),
    )
    assert (merged.version.ref, merged.created, merged.max_rank) == ("acme/both:v1", True, 5)
    assert (merged.version.task, merged.version.license) == ("ner", "mit")
    assert merged.version.warnings == ()
    assert (merged.kept, merged.modules, modules) == (1.0, 3, [(1, 3), (2, 3), (3, 3)])
    assert {progress.path for progress in seen} >= {"member-0.safetensors", "adapter_model.safetensors"}

    one, two = [(await client.resolve(f"acme/{name}:v1")).version.digest for name in ("one", "two")]
    assert [(member.ref, member.digest, member.weight) for member in merged.members] == [
        ("acme/one:v1", one, 1.0),
        ("acme/two:v1", two, -0.5),
    ]
    manifest = Manifest.from_bytes((await client.resolve("acme/both:v1")).manifest)
    assert manifest.parents == (one, two)
    assert manifest.merge_recipe is not None
    assert manifest.merge_recipe["method"] == "linear"
    found = await published.changes("acme/both:v1")
    sources = [await published.changes(f"acme/{name}:v1") for name in ("one", "two")]
    for change, first, second in zip(found, *sources, strict=True):
        np.testing.assert_allclose(change, first - 0.5 * second, atol=1e-5)


async def test_the_same_merge_again_is_the_same_version_and_another_weight_is_not(
    published: Published,
) -> None:
    merge = Merge((("acme/one:v1", 1.0), ("acme/two:v1", 1.0)), "dare", rank=4, density=0.5, seed=3)
    first = await published.client.merge("acme/both", merge)
    again = await published.client.merge("acme/both", merge)
    assert (again.version, again.created) == (first.version, False)
    other = Merge((("acme/one:v1", 1.0), ("acme/two:v1", 0.9)), "dare", rank=4, density=0.5, seed=3)
    assert (await published.client.merge("acme/both", other)).version.number == 2


async def test_a_dare_without_a_seed_says_which_one_it_took(published: Published) -> None:
    merge = Merge((("acme/one:v1", 1.0),), "dare", rank=4, density=0.5)
    assert (await published.client.merge("acme/thin", merge)).seed == 0


async def test_a_cut_says_what_it_left(published: Published) -> None:
    merge = Merge((("acme/one:v1", 1.0), ("acme/two:v1", 1.0)), "svd", rank=2)
    merged = await published.client.merge("acme/both", merge)
    assert (merged.max_rank, merged.version.max_rank) == (2, 2)
    assert 0.3 < merged.least_kept <= merged.kept < 1
    assert merged.least_kept_module.endswith("self_attn.q_proj")


async def test_a_check_publishes_nothing(published: Published) -> None:
    merge = Merge((("acme/one:v1", 1.0),), "average")
    checked = await published.client.merge("acme/both", merge, validate_only=True)
    assert not checked.created
    with pytest.raises(MeshError) as caught:
        await published.client.resolve("acme/both:v1")
    assert caught.value.reason is Reason.ADAPTER_NOT_FOUND


async def test_a_weight_of_zero_leaves_its_member_out_of_the_parents(published: Published) -> None:
    merged = await published.client.merge("acme/both", Merge((("acme/one:v1", 2.0), ("acme/two:v1", 0.0))))
    assert [member.ref for member in merged.members] == ["acme/one:v1"]


@pytest.mark.parametrize(
    ("merge", "code", "reason", "words"),
    [
        (Merge((("acme/nobody:v1", 1.0),)), Code.NOT_FOUND, Reason.ADAPTER_NOT_FOUND, "acme/nobody"),
        (
            Merge((("acme/one:v1", 1.0), ("acme/far:v1", 1.0))),
            Code.FAILED_PRECONDITION,
            Reason.BASE_MISMATCH,
            "acme/far:v1",
        ),
        (Merge(()), Code.INVALID_ARGUMENT, Reason.INVALID_FIELD, "nothing to merge"),
        (
            Merge((("acme/one:v1", 1.0),), "magic"),
            Code.INVALID_ARGUMENT,
            Reason.INVALID_FIELD,
            "'magic' is none of linear, average, svd, ties, dare",
        ),
        (Merge((("acme/one:v1", 1.0),), "svd"), Code.INVALID_ARGUMENT, Reason.INVALID_FIELD, "needs a rank"),
        (
            Merge((("acme/one:v1", 1.0), ("acme/one:v1", 1.0))),
            Code.INVALID_ARGUMENT,
            Reason.INVALID_FIELD,
            "twice",
        ),
    ],
)
async def test_what_can_not_be_merged_is_refused_with_the_reason(
    published: Published, merge: Merge, code: Code, reason: Reason, words: str
) -> None:
    with pytest.raises(MeshError) as caught:
        await published.client.merge("acme/both", merge)
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert words in caught.value.message


async def test_a_member_with_another_op_is_refused_before_anything_is_fetched(published: Published) -> None:
    tensors = make_tensors(5)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        bias = name.replace("lora_B.weight", "lora_B.bias")
        tensors[bias] = np.ones(len(tensors[name]), np.float32)
    await published.upload("biased", tensors=tensors, lora_bias=True)
    seen: list[Progress] = []
    with pytest.raises(
        MeshError, match=r"'acme/biased:v1' can't be merged: it has the op 'affine'"
    ) as caught:
        await published.client.merge("acme/both", Merge((("acme/biased:v1", 1.0),)), progress=seen.append)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    assert seen == []


async def messages(manifest: bytes, *pieces: bytes) -> AsyncIterator[store_pb2.FetchAdapterResponse]:
    yield store_pb2.FetchAdapterResponse(manifest=manifest)
    for piece in pieces:
        yield store_pb2.FetchAdapterResponse(data=piece)


async def test_tensors_are_verified_as_they_arrive(published: Published, tmp_path: Path) -> None:
    resolved = await published.client.resolve("acme/one:v1")
    digest, manifest = resolved.version.digest, resolved.manifest
    place, copy = tmp_path / "a", tmp_path / "b"
    assert await published.client.fetch(digest, place) == manifest
    data = place.read_bytes()
    # Messages may end anywhere.
    pieces = [data[start : start + 1000] for start in range(0, len(data), 1000)]
    await receive_canonical(messages(manifest, *pieces), digest, copy, None)
    assert copy.read_bytes() == data
    for broken in (
        messages(manifest, data[:-1] + bytes([data[-1] ^ 1])),
        messages(manifest, data[:-1]),
        messages(manifest, data, b"x"),
        messages(manifest),
        messages(manifest.replace(b"acme", b"acmf"), data),
    ):
        with pytest.raises(MeshError) as caught:
            await receive_canonical(broken, digest, copy, None)
        assert caught.value.reason is Reason.DATA_CORRUPT


async def test_fetching_what_is_not_there_is_not_found(published: Published, tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        await published.client.fetch("sha256:" + "0" * 64, tmp_path / "a")
    assert caught.value.reason is Reason.VERSION_NOT_FOUND


async def test_a_merge_that_is_given_up_ends_after_its_module_and_leaves_nothing(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tmp_path / "places"
    places.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places))
    loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    heard: list[int] = []

    def on_module(done: int, of: int) -> None:
        heard.append(done)
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(30)

    plan = Merge((("acme/one:v1", 1.0),))
    merging = asyncio.create_task(published.client.merge("acme/both", plan, on_module=on_module))
    await begun.wait()
    merging.cancel()
    for _ in range(5):
        # It hears of it, and waits for its thread.
        await asyncio.sleep(0)
    assert not merging.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await merging
    assert heard == [1]
    assert list(places.iterdir()) == []


def test_merging_needs_nothing_that_only_the_store_has() -> None:
    code = "import sys; sys.modules['re2'] = None; import adaptermesh.client.merging"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_client_needs_numpy_for_merging_only() -> None:
    code = "import sys; sys.modules['numpy'] = None; import adaptermesh.client, adaptermesh.cli.app"
    subprocess.run([sys.executable, "-c", code], check=True)
