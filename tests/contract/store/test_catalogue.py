import asyncio
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.signing import key_id_of, signed_message
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.core.refs import AdapterName, parse_ref
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.core.version_state import VersionState
from adaptermesh.store.aliases import AliasName, MoveRequest
from adaptermesh.store.listing import AdapterQuery
from adaptermesh.store.pages import PageRequest
from adaptermesh.store.records import (
    NEVER_SET,
    BaseModelRecord,
    Change,
    ChangeKind,
    Record,
    RouteRecord,
    RouteTarget,
    SourceFile,
    VersionRecord,
)
from adaptermesh.store.statuses import StatusRequest
from adaptermesh.store.stores import Stores
from adaptermesh.store.version_removal import RemovalRequest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}
FACTS = BaseFacts.from_config("tiny", CONFIG, digest_bytes(b"weights"))
BASE = BaseModelRecord(
    model_id="tiny",
    digest=FACTS.digest,
    config_digest=FACTS.config_digest,
    weights_digest=FACTS.weights_digest,
    architecture=FACTS.architecture,
    hidden_size=8,
    num_layers=2,
    vocab_size=16,
    config_json=json.dumps(CONFIG),
)
VERSION = VersionRecord(
    namespace="acme",
    name="ner",
    number=0,
    digest=digest_bytes(b"0"),
    base_digest=BASE.digest,
    base_model_id="tiny",
    task="financial-ner",
    description="Names, sums; ünïcode",
    tags=("b", "a", "b"),
    license="mit",
    kind="lora",
    op_kinds=("lowrank",),
    max_rank=4,
    size_bytes=2**40,
    servable=False,
    unservable_reason="because",
    warnings=("one", "two"),
    create_time_us=0,
    source_files=(SourceFile("adapter_config.json", 3, digest_bytes(b"file")),),
)
TENSORS = digest_bytes(b"tensors")
PROD = AliasName(AdapterName("acme", "ner"), "prod")


def version(seed: int, **fields: str) -> VersionRecord:
    return replace(VERSION, digest=digest_bytes(str((seed, fields)).encode()), **fields)  # type: ignore[arg-type]


async def changes(stores: Stores, feed_id: str, after: int = 0) -> list[Change]:
    found = []
    watch = stores.feed.watch(stores.database, feed_id, after)
    async for message in watch:
        if message.change is None:
            break
        found.append(message.change)
        if message.change.position == message.head_position:
            break
    await watch.aclose()
    return found


async def snapshot(stores: Stores) -> tuple[str, int, list[Record]]:
    items = [item async for item in stores.snapshots.read()]
    records = [item.record for item in items if item.record is not None]
    return items[0].feed_id, items[0].feed_position, records


@pytest.fixture
async def with_base(stores: Stores) -> Stores:
    await stores.catalogue.register_base_model(BASE)
    return stores


async def test_every_record_comes_back_as_it_was_written(with_base: Stores) -> None:
    published = await with_base.catalogue.publish(VERSION, TENSORS)
    alias, _ = await with_base.aliases.point(MoveRequest(PROD, 0, "ada", "why"), 1)
    targets = (RouteTarget("acme/ner@prod", 90, "stable"), RouteTarget("base", 10, ""))
    route, position = await with_base.routes.set(RouteRecord("*", "ner", targets, 0, 0), 0)
    record = published.version.record
    assert record.status == NEVER_SET
    assert record == replace(VERSION, number=1, create_time_us=record.create_time_us)
    assert record.create_time_us > 0
    feed_id, head, records = await snapshot(with_base)
    assert (head, position) == (4, 4)
    assert records == [BASE, record, alias, route]
    assert [change.record for change in await changes(with_base, feed_id)] == records
    found, aliases = await with_base.catalogue.resolve(parse_ref("acme/ner@prod"))
    assert (found.record, found.tensor_digest, aliases) == (record, TENSORS, ("prod",))


async def test_a_status_comes_back_as_it_was_written_and_so_does_the_next_one(with_base: Stores) -> None:
    await with_base.catalogue.publish(VERSION, TENSORS)
    await with_base.catalogue.publish(version(1), TENSORS)
    ner = AdapterName("acme", "ner")
    wanted = StatusRequest(ner, 1, VersionState.DEPRECATED, "öld", "acme/ner:v2", 0, "ada")
    first, _ = await with_base.statuses.set(wanted)
    second, position = await with_base.statuses.set(StatusRequest(ner, 1, VersionState.REVOKED, "no", "", 1))
    feed_id, head, records = await snapshot(with_base)
    assert (head, records[1]) == (position, second)
    assert [change.record for change in await changes(with_base, feed_id)][-2:] == [first, second]
    status = first.status
    assert (status.state, status.reason, status.replacement) == (wanted.state, "öld", "acme/ner:v2")
    assert (status.generation, status.actor, second.status.generation) == (1, "ada", 2)
    with pytest.raises(MeshError) as caught:
        await with_base.statuses.set(replace(wanted, expected_generation=1))
    assert caught.value.reason is Reason.STATUS_CONFLICT


async def test_a_removed_version_leaves_who_when_and_why_and_its_statuses(with_base: Stores) -> None:
    await with_base.catalogue.publish(VERSION, TENSORS)
    await with_base.catalogue.publish(version(1), TENSORS)
    ner = AdapterName("acme", "ner")
    changed, _ = await with_base.statuses.set(StatusRequest(ner, 1, VersionState.REVOKED, "no", "", 0, "eve"))
    wanted = RemovalRequest(ner, 1, VERSION.digest, "ada", "öld")
    deleted, position = await with_base.removals.delete(wanted)
    assert (deleted.ref, deleted.digest, deleted.actor) == ("acme/ner:v1", VERSION.digest, "ada")
    feed_id, head, records = await snapshot(with_base)
    assert (head, records[-1]) == (position, deleted)
    assert (await changes(with_base, feed_id))[-1].record == deleted
    page, found = await with_base.statuses.history(ner, 1, PageRequest())
    assert (page.items, found) == ((changed.status,), deleted)
    with pytest.raises(MeshError) as caught:
        await with_base.removals.delete(wanted)
    assert caught.value.reason is Reason.VERSION_DELETED


async def test_exactly_one_of_many_removals_of_a_version_happens(with_base: Stores) -> None:
    await with_base.catalogue.publish(VERSION, TENSORS)
    wanted = RemovalRequest(AdapterName("acme", "ner"), 1, VERSION.digest)
    outcomes = await asyncio.gather(
        *(with_base.removals.delete(wanted) for _ in range(8)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
    feed_id, head, _ = await snapshot(with_base)
    assert (head, len(await changes(with_base, feed_id))) == (3, 3)


async def test_a_removed_alias_leaves_its_history_and_counts_on(with_base: Stores) -> None:
    await with_base.catalogue.publish(VERSION, TENSORS)
    await with_base.aliases.point(MoveRequest(PROD, 0), 1)
    protected, _ = await with_base.aliases.protect(MoveRequest(PROD, 1, "ada"), protected=True)
    acknowledged = MoveRequest(PROD, 2, acknowledge_protection=True)
    gone, position = await with_base.aliases.delete(acknowledged)
    feed_id, head, records = await snapshot(with_base)
    assert (head, len(records)) == (position, 2)
    seen = await changes(with_base, feed_id)
    assert [(change.kind, change.record) for change in seen[-2:]] == [
        (ChangeKind.ALIAS_SET, protected),
        (ChangeKind.ALIAS_DELETED, gone),
    ]
    again, _ = await with_base.aliases.point(MoveRequest(PROD, 0), 1)
    assert (again.generation, again.protected) == (4, False)
    kept = (await with_base.aliases.history(PROD, PageRequest())).items
    assert [move.action for move in kept] == ["set", "deleted", "protected", "set"]


async def test_policies_and_signatures_come_back_as_they_were_written(with_base: Stores) -> None:
    published = await with_base.catalogue.publish(VERSION, TENSORS)
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public = key.public_key().public_bytes_raw()
    await with_base.policies.trust("acme", public, "Ünser", "ada")
    policy, _ = await with_base.policies.set("acme", SignaturePolicy.REQUIRED, 1)
    signature = key.sign(signed_message(VERSION.digest))
    signed = await with_base.signatures.add(VERSION.digest, key_id_of(public), signature, "ada")
    assert signed.version == replace(published.version.record, signatures=signed.version.signatures)
    feed_id, head, records = await snapshot(with_base)
    assert (head, records) == (5, [BASE, signed.version, policy])
    assert [change.record for change in await changes(with_base, feed_id)][-2:] == [policy, signed.version]
    (kept,) = await with_base.signatures.list(VERSION.digest)
    assert kept == (signed.version.signatures[0], True)
    assert (await with_base.catalogue.resolve(parse_ref("acme/ner:v1")))[0].record == signed.version


async def test_numbers_and_positions_have_no_gaps_under_concurrency(with_base: Stores) -> None:
    wanted = [version(seed, name=name) for seed in range(10) for name in ("ner", "sql")]
    done = await asyncio.gather(*(with_base.catalogue.publish(each, TENSORS) for each in wanted))
    for name in ("ner", "sql"):
        numbers = [p.version.record.number for p in done if p.version.record.name == name]
        assert sorted(numbers) == list(range(1, 11))
    feed_id, head, _ = await snapshot(with_base)
    positions = [change.position for change in await changes(with_base, feed_id)]
    assert positions == list(range(1, head + 1)) == list(range(1, 22))


async def test_one_digest_is_published_once(with_base: Stores) -> None:
    done = await asyncio.gather(*(with_base.catalogue.publish(VERSION, TENSORS) for _ in range(6)))
    assert sum(each.created for each in done) == 1
    assert len({each.version.record for each in done}) == 1


async def test_a_digest_finds_its_version_and_no_other(with_base: Stores) -> None:
    published = await with_base.catalogue.publish(VERSION, TENSORS)
    await with_base.catalogue.publish(version(1), TENSORS)
    assert await with_base.catalogue.get_digest(VERSION.digest) == published.version
    unknown = digest_bytes(b"nobody")
    assert await with_base.catalogue.find_digest(unknown) is None
    for digest, reason in ((unknown, Reason.VERSION_NOT_FOUND), ("v1", Reason.INVALID_FIELD)):
        with pytest.raises(MeshError) as caught:
            await with_base.catalogue.get_digest(digest)
        assert caught.value.reason is reason


async def test_a_mutation_that_is_refused_leaves_no_change(with_base: Stores) -> None:
    route = RouteRecord("*", "ner", (RouteTarget("acme/ner:v1", 1, ""),), 0, 0)
    for refused in (
        with_base.routes.set(route, None),
        with_base.aliases.point(MoveRequest(PROD), 1),
        with_base.aliases.roll_back(MoveRequest(PROD)),
        with_base.routes.delete("*", "ner"),
    ):
        with pytest.raises(MeshError):
            await refused
    assert (await snapshot(with_base))[1] == 1


async def test_exactly_one_compare_and_set_of_a_generation_wins(with_base: Stores) -> None:
    await with_base.catalogue.publish(VERSION, TENSORS)
    moves = (with_base.aliases.point(MoveRequest(PROD, 0, str(n)), 1) for n in range(8))
    outcomes = await asyncio.gather(*moves, return_exceptions=True)
    losers = [outcome for outcome in outcomes if isinstance(outcome, MeshError)]
    assert len(losers) == 7
    assert {error.reason for error in losers} == {Reason.ALIAS_CONFLICT}


async def test_names_are_listed_in_the_order_of_their_bytes(with_base: Stores) -> None:
    names = ["a", "a-", "a-b", "a0", "ab", "b", "0", "z9"]
    for name in reversed(names):
        await with_base.catalogue.publish(version(0, name=name), TENSORS)
    listed: list[str] = []
    token = ""
    while not listed or token:
        page = await with_base.listing.list(AdapterQuery(), PageRequest(3, token))
        listed += [summary.newest.name for summary in page.items]
        token = page.next_token
    assert listed == sorted(names)
