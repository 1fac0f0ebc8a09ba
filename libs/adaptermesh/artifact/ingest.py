"""From uploaded files to the canonical form, with every check on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.chunking import cut, hash_spans
from adaptermesh.artifact.manifest import (
    MAX_MANIFEST_BYTES,
    Activation,
    BaseRef,
    Cost,
    Manifest,
    Source,
    TensorEntry,
)
from adaptermesh.artifact.peft_config import PeftConfig, read_config
from adaptermesh.artifact.peft_methods import VirtualConfig
from adaptermesh.artifact.peft_plan import Plan
from adaptermesh.artifact.peft_readers import plan_method
from adaptermesh.artifact.peft_virtual import plan_virtual
from adaptermesh.artifact.problems import Problems, Rejection, shown
from adaptermesh.artifact.safetensors_file import Header, lay_out, read_header, write_file
from adaptermesh.artifact.sites import site_map
from adaptermesh.artifact.source_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    card_is_empty,
    check_files,
    describe_files,
)
from adaptermesh.artifact.tensor_scan import scan_tensor
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
    """An upload: its files by their relative path, already on disk, and what the publisher says of it."""

    files: Mapping[str, Path]
    namespace: str
    name: str
    task: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()
    license: str = ""
    author: str = ""


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
    weights = bundle.files[WEIGHTS_FILE]
    header = _read_weights_header(weights, problems)
    all_zero = _scan(weights, header, problems) if header is not None else frozenset()
    config = read_config(bundle.files[CONFIG_FILE], problems)
    if config is None or header is None:
        raise problems.error()
    _check_base(bundle, config, base)
    plan = _plan(config, header, base, problems)
    problems.raise_if_any()
    manifest = _write(bundle, config, base, plan, out_file)
    return IngestResult(manifest, _warnings(bundle, plan, all_zero))


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


def _read_weights_header(weights: Path, problems: Problems) -> Header | None:
    try:
        header = read_header(weights)
    except Rejection as error:
        problems.extend(f"{WEIGHTS_FILE}: {reason}" for reason in error.reasons)
        return None
    if not header.tensors:
        problems.add(f"{WEIGHTS_FILE} holds no tensors")
    return header


def _scan(weights: Path, header: Header, problems: Problems) -> frozenset[str]:
    """Notes every tensor with a value that is not finite; returns the names of those that are all zero."""
    all_zero: set[str] = set()
    with weights.open("rb") as file:
        for entry in header.tensors.values():
            scan = scan_tensor(file, entry)
            if scan.not_finite_at is not None:
                problems.add(
                    f"tensor {shown(entry.name)} has NaN or infinity at flat index {scan.not_finite_at}, "
                    "expected finite values: the training may have diverged"
                )
            if scan.all_zero:
                all_zero.add(entry.name)
    return frozenset(all_zero)


def _check_base(bundle: SourceBundle, config: PeftConfig, base: BaseFacts) -> None:
    """A config may name its base by digest instead of by a path; then it must be this one."""
    named = config.raw.get("base_model_name_or_path")
    if isinstance(named, str) and is_digest(named) and named != base.digest:
        raise base_mismatch(f"{bundle.namespace}/{bundle.name}", named, base.digest)


def _plan(config: PeftConfig, header: Header, base: BaseFacts, problems: Problems) -> Plan:
    if config.method is None:
        return Plan(unservable=config.unservable)
    try:
        sites = site_map(base)
    except MeshError as error:
        if error.reason is not Reason.ADAPTER_UNSUPPORTED:
            raise
        return Plan(unservable=error.message)
    name = f"base model '{base.model_id}' ({base.architecture})"
    if isinstance(config.method, VirtualConfig):
        return plan_virtual(config.method, header.tensors, base, name, problems)
    plan = plan_method(config.method, header.tensors, sites, name, problems)
    if plan.activation is not None:
        _check_activation(plan.activation, base, name, problems)
    return plan


def _check_activation(activation: Activation, base: BaseFacts, name: str, problems: Problems) -> None:
    for token in activation.invocation_tokens:
        if token >= base.vocab_size:
            problems.add(
                f"adapter_config.json: alora_invocation_tokens has token {token}, "
                f"but {name} has tokens 0 to {base.vocab_size - 1}"
            )


def _write(bundle: SourceBundle, config: PeftConfig, base: BaseFacts, plan: Plan, out_file: Path) -> Manifest:
    layout = lay_out([tensor.spec for tensor in plan.tensors], {"format": CANONICAL_FORMAT})
    with bundle.files[WEIGHTS_FILE].open("rb") as source:
        write_file(
            out_file,
            layout,
            (tensor.blocks(source) for tensor in plan.tensors),
        )
    layered = [(entry, tensor.layer) for entry, tensor in zip(layout.entries, plan.tensors, strict=True)]
    chunks = hash_spans(out_file, cut(layered, layout.file_size))
    versions = {"peft": config.peft_version} if config.peft_version else {}
    manifest = Manifest(
        namespace=bundle.namespace,
        name=bundle.name,
        task=bundle.task,
        description=bundle.description,
        author=bundle.author,
        license=bundle.license,
        tags=tuple(sorted(bundle.tags)),
        base=BaseRef.from_facts(base),
        source=Source("peft", versions, config.raw, describe_files(bundle.files)),
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


def _warnings(bundle: SourceBundle, plan: Plan, all_zero: frozenset[str]) -> tuple[str, ...]:
    warnings: list[str] = []
    idle, modules = sum(name in all_zero for name in plan.deciding), len(plan.deciding)
    if idle and idle == modules:
        warnings.append(f"every {plan.decider} is zero: the adapter changes nothing")
    elif idle:
        warnings.append(f"{plan.decider} is zero in {idle} of {modules} modules: they change nothing")
    if not bundle.license:
        warnings.append("no licence is given")
    if card_is_empty(bundle.files):
        warnings.append("the card (README.md) is absent or empty")
    return tuple(warnings)
