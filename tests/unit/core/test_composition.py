"""The expressions of compositions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.composition import (
    AVERAGE,
    FUSE,
    MAX_MEMBERS,
    STACK,
    Composition,
    Group,
    Leaf,
    composition_digest,
    fusions,
    is_composition,
    leaves,
    parse_composition,
    renamed,
)
from adaptermesh.core.errors import Code, MeshError, Reason

weights = st.one_of(st.just(1.0), st.floats(0.001, 1000.0))
refs = st.sampled_from(["a/b:v1", "a/c@prod", "x/y"])
leaf = st.builds(Leaf, refs, weights)
fuse = st.builds(Group, st.just(FUSE), st.lists(refs.map(Leaf), min_size=2, max_size=4).map(tuple), weights)
trees = st.recursive(
    leaf | fuse,
    lambda members: st.builds(
        Group,
        st.sampled_from([STACK, AVERAGE]),
        st.lists(members, min_size=1, max_size=3).map(tuple),
        weights,
    ),
    max_leaves=6,
)


def depth(tree: Composition) -> int:
    return 0 if isinstance(tree, Leaf) else 1 + max(depth(member) for member in tree.members)


@given(trees.filter(lambda tree: depth(tree) <= 4 and len(list(leaves(tree))) <= MAX_MEMBERS))
def test_what_is_written_is_read_back(tree: Composition) -> None:
    assert parse_composition(str(tree)) == tree
    spaced = str(tree).replace(",", " , ").replace("(", " ( ").replace("*", " * ") + "  "
    assert parse_composition(spaced) == tree
    assert is_composition(str(tree)) == (isinstance(tree, Group) or tree.weight != 1.0)


@given(st.text(alphabet="ab/:v1@(),* .-5e", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        tree = parse_composition(text)
    except MeshError as error:
        assert error.code is Code.INVALID_ARGUMENT
    else:
        assert parse_composition(str(tree)) == tree


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "ends too early"),
        ("stack()", "a name is missing before"),
        ("stack(a/b:v1", "not closed"),
        ("stack(a/b:v1,)", "a name is missing"),
        ("stack(a/b:v1) a/c:v1", "comes after its end"),
        ("fusion(a/b:v1)", "none of stack, average, fuse"),
        ("fuse(a/b:v1)", "first a fusion and then the adapters"),
        ("fuse(a/b:v1, stack(a/c:v1, a/d:v1))", "holds names only"),
        ("fuse(2*a/b:v1, a/c:v1)", "has no weights"),
        ("fuse(a/b:v1, a/c:v1, 0.5*a/d:v1)", r"0\.5\*fuse"),
        ("x*a/b:v1", "not a weight"),
        ("nan*a/b:v1", "not a weight"),
        ("1e9*a/b:v1", "not a weight"),
        ("2**a/b:v1", "a name is missing"),
        ("average(0*a/b:v1, a/c:v1)", "above 0"),
        ("average(-1*a/b:v1, a/c:v1)", "above 0"),
        ("stack(" + ",".join(["a/b:v1"] * 17) + ")", "more than 16"),
        ("stack(" * 6 + "a/b:v1" + ")" * 6, "deep"),
        ("(" * 9000, "characters"),
    ],
)
def test_what_is_no_composition_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        parse_composition(text)
    assert caught.value.reason is Reason.INVALID_REF


def test_its_names_are_refs() -> None:
    with pytest.raises(MeshError, match="not a legal name"):
        parse_composition("stack(A/b:v1)")


def test_the_digest_covers_tree_weights_and_members() -> None:
    texts = [
        "stack(a/b:v1,a/c:v1)",
        "stack(a/c:v1,a/b:v1)",
        "average(a/b:v1,a/c:v1)",
        "stack(a/b:v1,0.5*a/c:v1)",
        "0.5*stack(a/b:v1,a/c:v1)",
        "stack(a/b:v1,stack(a/c:v1))",
        "fuse(a/b:v1,a/c:v1)",
        "0.5*fuse(a/b:v1,a/c:v1)",
    ]
    assert len({composition_digest(parse_composition(text)) for text in texts}) == len(texts)
    spelt = parse_composition("stack( 1.0*a/b:v1, a/c:v1 )")
    assert composition_digest(spelt) == composition_digest(parse_composition(texts[0]))


def test_renamed_keeps_everything_else() -> None:
    tree = parse_composition("average(2*a/b:v1,stack(a/c:v1,a/b:v1))")
    assert str(renamed(tree, str.upper)) == "average(2.0*A/B:V1,stack(A/C:V1,A/B:V1))"
    assert [one.name for one in leaves(tree)] == ["a/b:v1", "a/c:v1", "a/b:v1"]


def test_the_fusions_are_what_stands_first_in_a_fuse() -> None:
    tree = parse_composition("stack(fuse(a/f:v1,a/b:v1,a/c:v1),average(a/b:v1,2*fuse(a/g:v1,a/b:v1)))")
    assert [one.name for one in fusions(tree)] == ["a/f:v1", "a/g:v1"]
    assert list(fusions(parse_composition("stack(a/b:v1)"))) == []
