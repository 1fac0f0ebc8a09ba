"""How one version looks in a terminal."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from adaptermesh.cli.tables import facts, moment, short_digest, size, table
from adaptermesh.cli.uploads import with_rank
from adaptermesh.client import ResolvedRef, Version


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


def version_report(resolved: ResolvedRef) -> list[RenderableType]:
    """Everything about one version."""
    version = resolved.version
    manifest = json.loads(resolved.manifest)
    files = table("file", "size", "sha256", right=("size",))
    for file in version.source_files:
        files.add_row(file.path, size(file.size_bytes), short_digest(file.digest))
    return [
        facts(
            version=version.ref,
            digest=version.digest,
            status=status_text(version),
            aliases=", ".join(resolved.aliases),
            task=version.task,
            description=version.description,
            tags=", ".join(version.tags),
            license=version.license,
            base=f"{version.base_model_id} ({version.base_digest})",
            kind=with_rank(version, f"{version.kind} ({', '.join(version.op_kinds)})"),
            size=size(version.size_bytes),
            servable="yes" if version.servable else f"no: {version.unservable_reason}",
            warnings="; ".join(version.warnings),
            parents="\n".join(manifest.get("parents", ())),
            merged=_recipe(manifest),
            published=moment(version.create_time),
        ),
        "",
        files,
    ]
