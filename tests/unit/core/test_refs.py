import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.digests import canonical_json, digest_bytes, digest_json, is_digest
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.core.refs import NAME_PATTERN, AdapterName, Ref, parse_ref

NAMES = st.from_regex(NAME_PATTERN, fullmatch=True)
DIGEST = digest_bytes(b"x")


@given(NAMES, NAMES, st.integers(1, 999_999_999), NAMES)
def test_every_spelling_of_a_ref_parses_back_to_itself(
    namespace: str, name: str, version: int, alias: str
) -> None:
    adapter = AdapterName(namespace, name)
    for ref in (Ref(adapter, version=version), Ref(adapter, alias=alias), Ref(adapter, digest=DIGEST)):
        assert parse_ref(str(ref)) == ref


@given(st.text(max_size=300))
def test_any_text_is_a_ref_or_a_typed_error(text: str) -> None:
    try:
        ref = parse_ref(text)
    except MeshError as error:
        assert error.reason in {Reason.INVALID_REF, Reason.INVALID_NAME}
    else:
        assert [ref.version, ref.alias, ref.digest].count(None) == 2


def test_a_bare_adapter_name_means_the_alias_latest() -> None:
    assert parse_ref("acme/ner") == Ref(AdapterName("acme", "ner"), alias="latest")


@pytest.mark.parametrize(
    "text",
    ["", "ner", "acme/", "/ner", "acme/ner:3", "acme/ner:v0", "acme/ner:v01", "acme/ner@",
     "acme/ner@sha256:12", "Acme/ner", "acme/-ner", "acme/ner@prod@x", "acme/ner:v1@prod",
     "acme/../ner", "acme/ner:v9999999999", "a" * 64 + "/ner", "acme/ner\n"],
)  # fmt: skip
def test_what_looks_almost_like_a_ref_is_refused(text: str) -> None:
    with pytest.raises(MeshError):
        parse_ref(text)


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"x": float("nan")})


def test_only_the_one_spelling_of_a_digest_is_one() -> None:
    assert is_digest(DIGEST)
    assert not is_digest(DIGEST.upper())
    assert not is_digest(DIGEST + "0")
    assert not is_digest(DIGEST.removeprefix("sha256:"))
