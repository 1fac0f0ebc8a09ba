"""A package becomes a version of a store: the same one, or the same under another name."""

from typing import TYPE_CHECKING

from adaptermesh.client.package import Package
from adaptermesh.client.records import Imported
from adaptermesh.client.transfer import ProgressCallback
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName

if TYPE_CHECKING:
    from adaptermesh.client.store import StoreClient

_NOT_HERE = (Reason.SIGNING_KEY_NOT_FOUND, Reason.SIGNATURE_INVALID, Reason.INVALID_FIELD)


async def publish_package(
    store: "StoreClient",
    package: Package,
    adapter: AdapterName,
    *,
    actor: str = "",
    validate_only: bool = False,
    progress: ProgressCallback | None = None,
) -> Imported:
    """Uploads a package; the store publishes it only if it gets the digest that follows from the manifest.

    Under its own name that is the digest it had. Then its signatures hold, too: those of keys that the
    namespace trusts there are added.

    Raises:
        MeshError: NOT_FOUND (BASE_NOT_FOUND) if the store does not know its base, or (VERSION_NOT_FOUND) what
            it was made from; FAILED_PRECONDITION (DIGEST_MISMATCH) if the store makes something else of it.
    """
    base = await known_base(store, package)
    expected = package.digest_as(adapter, base)
    done = await store.publish(
        adapter,
        package.publication,
        package.files,
        lineage=package.lineage,
        expected_digest=expected,
        validate_only=validate_only,
        progress=progress,
    )
    same = done.version.digest == package.manifest.digest
    kept, dropped = (
        await _sign(store, package, done.version.digest, actor)
        if same and not validate_only
        else ((), tuple(one.key_id for one in package.signatures))
    )
    return Imported(
        version=done.version,
        created=done.created,
        feed_position=done.feed_position,
        source=package.ref,
        source_digest=package.manifest.digest,
        signed_by=kept,
        signatures_left=dropped,
    )


async def known_base(store: "StoreClient", package: Package) -> str:
    """The name by which a store knows a package's base; raises MeshError BASE_NOT_FOUND."""
    base = package.manifest.base
    for known in await store.list_base_models():
        if known.digest == base.digest:
            return known.model_id
    raise MeshError(
        Code.NOT_FOUND,
        Reason.BASE_NOT_FOUND,
        f"'{package.ref}' was trained on {base.model_id} ({base.digest}), which the store at {store.target} "
        "does not know: start a worker there that serves it, or copy it with its base",
        metadata={"name": base.model_id, "digest": base.digest},
    )


async def _sign(
    store: "StoreClient", package: Package, digest: str, actor: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys whose signatures are there now, and those whose signatures the store does not take."""
    kept, dropped = [], []
    for one in package.signatures:
        try:
            await store.add_signature(digest, one.key_id, bytes.fromhex(one.signature), actor=actor)
        except MeshError as error:
            if error.reason not in _NOT_HERE:
                raise
            dropped.append(one.key_id)
        else:
            kept.append(one.key_id)
    return tuple(kept), tuple(dropped)
