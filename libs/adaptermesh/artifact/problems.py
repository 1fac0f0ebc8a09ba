"""Reasons to reject an upload, collected so that the uploader learns of all of them at once."""

from collections.abc import Iterable, Sequence

from adaptermesh.core.errors import Code, MeshError, Reason

MAX_REPORTED = 20
_MAX_LENGTH = 500


class Rejection(MeshError):
    """INVALID_ARGUMENT (ADAPTER_REJECTED): an upload was refused; the message has one line a reason."""

    def __init__(self, reasons: Sequence[str], count: int | None = None) -> None:
        self.reasons = tuple(reasons)
        total = len(self.reasons) if count is None else count
        more = f"\n- and {total - len(self.reasons)} more" if total > len(self.reasons) else ""
        super().__init__(
            Code.INVALID_ARGUMENT,
            Reason.ADAPTER_REJECTED,
            "the adapter is rejected:" + "".join(f"\n- {reason}" for reason in self.reasons) + more,
            metadata={"reason_count": str(total)},
        )


class Problems:
    """A bounded list of reasons; those past the bound are counted."""

    def __init__(self) -> None:
        self._reasons: list[str] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, reason: str) -> None:
        """Notes one reason in words the uploader can act on."""
        self._count += 1
        if len(self._reasons) < MAX_REPORTED:
            self._reasons.append(reason if len(reason) <= _MAX_LENGTH else reason[: _MAX_LENGTH - 1] + "…")

    def extend(self, reasons: Iterable[str]) -> None:
        """Notes several reasons."""
        for reason in reasons:
            self.add(reason)

    def raise_if_any(self) -> None:
        """Ends the ingest if there is a reason to.

        Raises:
            Rejection: the reasons.
        """
        if self._count:
            raise self.error()

    def error(self) -> Rejection:
        """The reasons as an error."""
        return Rejection(self._reasons, self._count)


def shown(text: str, limit: int = 160) -> str:
    """A name from an upload as it may stand in a message: quoted, on one line, bounded."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
