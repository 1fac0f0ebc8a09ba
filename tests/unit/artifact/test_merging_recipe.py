import json
from typing import Any

import pytest

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.merging_recipe import (
    MAX_PARENTS,
    MergeMethod,
    MergeRecipe,
    check_lineage,
    recipe_of,
)
from adaptermesh.core.digests import canonical_json
from adaptermesh.core.errors import Code, MeshError, Reason

ONE, TWO, THREE = (f"sha256:{digit * 64}" for digit in "123")
VALUE: dict[str, Any] = {
    "method": "ties",
    "members": [{"digest": ONE, "weight": 1.0}, {"digest": TWO, "weight": -0.5}],
    "rank": 8,
    "density": 0.25,
    "seed": None,
}


def refusal(value: dict[str, Any]) -> str:
    with pytest.raises(MeshError) as caught:
        MergeRecipe.from_json(json.dumps(value))
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_FIELD)
    return caught.value.message


def test_a_recipe_reads_back_equal() -> None:
    recipe = MergeRecipe.from_json(json.dumps(VALUE))
    assert recipe.to_json() == VALUE
    assert MergeRecipe.from_json(canonical_json(recipe.to_json())) == recipe


def test_what_is_null_may_be_left_out_and_a_weight_may_be_an_integer() -> None:
    value = {"method": "linear", "members": [{"digest": ONE, "weight": 2}]}
    assert MergeRecipe.from_json(json.dumps(value)).to_json() == {
        "method": "linear",
        "members": [{"digest": ONE, "weight": 2.0}],
        "rank": None,
        "density": None,
        "seed": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"members": []}, "1 to 32"),
        ({"members": [{"digest": f"sha256:{n:064x}", "weight": 1} for n in range(33)]}, "1 to 32"),
        ({"members": [{"digest": "x", "weight": 1}]}, "not a digest"),
        ({"members": [{"digest": ONE, "weight": 1}] * 2}, "twice"),
        ({"members": [{"digest": ONE, "weight": 0}]}, "other than 0"),
        ({"members": [{"digest": ONE, "weight": float("nan")}]}, "other than 0"),
        ({"members": [{"digest": ONE, "weight": 1e7}]}, "other than 0"),
        ({"members": [{"digest": ONE, "weight": "1"}]}, "weight"),
        ({"members": [{"digest": ONE, "weight": 1, "name": "a"}]}, "members.0.name"),
        ({"method": "average", "rank": None, "density": None}, "negative"),
        ({"method": "linear", "density": None}, "linear takes no rank"),
        ({"method": "svd"}, "svd takes no density"),
        ({"seed": 1}, "ties takes no seed"),
        ({"rank": None}, "ties needs a rank"),
        ({"density": None}, "ties needs a density"),
        ({"method": "dare"}, "dare needs a seed"),
        ({"rank": 0}, "[1, 4096]"),
        ({"rank": 4097}, "[1, 4096]"),
        ({"rank": 1.5}, "rank"),
        ({"density": 0.0}, "(0, 1]"),
        ({"density": 1.01}, "(0, 1]"),
        ({"method": "dare", "seed": -1}, "[0, 4294967295]"),
        ({"method": "dare", "seed": 2**32}, "[0, 4294967295]"),
        ({"more": 1}, "more"),
        ({"more": "x" * 20_000}, "at most 16384"),
    ],
)
def test_a_recipe_that_can_not_be_followed_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal({**VALUE, **changes})


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"method":"linear"}', "[" * 10_000])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(MeshError, match="merge_recipe"):
        MergeRecipe.from_json(text)


def test_a_weight_of_zero_drops_its_member() -> None:
    recipe = recipe_of(MergeMethod.LINEAR, [(ONE, 1.0), (TWO, 0.0), (THREE, -1.0)])
    assert [member.digest for member in recipe.members] == [ONE, THREE]
    with pytest.raises(MeshError, match="nothing to merge"):
        recipe_of(MergeMethod.LINEAR, [(ONE, 0.0)])


def test_the_weights_of_an_average_add_up_to_1_and_the_others_stand() -> None:
    members = [(ONE, 1.0), (TWO, 3.0)]
    assert recipe_of(MergeMethod.AVERAGE, members).weights == (0.25, 0.75)
    assert recipe_of(MergeMethod.LINEAR, members).weights == (1.0, 3.0)


def test_members_must_be_among_the_parents() -> None:
    recipe = recipe_of(MergeMethod.LINEAR, [(ONE, 1.0), (TWO, 1.0)])
    check_lineage((THREE, TWO, ONE), recipe)
    check_lineage((THREE,), None)
    with pytest.raises(MeshError, match="none of the parents"):
        check_lineage((ONE,), recipe)
    with pytest.raises(MeshError, match="twice"):
        check_lineage((ONE, ONE), None)
    with pytest.raises(MeshError, match="at most 32"):
        check_lineage([f"sha256:{n:064x}" for n in range(MAX_PARENTS + 1)], None)


def test_an_ingest_keeps_parents_and_recipe_in_the_manifest_and_the_digest(folder: Any) -> None:
    plain = folder.fill().ingest().manifest
    assert (plain.parents, plain.merge_recipe) == ((), None)
    recipe = recipe_of(MergeMethod.AVERAGE, [(ONE, 1), (TWO, 0.5)])
    folder.bundle |= {"parents": (ONE, TWO), "merge_recipe": recipe}
    merged = folder.ingest().manifest
    assert merged.parents == (ONE, TWO)
    assert merged.merge_recipe == recipe.to_json()
    assert merged.digest != plain.digest
    assert Manifest.from_bytes(merged.to_bytes()) == merged


@pytest.mark.parametrize(
    ("parents", "message"), [((ONE,), "none of the parents"), (("x",), "not a digest"), ((), "none of")]
)
def test_an_ingest_with_parents_that_can_not_be_is_refused(
    folder: Any, parents: tuple[str, ...], message: str
) -> None:
    recipe = recipe_of(MergeMethod.AVERAGE, [(ONE, 1.0), (TWO, 0.5)])
    folder.fill().bundle |= {"parents": parents, "merge_recipe": recipe}
    with pytest.raises(MeshError, match=message) as caught:
        folder.ingest()
    assert caught.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parents": [ONE]}, "none of the parents"),
        ({"parents": [ONE, TWO, ONE]}, "twice"),
        ({"merge_recipe": {**VALUE, "rank": 0}}, "rank"),
        ({"merge_recipe": {**VALUE, "more": 1}}, "more"),
        ({"merge_recipe": {key: VALUE[key] for key in VALUE if key != "seed"}}, "canonical spelling"),
        ({"merge_recipe": {**VALUE, "members": [{"digest": ONE, "weight": 1}]}}, "canonical spelling"),
        ({"merge_recipe": {}}, "method"),
    ],
)
def test_a_manifest_with_a_wrong_lineage_is_corrupt(
    folder: Any, changes: dict[str, Any], message: str
) -> None:
    value = json.loads(folder.fill().ingest().manifest.to_bytes())
    value |= {"parents": [ONE, TWO], "merge_recipe": VALUE}
    Manifest.from_bytes(canonical_json(value))
    with pytest.raises(MeshError, match=message) as caught:
        Manifest.from_bytes(canonical_json({**value, **changes}))
    assert caught.value.reason is Reason.DATA_CORRUPT
