"""`adaptermesh adapters verify` and `gc`: whether stored bytes are right, and those that nobody needs."""

import datetime
import re
from typing import Annotated

import typer
from rich.text import Text

from adaptermesh.cli.connections import store_client
from adaptermesh.cli.execute import FAILED, CommandError, execute
from adaptermesh.cli.options import JsonOption, StoreOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import short_digest, size, table
from adaptermesh.cli.version_report import state_note
from adaptermesh.client import BlobCheck, GarbageReport

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def verify(
    ref: Annotated[str, typer.Argument(metavar="[REF]", help="E.g. acme/ner:v2 or acme/ner@prod.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="The store reads every blob again; nothing is downloaded.")
    ] = False,
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Checks the bytes of a version end to end: its manifest, every chunk, every uploaded file.

    All of it is downloaded and compared with its digests, and the store reads its copies again. Nothing is
    kept. One that is revoked or unsigned can be checked, too. Exit code 1 if anything is not what was put.

    Examples:
    adaptermesh adapters verify acme/ner@prod

    adaptermesh adapters verify --all
    """

    async def work(output: Output) -> None:
        if bool(ref) == everything:
            raise CommandError("name a version, or say --all", "`adaptermesh adapters ls` lists the adapters")
        async with store_client(output, store) as client:
            if everything:
                checks = await client.verify_stored()
                _print_checks(output, {"stored": checks}, [("store", check) for check in checks], "the store")
                return
            with output.transfer("verifying") as progress:
                found = await client.verify(ref, progress=progress)
        rows = [("download", check) for check in found.downloaded]
        rows += [("store", check) for check in found.stored]
        _print_checks(output, found, rows, f"{found.version.ref}{state_note(found.version)}")

    execute(as_json, work)


def collect_garbage(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Leave alone what is younger: 90s, 30m, 24h or 7d.")
    ] = "24h",
    store: StoreOption = "",
    as_json: JsonOption = False,
) -> None:
    """Removes stored bytes that no version needs, such as those of uploads that a crash cut off.

    It is safe beside uploads. With a grace that is shorter than an upload takes, some send their bytes again.

    Example: adaptermesh adapters gc --dry-run --grace 1h
    """

    async def work(output: Output) -> None:
        age = _duration(grace)
        async with store_client(output, store) as client:
            report = await client.collect_garbage(grace=age, dry_run=dry_run)
        output.result(report, Text(_garbage_line(report)))

    execute(as_json, work)


def _print_checks(output: Output, document: object, checks: list[tuple[str, BlobCheck]], what: str) -> None:
    """One line for each check, or only for those that failed if they have no names; then the verdict."""
    rows = table("read by", "what", "size", "sha256", "problem", right=("size",))
    for reader, check in checks:
        if check.name or check.problem:
            rows.add_row(
                reader, check.name, size(check.size_bytes), short_digest(check.digest), check.problem or "-"
            )
    wrong = sum(bool(check.problem) for _, check in checks)
    verdict = f"{wrong} of {len(checks)} checks failed" if wrong else f"all {len(checks)} checks passed"
    output.result(document, *([rows] if rows.row_count else []), Text(f"{what}: {verdict}"))
    if wrong:
        raise typer.Exit(FAILED)


def _garbage_line(report: GarbageReport) -> str:
    done = "would be removed" if report.dry_run else "removed"
    parts = [f"{_count(report.removed_blobs, 'blob')} ({size(report.removed_bytes)}) {done}"]
    if report.unfinished_uploads:
        parts.append(f"{_count(report.unfinished_uploads, 'unfinished upload')} {done}")
    if report.expired_uploads:
        parts.append(f"{_count(report.expired_uploads, 'expired upload')} {done}")
    if report.young_blobs:
        parts.append(f"left alone for the grace: {report.young_blobs}")
    parts.append(f"needed: {report.needed_blobs}")
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(text: str) -> datetime.timedelta:
    """A number and a unit; raises CommandError."""
    found = re.fullmatch(r"(\d{1,6})([smhd]?)", text)
    if found is None:
        raise CommandError(f"'{text}' is no time", "write 90s, 30m, 24h or 7d")
    return datetime.timedelta(**{_UNITS[found[2] or "s"]: int(found[1])})
