"""From uploaded files to the canonical form, with every check on the way."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.artifact.base_copies import digest_copies
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.card import CardFacts, card_facts
from adaptermesh.artifact.card_text import card_is_empty
from adaptermesh.artifact.chunking import cut, hash_spans
from adaptermesh.artifact.manifest import MAX_MANIFEST_BYTES, BaseRef, Cost, Manifest, Source, TensorEntry
from adaptermesh.artifact.merging_recipe import MergeRecipe, check_lineage
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.problems import Problems, Rejection, shown
from adaptermesh.artifact.safetensors_file import lay_out, write_file
from adaptermesh.artifact.sites import site_map
from adaptermesh.artifact.source_files import card_text, check_files, describe_files, layout_of
from adaptermesh.artifact.source_formats import SourceConfig, read_source
from adaptermesh.artifact.uploaded import Uploaded, read_tensor_files
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import MeshError, Reason, base_mismatch, invalid_field
from adaptermesh.core.refs import check_name

CANONICAL_FORMAT = "adaptermesh.canonical.v1"
MAX_DESCRIPTION_BYTES = 4096
MAX_TEXT_LENGTH = 256
MAX_TAGS = 32
MAX_TAG_LENGTH = 64


@dataclass(frozen=True, slots=True)
class SourceBundle:
    """An upload: its files by their relative path, already on disk, and what the publisher says of it.

    `parents` are the digests of the versions it was made from; whether they exist is the caller's to check.
    """

    files: Mapping[str, Path]
    namespace: str
    name: str
    task: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()
    license: str = ""
    author: str = ""
    parents: tuple[str, ...] = ()
    merge_recipe: MergeRecipe | None = None


@dataclass(frozen=True, slots=True)
class IngestResult:
    """The manifest, and what was found that does not stop the upload."""

    manifest: Manifest
    warnings: tuple[str, ...]


def ingest(bundle: SourceBundle, base: BaseFacts, out_file: Path) -> IngestResult:
    """Checks an upload and writes its canonical tensor file to `out_file`.

    Takes as long as reading and writing the weights, in bounded memory; call it from a thread. A kind that
    can't be served passes the checks of its files and gives a manifest with `servable` False.

    Raises:
        MeshError: INVALID_ARGUMENT (ADAPTER_REJECTED with every reason, or INVALID_NAME, INVALID_FIELD for
            the publisher's fields); FAILED_PRECONDITION (BASE_MISMATCH) if the files name another base by
            digest.
    """
    _check_fields(bundle)
    problems = Problems()
    check_files(bundle.files, problems)
    problems.raise_if_any()
    upload = read_tensor_files(bundle.files, layout_of(bundle.files), problems)
    config = read_source(upload, base, problems)
    if config is None or len(upload.headers) < sum(map(upload.layout.has_tensors, bundle.files)):
        raise problems.error()
    _check_base(bundle, config, base)
    plan = _plan(config, upload, base, problems)
    problems.raise_if_any()
    card = card_text(bundle.files)
    facts = card_facts(card)
    manifest = _write(_with_card(bundle, facts), facts, config, base, plan, upload, out_file)
    return IngestResult(manifest, (*_warnings(manifest, plan, upload.all_zero, card), *facts.warnings))


def _with_card(bundle: SourceBundle, card: CardFacts) -> SourceBundle:
    """The bundle with what its card says where the publisher said nothing, and with the tags of both."""
    new = [tag for tag in card.tags if tag not in bundle.tags]
    tags = (*bundle.tags, *new[: max(0, MAX_TAGS - len(bundle.tags))])
    return dataclasses.replace(bundle, license=bundle.license or card.license, tags=tags)


def _check_fields(bundle: SourceBundle) -> None:
    check_name(bundle.namespace, "namespace")
    check_name(bundle.name, "name")
    for field, text in (("task", bundle.task), ("license", bundle.license), ("author", bundle.author)):
        if len(text) > MAX_TEXT_LENGTH or not text.isprintable():
            raise invalid_field(field, f"needs at most {MAX_TEXT_LENGTH} printable characters")
    if len(bundle.description.encode(errors="replace")) > MAX_DESCRIPTION_BYTES:
        raise invalid_field("description", f"has more than {MAX_DESCRIPTION_BYTES} bytes")
    if len(bundle.tags) > MAX_TAGS or len(set(bundle.tags)) != len(bundle.tags):
        raise invalid_field("tags", f"needs at most {MAX_TAGS} different tags")
    for tag in bundle.tags:
        if not 0 < len(tag) <= MAX_TAG_LENGTH or not tag.isprintable():
            raise invalid_field("tags", f"{shown(tag, 80)} needs 1 to {MAX_TAG_LENGTH} printable characters")
    check_lineage(bundle.parents, bundle.merge_recipe)


def _check_base(bundle: SourceBundle, config: SourceConfig, base: BaseFacts) -> None:
    """A config may name its base by digest instead of by a path; then it must be this one."""
    named = config.named_base
    if isinstance(named, str) and is_digest(named) and named != base.digest:
        raise base_mismatch(f"{bundle.namespace}/{bundle.name}", named, base.digest)


def _plan(config: SourceConfig, upload: Uploaded, base: BaseFacts, problems: Problems) -> Plan:
    if config.unservable:
        return Plan(unservable=config.unservable)
    try:
        sites = site_map(base, encoders=True)
    except MeshError as error:
        if error.reason is not Reason.ADAPTER_UNSUPPORTED:
            raise
        return Plan(unservable=error.message)
    return config.plan(upload, sites, base, problems)


def _write(
    bundle: SourceBundle,
    card: CardFacts,
    config: SourceConfig,
    base: BaseFacts,
    plan: Plan,
    upload: Uploaded,
    out_file: Path,
) -> Manifest:
    layout = lay_out([tensor.spec for tensor in plan.tensors], {"format": CANONICAL_FORMAT})
    source = upload.layout
    # What has no file of its own tensors has no planned ones either.
    with bundle.files[source.weights or source.config].open("rb") as file:
        write_file(out_file, layout, (tensor.blocks(file) for tensor in plan.tensors))
    layered = [(entry, tensor.layer) for entry, tensor in zip(layout.entries, plan.tensors, strict=True)]
    chunks = hash_spans(out_file, cut(layered, layout.file_size))
    versions = {source.library: config.version} if config.version else {}
    manifest = Manifest(
        namespace=bundle.namespace,
        name=bundle.name,
        task=bundle.task,
        description=bundle.description,
        author=bundle.author,
        license=bundle.license,
        tags=tuple(sorted(bundle.tags)),
        languages=card.languages,
        training_data=card.training_data,
        metrics=card.metrics,
        base=BaseRef.from_facts(base),
        source=Source(source.library, versions, config.raw, describe_files(bundle.files)),
        kind=config.kind,
        servable=not plan.unservable,
        unservable_reason=plan.unservable,
        op_kinds=tuple(sorted({module.op for module in plan.modules})),
        modules=plan.modules,
        activation=plan.activation,
        tensors=layout.entries,
        chunks=chunks,
        size_bytes=layout.file_size,
        cost=_cost(plan, layout.entries),
        head=config.head,
        composition=plan.composition,
        parents=bundle.parents,
        merge_recipe=None if bundle.merge_recipe is None else bundle.merge_recipe.to_json(),
        same_as_base=digest_copies(plan.copies, bundle.files),
    )
    return _readable(manifest)


def _cost(plan: Plan, tensors: Sequence[TensorEntry]) -> Cost:
    return Cost(
        device_bytes=sum(tensor.size for tensor in tensors),
        max_rank=max((module.rank for module in plan.modules), default=0),
    )


def _readable(manifest: Manifest) -> Manifest:
    """Reads the manifest back as everyone after this will: what can't be read must not be published."""
    data = manifest.to_bytes()
    if len(data) > MAX_MANIFEST_BYTES:
        raise Rejection([f"its manifest would have {len(data)} bytes, more than {MAX_MANIFEST_BYTES}"])
    return Manifest.from_bytes(data)


def _warnings(manifest: Manifest, plan: Plan, all_zero: frozenset[str], card: str) -> tuple[str, ...]:
    warnings: list[str] = []
    idle, modules = sum(name in all_zero for name in plan.deciding), len(plan.deciding)
    if idle and idle == modules:
        warnings.append(f"every {plan.decider} is zero: the adapter changes nothing")
    elif idle:
        warnings.append(f"{plan.decider} is zero in {idle} of {modules} modules: they change nothing")
    if not manifest.license:
        warnings.append("no licence is given")
    if card_is_empty(card):
        warnings.append("the card (README.md) is absent or empty")
    return tuple(warnings)
