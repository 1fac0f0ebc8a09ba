"""The moment by which a request must have ended, shared by every wait on its way."""

import asyncio
from dataclasses import dataclass

from adaptermesh.core.errors import Code, MeshError, Reason


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the running loop's clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(asyncio.get_running_loop().time() + seconds)

    def remaining(self, limit: float | None = None) -> float:
        """Seconds that are left, at most `limit`.

        Raises:
            MeshError: DEADLINE_EXCEEDED if none are.
        """
        left = self.at - asyncio.get_running_loop().time()
        if left <= 0:
            raise deadline_exceeded()
        return left if limit is None else min(left, limit)


def deadline_exceeded() -> MeshError:
    return MeshError(Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED, "the request's deadline has passed")
