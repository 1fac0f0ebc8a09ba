from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.core.composition import composition_digest
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.core.version_state import VersionState
from adaptermesh.router.catalogue import Event, Policy, RouteTarget, VersionRemoved
from adaptermesh.router.resolution import ComposedVersion, Question, Resolution, choose_target, resolve
from tests.unit.router.fakes import BASE, OTHER_BASE, alias, image, route, version

V1, V2 = version(number=1), version(number=2)
ELSEWHERE = version("acme/sql", base=OTHER_BASE)
STORED_ONLY = version("acme/odd", servable=False, unservable_reason="its kind is x-lora")
OLD = version("acme/old", state=VersionState.DEPRECATED, state_reason="slow", replacement="acme/ner:v2")
GONE = version("acme/gone", state=VersionState.REVOKED, state_reason="bad data")
FUSION = version("acme/mix", servable=False, unservable_reason="ask for fuse", op_kinds=("fusion",))
REMOVED = VersionRemoved(V2.adapter, 2, V2.digest, "2026-11-30T19:00:00+00:00", "ada", "wrong")
KNOWN: tuple[Event, ...] = (
    BASE,
    OTHER_BASE,
    V1,
    V2,
    ELSEWHERE,
    STORED_ONLY,
    OLD,
    GONE,
    FUSION,
    alias(V1),
    route("ner", ("acme/ner@prod", 1, "stable"), tenant="*", generation=4),
    route("ner", ("acme/ner:v2", 1, "own"), tenant="bank", generation=9),
    route("chat", ("base", 1, "base")),
)

KEYS = [f"user-{number}" for number in range(2000)]


def ask(
    ref: str | None = None,
    task: str | None = None,
    tenant: str = "default",
    base_model: str = "",
    cohort_key: str = "k",
    entries: tuple[Event, ...] = KNOWN,
) -> Resolution:
    return resolve(image(*entries), Question(tenant, cohort_key, task, ref, base_model))


def refusal(**question: str) -> MeshError:
    with pytest.raises(MeshError) as caught:
        ask(**question)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("ref", "wanted"),
    [("acme/ner:v1", V1), ("acme/ner:v2", V2), ("acme/ner@prod", V1), (f"acme/ner@{V2.digest}", V2)],
)
def test_each_spelling_of_a_ref_finds_its_version(ref: str, wanted: object) -> None:
    found = ask(ref=ref)
    assert found.version == wanted
    assert found.ref == ref
    assert found.route is None
    assert found.cohort == ""


def test_a_bare_name_is_the_alias_latest_once_somebody_set_it() -> None:
    assert ask(ref="acme/ner", entries=(*KNOWN, alias(V2, "latest"))).version == V2


def test_a_bare_name_without_that_alias_is_refused_with_the_way_out() -> None:
    error = refusal(ref="acme/ner")
    assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.ALIAS_NOT_FOUND)
    assert error.metadata["name"] == "acme/ner@latest"
    assert "nobody has set" in error.message


def test_neither_task_nor_ref_and_the_ref_base_are_the_bare_base() -> None:
    for found in (ask(), ask(ref="base"), ask(task="chat")):
        assert found.version is None
        assert found.ref == "base"
        assert found.base_digests is None


def test_a_tenants_own_route_wins_over_the_route_for_every_tenant() -> None:
    own, common = ask(task="ner", tenant="bank"), ask(task="ner", tenant="shop")
    assert own.version == V2
    assert own.cohort == "own"
    assert own.route is not None
    assert own.route.generation == 9
    assert common.version == V1
    assert common.ref == "acme/ner@prod"
    assert common.cohort == "stable"


@pytest.mark.parametrize(
    ("question", "reason", "name"),
    [
        ({"task": "nothing"}, Reason.TASK_NOT_FOUND, "nothing"),
        ({"ref": "acme/none:v1"}, Reason.ADAPTER_NOT_FOUND, "acme/none"),
        ({"ref": "acme/ner:v9"}, Reason.VERSION_NOT_FOUND, "acme/ner:v9"),
        ({"ref": "acme/ner@canary"}, Reason.ALIAS_NOT_FOUND, "acme/ner@canary"),
        ({"ref": f"acme/sql@{V1.digest}"}, Reason.VERSION_NOT_FOUND, f"acme/sql@{V1.digest}"),
        ({"base_model": "huge"}, Reason.BASE_NOT_FOUND, "huge"),
        ({"ref": "acme/ner:v1", "base_model": "huge"}, Reason.BASE_NOT_FOUND, "huge"),
    ],
)
def test_what_is_unknown_is_not_found_by_its_name(
    question: dict[str, str], reason: Reason, name: str
) -> None:
    error = refusal(**question)
    assert (error.code, error.reason, error.metadata["name"]) == (Code.NOT_FOUND, reason, name)


@pytest.mark.parametrize(
    "question",
    [
        {"ref": "acme/gone:v1"},
        {"ref": "acme/gone@prod"},
        {"ref": f"acme/gone@{GONE.digest}"},
        {"task": "gone"},
        {"ref": "average(acme/ner:v1, acme/gone:v1)"},
        {"ref": "fuse(acme/gone:v1, acme/ner:v1, acme/ner:v2)"},
    ],
)
def test_what_means_a_revoked_version_is_refused_with_the_reason(question: dict[str, str]) -> None:
    entries = (*KNOWN, alias(GONE), route("gone", ("acme/gone@prod", 1, "all")))
    with pytest.raises(MeshError) as caught:
        ask(entries=entries, **question)
    error = caught.value
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.VERSION_REVOKED)
    assert "bad data" in error.message
    assert error.metadata["digest"] == GONE.digest


@pytest.mark.parametrize("ref", ["acme/ner:v2", f"acme/ner@{V2.digest}", "average(acme/ner:v1, acme/ner:v2)"])
def test_what_means_a_removed_version_hears_who_removed_it_when_and_why(ref: str) -> None:
    entries = (*KNOWN, REMOVED)
    with pytest.raises(MeshError) as caught:
        ask(ref=ref, entries=entries)
    assert (caught.value.code, caught.value.reason) == (Code.NOT_FOUND, Reason.VERSION_DELETED)
    assert "means acme/ner:v2, which was removed at 2026-11-30T19:00:00+00:00 by ada: wrong" in str(
        caught.value
    )
    assert ask(ref="acme/ner:v1", entries=entries).version == V1


def test_content_that_was_removed_and_uploaded_again_is_found_by_its_digest() -> None:
    again = replace(V2, number=3)
    for entries in ((*KNOWN, REMOVED, again), (*KNOWN[:3], again, REMOVED)):
        assert ask(ref=f"acme/ner@{V2.digest}", entries=entries).version == again
    with pytest.raises(MeshError) as caught:
        ask(ref="acme/ner:v2", entries=(*KNOWN, REMOVED, again))
    assert caught.value.reason is Reason.VERSION_DELETED


def test_a_deprecated_version_is_found_with_a_warning() -> None:
    found = ask(ref="acme/old:v1")
    assert found.version == OLD
    assert found.warnings == ("acme/old:v1 is deprecated: slow; use acme/ner:v2",)
    assert ask(ref="average(acme/ner:v1, acme/old:v1)").warnings == found.warnings
    assert ask(ref="acme/ner:v1").warnings == ask().warnings == ()


def test_a_status_holds_from_the_change_that_brings_it_until_the_next() -> None:
    again = version("acme/gone")
    assert ask(ref="acme/gone:v1", entries=(*KNOWN, again)).version == again
    with pytest.raises(MeshError):
        ask(ref="acme/gone:v1", entries=(*KNOWN, again, GONE))


def test_a_namespace_that_asks_for_signatures_takes_versions_of_trusted_keys_only() -> None:
    strict = Policy("acme", SignaturePolicy.REQUIRED, frozenset({"k1", "k2"}))
    signed = replace(V2, signing_key_ids=("k2", "k9"))
    entries = (*KNOWN, strict, signed, replace(ELSEWHERE, signing_key_ids=("k9",)))
    assert ask(ref="acme/ner:v2", entries=entries).version == signed
    for ref in ("acme/ner:v1", "acme/ner@prod", "acme/sql:v1", "average(acme/ner:v2, acme/ner:v1)"):
        with pytest.raises(MeshError) as caught:
            ask(ref=ref, entries=entries)
        assert (caught.value.code, caught.value.reason) == (
            Code.FAILED_PRECONDITION,
            Reason.VERSION_UNSIGNED,
        )
    lenient = Policy("acme", SignaturePolicy.NONE, frozenset())
    assert ask(ref="acme/ner:v1", entries=(*entries, lenient)).version == V1
    assert ask(ref="acme/ner:v1", entries=(*KNOWN, replace(strict, namespace="other"))).version == V1


def test_an_adapter_of_another_base_than_the_one_asked_for_is_refused_with_both_digests() -> None:
    error = refusal(ref="acme/sql:v1", base_model="tiny")
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert error.metadata["adapter_base_digest"] == OTHER_BASE.digest
    assert error.metadata["base_digest"] == BASE.digest


def test_an_adapter_of_the_base_asked_for_by_name_or_digest_is_served() -> None:
    assert ask(ref="acme/sql:v1", base_model="other").base_digests == frozenset((OTHER_BASE.digest,))
    assert ask(ref="acme/sql:v1", base_model=OTHER_BASE.digest).version == ELSEWHERE
    assert ask(base_model="tiny").base_digests == frozenset((BASE.digest,))


def test_what_can_not_be_served_is_refused_with_the_reason_that_was_recorded() -> None:
    error = refusal(ref="acme/odd:v1")
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.ADAPTER_UNSUPPORTED)
    assert "x-lora" in error.message


@pytest.mark.parametrize(
    "question", [{"task": ""}, {"ref": ""}, {"ref": "no slash"}, {"ref": "a/b@sha256:1"}]
)
def test_what_is_malformed_is_an_invalid_argument(question: dict[str, str]) -> None:
    assert refusal(**question).code is Code.INVALID_ARGUMENT


def shares(weights: dict[str, int], tenant: str = "default") -> dict[str, str]:
    """The share of each key."""
    rule = route("ner", *((f"acme/ner@{name}", weight, name) for name, weight in weights.items()))
    return {key: choose_target(rule, tenant, key).cohort for key in KEYS}


NAMES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)
WEIGHTS = NAMES.flatmap(
    lambda names: st.fixed_dictionaries({name: st.integers(0, 1000) for name in names}).filter(
        lambda weights: sum(weights.values()) > 0
    )
)


@settings(max_examples=15, deadline=None)
@given(WEIGHTS)
def test_shares_follow_the_weights(weights: dict[str, int]) -> None:
    counts = Counter(shares(weights).values())
    total = sum(weights.values())
    for name, weight in weights.items():
        share = weight / total
        # Five standard deviations of a binomial: the keys are fixed, so this never turns red by itself.
        bound = 5 * (share * (1 - share) / len(KEYS)) ** 0.5
        assert abs(counts[name] / len(KEYS) - share) <= bound
        assert weight > 0 or counts[name] == 0


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.data())
def test_growing_one_share_moves_keys_to_that_share_only(
    weights: dict[str, int], data: st.DataObject
) -> None:
    grown = data.draw(st.sampled_from(sorted(weights)))
    before = shares(weights)
    after = shares({**weights, grown: weights[grown] + data.draw(st.integers(1, 1000))})
    assert all(after[key] in (before[key], grown) for key in KEYS)


def test_a_canary_that_grows_step_by_step_never_gives_a_key_back() -> None:
    steps = [shares({"stable": 100 - part, "canary": part}) for part in (0, 1, 5, 25, 50, 75, 100)]
    for before, after in pairwise(steps):
        assert all(after[key] == "canary" for key in KEYS if before[key] == "canary")
    assert set(steps[0].values()) == {"stable"}
    assert set(steps[-1].values()) == {"canary"}


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.randoms())
def test_a_share_depends_on_neither_the_order_of_targets_nor_the_run(
    weights: dict[str, int], random: object
) -> None:
    reordered = dict(reversed(weights.items()))
    assert shares(weights) == shares(weights) == shares(reordered)


def test_the_shares_of_some_keys_are_these_on_every_machine_and_in_every_release() -> None:
    rule = route("financial-ner", ("acme/ner@prod", 90, "stable"), ("acme/ner@next", 10, "canary"))
    found = [choose_target(rule, "bank", f"user-{number}").cohort[0] for number in range(40)]
    assert "".join(found) == "sssssssssscssssssscsssssssssssscssssssss"


def test_the_same_key_of_another_tenant_or_task_is_drawn_anew() -> None:
    weights = {"a": 1, "b": 1}
    ours, theirs = shares(weights), shares(weights, tenant="bank")
    same = sum(ours[key] == theirs[key] for key in KEYS) / len(KEYS)
    assert 0.45 < same < 0.55


def test_two_targets_of_one_cohort_each_get_their_share() -> None:
    rule = route("ner", ("acme/ner:v1", 1, "same"), ("acme/ner:v2", 1, "same"))
    counts = Counter(choose_target(rule, "default", key).ref for key in KEYS)
    assert 0.45 < counts["acme/ner:v1"] / len(KEYS) < 0.55


def test_the_ref_behind_a_cohort_may_change_without_moving_a_key() -> None:
    old = route("ner", ("acme/ner:v1", 3, "stable"), ("acme/ner:v2", 1, "canary"))
    new = route("ner", ("acme/ner:v1", 3, "stable"), ("acme/ner:v3", 1, "canary"))
    for key in KEYS:
        assert choose_target(old, "default", key).cohort == choose_target(new, "default", key).cohort


def test_a_route_without_an_open_share_is_not_found() -> None:
    with pytest.raises(MeshError) as caught:
        choose_target(route("ner", ("base", 0, "none")), "default", "k")
    assert caught.value.reason is Reason.TASK_NOT_FOUND


def test_a_target_says_what_it_is() -> None:
    rule = route("ner", ("acme/ner:v1", 1, "stable"))
    assert choose_target(rule, "default", "") == RouteTarget("acme/ner:v1", 1, "stable")


def test_a_composition_is_resolved_ref_by_ref() -> None:
    found = ask(ref="stack(acme/ner@prod, 0.5*acme/ner:v2)").version
    assert isinstance(found, ComposedVersion)
    assert str(found) == "stack(acme/ner:v1,0.5*acme/ner:v2)"
    assert str(found.resolved) == f"stack({V1.digest},0.5*{V2.digest})"
    assert found.digest == composition_digest(found.resolved)
    assert (found.base_digest, found.members) == (V1.base_digest, (V1, V2))
    moved = ask(ref="stack(acme/ner@prod, 0.5*acme/ner:v2)", entries=(*KNOWN, alias(V2))).version
    assert moved is not None
    assert moved.digest != found.digest


def test_a_route_may_lead_to_a_composition() -> None:
    entries = (*KNOWN, route("both", ("average(acme/ner:v1,acme/ner:v2)", 1, "both")))
    assert str(ask(task="both", entries=entries).version) == "average(acme/ner:v1,acme/ner:v2)"


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("stack(acme/ner:v1, acme/none:v1)", Reason.ADAPTER_NOT_FOUND),
        ("stack(acme/ner:v1, acme/ner:v9)", Reason.VERSION_NOT_FOUND),
        ("2*acme/ner@nobody", Reason.ALIAS_NOT_FOUND),
        ("stack(acme/ner:v1, acme/sql:v1)", Reason.BASE_MISMATCH),
        ("stack(acme/ner:v1, acme/odd:v1)", Reason.ADAPTER_UNSUPPORTED),
        ("stack(acme/ner:v1", Reason.INVALID_REF),
        ("stack(acme/ner:v1, base)", Reason.INVALID_REF),
        ("fuse(acme/none:v1, acme/ner:v1)", Reason.ADAPTER_NOT_FOUND),
        ("fuse(acme/mix:v1, acme/odd:v1)", Reason.ADAPTER_UNSUPPORTED),
        ("fuse(acme/mix:v1, acme/sql:v1)", Reason.BASE_MISMATCH),
        ("fuse(acme/mix:v1)", Reason.INVALID_REF),
    ],
)
def test_a_composition_fails_with_what_is_wrong_in_it(ref: str, reason: Reason) -> None:
    assert refusal(ref=ref).reason is reason


def test_a_fusion_is_served_first_in_a_fuse_and_nowhere_else() -> None:
    found = ask(ref="fuse(acme/mix:v1, acme/ner@prod, acme/ner:v2)").version
    assert isinstance(found, ComposedVersion)
    assert str(found) == "fuse(acme/mix:v1,acme/ner:v1,acme/ner:v2)"
    assert str(found.resolved) == f"fuse({FUSION.digest},{V1.digest},{V2.digest})"
    assert found.members == (FUSION, V1, V2)
    for ref in ("acme/mix:v1", "stack(acme/mix:v1, acme/ner:v1)", "0.5*acme/mix:v1"):
        assert "ask for fuse" in refusal(ref=ref).message
    error = refusal(ref="fuse(acme/ner:v1, acme/ner:v2)")
    assert error.reason is Reason.ADAPTER_UNSUPPORTED
    assert "'acme/ner:v1' (acme/ner:v1) is no fusion" in error.message
