"""Adapters merged and published with the mesh running, then served."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.client import Code, Merge, MeshError, Reason
from adaptermesh.testing import Rig

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="session")]

ONE, TWO = "demo/pirate:v1", "demo/text-to-sql:v1"
PROMPT = "How is the weather today?"

Changes = dict[tuple[str, int], npt.NDArray[np.float32]]


async def changes(rig: Rig, ref: str, place: Path) -> Changes:
    """s B A at each site of each layer."""
    digest = (await rig.store.resolve(ref)).version.digest
    manifest = Manifest.from_bytes(await rig.store.fetch(digest, place))
    entries = {entry.name: entry for entry in manifest.tensors}
    found: Changes = {}
    with place.open("rb") as file:
        for op in manifest.modules:
            a, b = (tensor_from_file(entries[op.tensors[slot]], file) for slot in ("A", "B"))
            found[op.site, op.layer] = np.float32(op.scale) * (b @ a)
    return found


async def test_a_merge_of_two_is_published_with_its_parents_and_served(rig: Rig, tmp_path: Path) -> None:
    merged = await rig.store.merge("merged/both", Merge(((ONE, 0.5), (TWO, 0.25))))
    manifest = Manifest.from_bytes((await rig.store.resolve(merged.version.ref)).manifest)
    assert manifest.parents == tuple([(await rig.store.resolve(ref)).version.digest for ref in (ONE, TWO)])
    assert manifest.merge_recipe is not None
    assert [member["weight"] for member in manifest.merge_recipe["members"]] == [0.5, 0.25]

    found, one, two = [
        await changes(rig, ref, tmp_path / str(index))
        for index, ref in enumerate((merged.version.ref, ONE, TWO))
    ]
    assert found.keys() == one.keys() | two.keys()
    for site, change in found.items():
        nothing = np.zeros_like(change)
        expected = np.float32(0.5) * one.get(site, nothing) + np.float32(0.25) * two.get(site, nothing)
        np.testing.assert_allclose(change, expected, atol=1e-6 * max(1.0, float(np.abs(expected).max())))

    answer = await rig.generate(PROMPT, adapter=merged.version.ref, position=merged.feed_position)
    assert (answer.version, answer.digest) == (merged.version.ref, merged.version.digest)


async def test_the_average_of_one_answers_as_it_does(rig: Rig) -> None:
    merged = await rig.store.merge("merged/same", Merge(((ONE, 1.0),), "average"))
    expected = await rig.generate(PROMPT, adapter=ONE)
    answer = await rig.generate(PROMPT, adapter=merged.version.ref, position=merged.feed_position)
    assert answer.version != expected.version
    assert answer.token_ids == expected.token_ids


async def test_what_a_merge_is_made_of_must_be_there(rig: Rig) -> None:
    with pytest.raises(MeshError) as caught:
        await rig.store.merge("merged/none", Merge(((ONE, 1.0), ("demo/pirate:v99", 1.0))))
    assert (caught.value.code, caught.value.reason) == (Code.NOT_FOUND, Reason.VERSION_NOT_FOUND)
