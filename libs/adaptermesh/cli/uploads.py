"""How an upload's outcome looks in a terminal."""

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.tables import facts, short_digest, size, table
from adaptermesh.client import UploadResult, Version

if TYPE_CHECKING:
    # It needs numpy, which most commands do without.
    from adaptermesh.client.dry_run import DryRun


def upload_report(result: UploadResult, adapter: str, *, check: bool) -> list[Text]:
    """What became of an upload: a headline, then lines about it."""
    version = result.version
    if check:
        lines = [Text(f"{adapter}: every check passed, nothing was published", style="green")]
    elif result.created:
        lines = [Text(f"{version.ref} published", style="green")]
    else:
        lines = [Text(f"{version.ref} was there already: same content, same version")]
    if result.resumed_bytes:
        lines.append(Text(f"  continued: {size(result.resumed_bytes)} had been sent before"))
    lines.append(Text(f"  {version.digest}  {with_rank(version, version.kind)}, {size(version.size_bytes)}"))
    if not version.servable:
        lines.append(Text(f"  stored, but can't be served: {version.unservable_reason}", style="yellow"))
    lines += [Text(f"  warning: {warning}", style="yellow") for warning in version.warnings]
    if result.created and not check:
        alias = f"adaptermesh alias set {version.adapter}@prod v{version.number}"
        lines.append(Text(f"  next: {alias}", style="dim"))
    return lines


def dry_run_report(trial: "DryRun") -> list[RenderableType]:
    """What would be uploaded: a headline, what it is, its files, then warnings."""
    rank = f", rank {trial.max_rank}" if trial.max_rank else ""
    files = table("file", "size", "sha256", right=("size",))
    for file in trial.files:
        files.add_row(file.path, size(file.size_bytes), short_digest(file.digest))
    lines: list[RenderableType] = [
        Text(f"{trial.adapter}: every check passed, nothing was sent", style="green"),
        facts(
            digest=trial.digest,
            base=f"{trial.base_model_id} ({short_digest(trial.base_digest)})",
            kind=f"{trial.kind}{rank}",
            acts_at=f"{', '.join(trial.sites)} ({trial.modules} modules)" if trial.sites else "",
            license=trial.license,
            tags=", ".join(trial.tags),
            size=f"{size(trial.upload_bytes)} to send, {size(trial.size_bytes)} to serve",
        ),
        files,
    ]
    if not trial.servable:
        lines.append(Text(f"would be stored, but can't be served: {trial.unservable_reason}", style="yellow"))
    return [*lines, *(Text(f"warning: {warning}", style="yellow") for warning in trial.warnings)]


def with_rank(version: Version, kind: str) -> str:
    """What has no low-rank part has no rank."""
    return f"{kind}, rank {version.max_rank}" if version.max_rank else kind
