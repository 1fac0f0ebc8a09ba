"""Compositions on their way to the engine, in every order in which their members may come."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanContext

from adaptermesh.artifact.composing import Composed, Member, compose, identity_of
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.composition import Leaf, composition_digest, parse_resolved
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.composing_source import ComposingSource
from adaptermesh.worker.engine.source import AdapterSink
from tests.parity.adapters.goldens import ingest_folder, load_goldens
from tests.unit.artifact.test_composing import random_member

TRACER = TracerProvider().get_tracer("tests")
_ONE = digest_bytes(b"one")


def stored(seed: int) -> tuple[bytes, bytes]:
    """A member as the store has it: a manifest with true chunks, and the tensor file."""
    composed: Composed = compose(Leaf(_ONE), {_ONE: random_member("lora", seed)})
    plain = composed.manifest.to_bytes().replace(b"adaptermesh.composition.v1", b"peft")
    return plain, composed.data.tobytes()


MEMBERS = {digest_bytes(manifest): (manifest, data) for manifest, data in (stored(seed) for seed in range(3))}
NAMES = list(MEMBERS)
TREE = parse_resolved(f"stack({NAMES[0]},0.5*average({NAMES[1]},{NAMES[2]},{NAMES[0]}))")
DIGEST = composition_digest(TREE)


class Store:
    """Members come when the test says."""

    def __init__(self) -> None:
        self.sinks: dict[str, AdapterSink] = {}
        self.plain: list[str] = []
        self.cancelled: list[str] = []

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        self.plain.append(digest)

    def fetch_member(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        self.sinks[digest] = sink

    def cancel(self, digest: str) -> None:
        self.cancelled.append(digest)

    def span_of(self, digest: str) -> SpanContext | None:
        return None


class Engine:
    """The engine's end."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.manifest = b""
        self.data = b""
        self.ends: list[MeshError | None] = []

    def begin(self, manifest: bytes) -> None:
        if self.refuses:
            self.refuses = False
            self.ends.append(None)
            raise MeshError(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "no room now")
        self.manifest = manifest

    def write(self, data: bytes | memoryview) -> None:
        self.data += bytes(data)

    def finish(self) -> None:
        self.ends.append(None)

    def fail(self, error: MeshError) -> None:
        if self.ends:
            raise MeshError(Code.CANCELLED, Reason.CANCELLED, "it has ended")
        self.ends.append(error)


def make_source(store: Store) -> ComposingSource:
    source = ComposingSource(store, TRACER)
    source.learn(DIGEST, TREE)
    return source


def settle(source: ComposingSource) -> None:
    """Waits for the one thread."""
    executor: ThreadPoolExecutor = source._executor
    executor.submit(lambda: None).result(10.0)


@settings(max_examples=60, deadline=None)
@given(
    st.permutations([name for name in NAMES for _ in range(3)]),
    st.none() | st.tuples(st.sampled_from(NAMES), st.integers(0, 2)),
)
def test_in_every_order_of_events_it_ends_once_whole_or_with_the_error(
    order: Sequence[str], failure: tuple[str, int] | None
) -> None:
    store, engine = Store(), Engine()
    source = make_source(store)
    source.fetch(DIGEST, engine, None)
    assert set(store.sinks) == set(NAMES)
    at = dict.fromkeys(NAMES, 0)
    lost = MeshError(Code.UNAVAILABLE, Reason.STORE_UNREACHABLE, "gone")
    for name in order:
        step, sink = at[name], store.sinks[name]
        at[name] += 1
        if failure is not None and name == failure[0] and step >= failure[1]:
            sink.fail(lost)
        elif step == 0:
            sink.begin(MEMBERS[name][0])
        elif step == 1:
            sink.write(MEMBERS[name][1])
        else:
            sink.finish()
    settle(source)
    source.stop()
    if failure is not None:
        assert engine.ends == [lost]
        return
    assert engine.ends == [None]
    members = {
        name: Member(Manifest.from_bytes(manifest), data) for name, (manifest, data) in MEMBERS.items()
    }
    expected = compose(TREE, members)
    assert engine.data == expected.data.tobytes()
    found = Manifest.from_bytes(engine.manifest)
    assert identity_of(found, digest_bytes(engine.manifest)) == DIGEST


def deliver(store: Store, names: Sequence[str]) -> None:
    for name in names:
        sink = store.sinks[name]
        sink.begin(MEMBERS[name][0])
        sink.write(MEMBERS[name][1])
        sink.finish()


def test_no_room_ends_it_and_it_can_be_asked_for_again() -> None:
    store, engine = Store(), Engine(refuses=True)
    source = make_source(store)
    source.fetch(DIGEST, engine, None)
    deliver(store, NAMES)
    settle(source)
    assert (engine.ends, engine.data) == ([None], b"")
    again = Engine()
    source.fetch(DIGEST, again, None)
    deliver(store, NAMES)
    settle(source)
    assert again.ends == [None]
    assert again.data


def test_a_member_that_is_not_what_its_digest_says_fails_it() -> None:
    manifest, data = MEMBERS[NAMES[0]]
    for wrong in ("manifest", "longer", "shorter", "changed"):
        store, engine = Store(), Engine()
        source = make_source(store)
        source.fetch(DIGEST, engine, None)
        sink = store.sinks[NAMES[0]]
        with pytest.raises(MeshError):
            sink.begin(MEMBERS[NAMES[1]][0] if wrong == "manifest" else manifest)
            changed = np.frombuffer(data, np.uint8).copy()
            changed[-1] ^= 1
            sink.write(
                {"longer": data + b"x", "shorter": data[:-1], "changed": changed.tobytes()}.get(wrong, data)
            )
            sink.finish()
        [error] = engine.ends
        assert error is not None
        assert error.reason is Reason.DATA_CORRUPT


def test_a_few_are_on_their_way_at_a_time_and_each_has_its_turn() -> None:
    store = Store()
    source = ComposingSource(store, TRACER)
    lost = MeshError(Code.UNAVAILABLE, Reason.STORE_UNREACHABLE, "gone")
    engines = [Engine(refuses=number == 5) for number in range(12)]
    started = list[AdapterSink]()

    def fetch_member(digest: str, sink: AdapterSink, context: object | None) -> None:
        started.append(sink)

    store.fetch_member = fetch_member  # type: ignore[method-assign]
    for number, engine in enumerate(engines):
        tree = parse_resolved(f"{number + 2}*{NAMES[0]}")
        digest = composition_digest(tree)
        source.learn(digest, tree)
        source.fetch(digest, engine, None)
    for number in range(len(engines)):
        assert len(started) == min(number + 4, len(engines))
        if number % 3 == 0:
            started[number].fail(lost)
        else:
            started[number].begin(MEMBERS[NAMES[0]][0])
            started[number].write(MEMBERS[NAMES[0]][1])
            started[number].finish()
        settle(source)
    assert [engine.ends for engine in engines] == [
        [lost] if number % 3 == 0 else [None] for number in range(len(engines))
    ]


def test_a_fusion_comes_like_the_adapters_that_it_weighs(tmp_path: Path) -> None:
    goldens, stored = load_goldens("llama"), dict[str, tuple[bytes, bytes]]()
    for method in ("fusion", "seq_bn", "seq_bn_by_layer"):
        manifest = ingest_folder(goldens.folder(method), goldens.facts, tmp_path / "out")
        stored[manifest.digest] = (manifest.to_bytes(), (tmp_path / "out").read_bytes())
    for tree, served in ((f"fuse({','.join(stored)})", True), (f"stack({','.join(stored)})", False)):
        composition, store, engine = parse_resolved(tree), Store(), Engine()
        source = ComposingSource(store, TRACER)
        digest = composition_digest(composition)
        source.learn(digest, composition)
        source.fetch(digest, engine, None)
        assert list(store.sinks) == list(stored)
        for name, sink in store.sinks.items():
            sink.begin(stored[name][0])
            sink.write(stored[name][1])
            sink.finish()
        settle(source)
        source.stop()
        if served:
            assert engine.ends == [None]
            assert Manifest.from_bytes(engine.manifest).op_kinds == ("bottleneck_group",)
        else:
            [error] = engine.ends
            assert error is not None
            assert "a fusion is served with the adapters that it weighs" in error.message


def test_what_is_no_composition_is_passed_on() -> None:
    store = Store()
    source = make_source(store)
    source.fetch(NAMES[0], Engine(), None)
    source.cancel(NAMES[0])
    source.cancel(DIGEST)
    assert (store.plain, store.cancelled, store.sinks) == ([NAMES[0]], [NAMES[0]], {})
