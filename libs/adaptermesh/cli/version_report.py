"""How one version looks in a terminal."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.markdown import Markdown
from rich.text import Text

from adaptermesh.artifact.card_text import split_card
from adaptermesh.cli.tables import facts, moment, short_digest, size, table
from adaptermesh.cli.uploads import with_rank
from adaptermesh.client import Signature, StoreClient, Version, VersionState


@dataclass(frozen=True, slots=True)
class VersionDetails:
    """Everything about one version; `parents` are the versions it was made from, as they are now."""

    version: Version
    aliases: tuple[str, ...]
    card: str
    parents: tuple[Version, ...]
    signatures: tuple[Signature, ...]
    manifest: bytes
    download_count: int = 0

    @property
    def document(self) -> Mapping[str, Any]:
        """The manifest, read."""
        read: Mapping[str, Any] = json.loads(self.manifest)
        return read


async def version_details(store: StoreClient, ref: str) -> VersionDetails:
    """What the store knows of the version that a ref means, whatever its status."""
    resolved = await store.resolve(ref, include_unusable=True)
    parents = json.loads(resolved.manifest).get("parents", ())
    return VersionDetails(
        version=resolved.version,
        aliases=resolved.aliases,
        card=await store.card(resolved.version),
        parents=tuple([(await store.resolve_digest(digest)).version for digest in parents]),
        signatures=tuple(await store.list_signatures(resolved.version.digest)),
        manifest=resolved.manifest,
        download_count=(await store.download_counts([resolved.version.digest]))[0],
    )


def _recipe(manifest: Mapping[str, Any]) -> str:
    """How a version was merged, in a line; "" for one that was not."""
    recipe = manifest.get("merge_recipe")
    if not recipe:
        return ""
    members = " + ".join(f"{one['weight']:g} * {short_digest(one['digest'])}" for one in recipe["members"])
    numbers = [
        f", {name} {recipe[name]:g}" for name in ("rank", "density", "seed") if recipe[name] is not None
    ]
    return f"{recipe['method']} of {members}{''.join(numbers)}"


def status_text(version: Version) -> str:
    """A version's status and what to do about it, in a line."""
    status = version.status
    by = f", set by {status.actor}" if status.actor else ""
    when = f" ({moment(status.update_time)}{by})" if status.update_time is not None else ""
    why = f": {status.reason}" if status.reason else ""
    instead = f"; use {status.replacement}" if status.replacement else ""
    return f"{status.state}{why}{instead}{when}"


def state_note(version: Version) -> str:
    """A status in brackets; nothing for a version like any other."""
    return "" if version.status.state is VersionState.ACTIVE else f" ({version.status.state})"


def _signature(signature: Signature) -> str:
    by = f" {signature.actor}" if signature.actor else ""
    note = "" if signature.trusted else " (not trusted any more)"
    return f"{signature.key_id}{by} {moment(signature.create_time)}{note}"


def _parent(version: Version) -> str:
    return f"{version.ref}{state_note(version)} {short_digest(version.digest)}"


def _metrics(manifest: Mapping[str, Any]) -> list[RenderableType]:
    metrics = manifest.get("metrics", ())
    if not metrics:
        return []
    rows = table("task", "data set", "split", "metric", "value", right=("value",))
    for one in metrics:
        value = "" if one["value"] is None else f"{one['value']:g}"
        rows.add_row(one["task"], one["dataset"], one["split"], one["metric"], value)
    return ["", rows]


def _card(text: str, *, pretty: bool) -> list[RenderableType]:
    """What stands below the front matter, of which the rest of the report is made."""
    _, body = split_card(text)
    # A stranger's text must not steer the terminal.
    body = "".join(letter for letter in body if letter.isprintable() or letter in "\n\t").strip()
    if not body:
        return []
    return ["", Markdown(body, hyperlinks=False) if pretty else Text(body)]


def version_report(details: VersionDetails, *, pretty: bool) -> list[RenderableType]:
    """Everything about one version; with `pretty` the card's Markdown is laid out."""
    version, manifest = details.version, details.document
    files = table("file", "size", "sha256", right=("size",))
    for file in version.source_files:
        files.add_row(file.path, size(file.size_bytes), short_digest(file.digest))
    return [
        facts(
            version=version.ref,
            digest=version.digest,
            status=status_text(version),
            aliases=", ".join(details.aliases),
            task=version.task,
            description=version.description,
            tags=", ".join(version.tags),
            license=version.license,
            languages=", ".join(manifest.get("languages", ())),
            trained_on=", ".join(one["name"] for one in manifest.get("training_data", ())),
            base=f"{version.base_model_id} ({version.base_digest})",
            kind=with_rank(version, f"{version.kind} ({', '.join(version.op_kinds)})"),
            size=size(version.size_bytes),
            servable="yes" if version.servable else f"no: {version.unservable_reason}",
            warnings="; ".join(version.warnings),
            parents="\n".join(map(_parent, details.parents)),
            merged=_recipe(manifest),
            signed_by="\n".join(map(_signature, details.signatures)),
            published=moment(version.create_time),
            downloads=str(details.download_count),
        ),
        *_metrics(manifest),
        "",
        files,
        *_card(details.card, pretty=pretty),
    ]
