"""A tenant that has shown who it is uses what belongs to it or is granted to it, and nothing else."""

from dataclasses import replace

import pytest

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.api.router.v1 import router_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.router import wire
from adaptermesh.router.catalogue import (
    CatalogueImage,
    Event,
    Grant,
    GrantRemoved,
    Namespace,
    NothingHere,
    Policy,
    Reach,
)
from adaptermesh.router.resolution import Question, Resolution, resolve
from tests.unit.router.fakes import BASE, alias, image, route, version

NER, LAW, OPEN = version("acme/ner"), version("acme/law"), version("open/chat")
KNOWN: tuple[Event, ...] = (
    BASE,
    NER,
    LAW,
    OPEN,
    alias(NER),
    Namespace("acme", "acme-corp"),
    route("ner", ("acme/ner@prod", 1, "all"), tenant="*"),
)


def ask(
    tenant: str, ref: str | None = None, task: str | None = None, *events: Event, only: tuple[str, ...] = ()
) -> Resolution:
    question = Question(tenant, "k", task, ref, reach=Reach(tenant, frozenset(only)))
    return resolve(image(*KNOWN, *events), question)


def refusal(tenant: str, ref: str | None = None, task: str | None = None, *events: Event) -> MeshError:
    with pytest.raises(MeshError) as caught:
        ask(tenant, ref, task, *events)
    return caught.value


def test_its_own_is_a_tenants_and_what_nobody_was_given_is_the_default_tenants() -> None:
    assert ask("acme-corp", "acme/ner:v1").version == NER
    assert ask("default", "open/chat:v1").version == OPEN
    assert ask("stranger", "base").version is None


@pytest.mark.parametrize("ref", ["acme/ner:v1", "acme/ner@prod", f"acme/ner@{NER.digest}"])
def test_what_it_may_not_use_is_refused_as_what_is_not_there(ref: str) -> None:
    error, missing = refusal("stranger", ref), refusal("stranger", ref.replace("ner", "nothing"))
    assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.ADAPTER_NOT_FOUND)
    assert error.message == missing.message.replace("nothing", "ner")


def test_a_route_and_a_composition_lead_nowhere_that_a_ref_does_not() -> None:
    refused = refusal("stranger", task="ner")
    assert (refused.reason, "acme" in f"{refused!r}") == (Reason.TASK_NOT_FOUND, False)
    assert ask("acme-corp", task="ner").version == NER
    grant = Grant("acme", "ner", "stranger")
    error = refusal("stranger", "stack(acme/ner:v1,acme/law:v1)", None, grant)
    assert error.metadata["name"] == "acme/law"
    assert ask("acme-corp", "stack(acme/ner:v1,acme/law:v1)").version is not None


@pytest.mark.parametrize("grantee", ["stranger", "*"])
@pytest.mark.parametrize("name", ["", "ner"])
def test_a_grant_opens_one_adapter_or_all_until_it_is_taken_back(grantee: str, name: str) -> None:
    grant = Grant("acme", name, grantee)
    assert ask("stranger", "acme/ner:v1", None, grant).version == NER
    if name:
        assert refusal("stranger", "acme/law:v1", None, grant).code is Code.NOT_FOUND
    else:
        assert ask("stranger", "acme/law:v1", None, grant).version == LAW
    assert refusal("stranger", "acme/ner:v1", None, grant, GrantRemoved(grant)).code is Code.NOT_FOUND
    other = Grant("acme", name, "somebody-else")
    assert refusal("stranger", "acme/ner:v1", None, other).code is Code.NOT_FOUND


def test_a_key_of_some_namespaces_is_good_there_only() -> None:
    assert ask("acme-corp", "acme/ner:v1", only=("acme",)).version == NER
    with pytest.raises(MeshError):
        ask("acme-corp", "acme/ner:v1", only=("other",))


def test_a_namespace_that_changes_hands_changes_who_may_use_it() -> None:
    moved = Namespace("acme", "stranger")
    assert ask("stranger", "acme/ner:v1", None, moved).version == NER
    assert refusal("acme-corp", "acme/ner:v1", None, moved).code is Code.NOT_FOUND


def test_snapshot_and_feed_bring_who_may_use_what() -> None:
    namespace = access_pb2.Namespace(name="acme", tenant="acme-corp")
    grant = access_pb2.Grant(namespace="acme", name="ner", grantee="*", roles=[access_pb2.ROLE_READER])
    part = wire.snapshot_part(store_pb2.GetSnapshotResponse(namespaces=[namespace], grants=[grant]))
    assert part.entries == (Namespace("acme", "acme-corp"), Grant("acme", "ner", "*"))
    built = CatalogueImage("feed", 0)
    for change, expected in {
        store_pb2.Change(position=1, namespace_set=namespace).SerializeToString(): Namespace,
        store_pb2.Change(position=2, grant_set=grant).SerializeToString(): Grant,
        store_pb2.Change(position=3, grant_deleted=grant).SerializeToString(): GrantRemoved,
        store_pb2.Change(position=4, tenant_set=access_pb2.Tenant()).SerializeToString(): NothingHere,
        store_pb2.Change(position=5, api_key_set=access_pb2.ApiKey()).SerializeToString(): NothingHere,
    }.items():
        message = store_pb2.WatchChangesResponse(change=store_pb2.Change.FromString(change))
        (parsed,) = wire.feed_messages(message)
        found = parsed.change
        assert found is not None
        assert isinstance(found.event, expected)
        built.add(found.event)
    assert built.tenants == {"acme": "acme-corp"}
    assert not built.may_use(Reach("stranger"), NER.adapter)


def test_only_a_restricted_request_has_a_reach() -> None:
    free = wire.dispatch_request(router_pb2.DispatchRequest(request_id="r", tenant="t"))
    bound = wire.dispatch_request(
        router_pb2.DispatchRequest(request_id="r", tenant="t", restricted=True, namespaces=["a"])
    )
    assert free.question.reach is None
    assert bound.question.reach == Reach("t", frozenset({"a"}))


def test_a_signature_counts_if_the_namespace_or_its_tenant_trusts_the_key() -> None:
    signed = replace(NER, signing_key_ids=("k1",))
    asks = Policy("acme", SignaturePolicy.REQUIRED, frozenset({"k2"}))
    shared = Policy("tenant:acme-corp", SignaturePolicy.NONE, frozenset({"k1"}))
    elsewhere = Policy("tenant:other", SignaturePolicy.NONE, frozenset({"k1"}))
    assert refusal("acme-corp", "acme/ner:v1", None, signed, asks).reason is Reason.VERSION_UNSIGNED
    error = refusal("acme-corp", "acme/ner:v1", None, signed, asks, elsewhere)
    assert error.reason is Reason.VERSION_UNSIGNED
    assert ask("acme-corp", "acme/ner:v1", None, signed, asks, shared).version == signed
