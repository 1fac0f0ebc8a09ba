"""What has become of an upload session, as it is kept for those who ask again."""

import json
from dataclasses import dataclass
from typing import Any, Self

from adaptermesh.core.errors import Code, MeshError, Reason

_MAX_MESSAGE = 16 * 1024


@dataclass(frozen=True, slots=True)
class SessionOutcome:
    """The digest of the version that it has become, or why it was refused."""

    digest: str = ""
    created: bool = False
    refusal: MeshError | None = None

    def to_json(self) -> str:
        if self.refusal is None:
            return json.dumps({"digest": self.digest, "created": self.created})
        error = self.refusal
        refusal: dict[str, Any] = {
            "code": int(error.code),
            "reason": error.reason.value,
            "message": error.message[:_MAX_MESSAGE],
            "metadata": error.metadata,
        }
        return json.dumps({"refusal": refusal})

    @classmethod
    def from_json(cls, text: str) -> Self:
        value = json.loads(text)
        refusal = value.get("refusal")
        if refusal is None:
            return cls(value["digest"], value["created"])
        code, reason = Code(refusal["code"]), Reason(refusal["reason"])
        return cls(refusal=MeshError(code, reason, refusal["message"], metadata=refusal["metadata"]))
