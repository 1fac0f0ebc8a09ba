"""How an upload's outcome looks in a terminal."""

from rich.text import Text

from adaptermesh.cli.tables import size
from adaptermesh.client import UploadResult, Version


def upload_report(result: UploadResult, adapter: str, *, check: bool) -> list[Text]:
    """What became of an upload: a headline, then lines about it."""
    version = result.version
    if check:
        lines = [Text(f"{adapter}: every check passed, nothing was published", style="green")]
    elif result.created:
        lines = [Text(f"{version.ref} published", style="green")]
    else:
        lines = [Text(f"{version.ref} was there already: same content, same version")]
    lines.append(Text(f"  {version.digest}  {with_rank(version, version.kind)}, {size(version.size_bytes)}"))
    if not version.servable:
        lines.append(Text(f"  stored, but can't be served: {version.unservable_reason}", style="yellow"))
    lines += [Text(f"  warning: {warning}", style="yellow") for warning in version.warnings]
    if result.created and not check:
        alias = f"adaptermesh alias set {version.adapter}@prod v{version.number}"
        lines.append(Text(f"  next: {alias}", style="dim"))
    return lines


def with_rank(version: Version, kind: str) -> str:
    """What has no low-rank part has no rank."""
    return f"{kind}, rank {version.max_rank}" if version.max_rank else kind
