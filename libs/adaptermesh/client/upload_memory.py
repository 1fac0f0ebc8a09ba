"""Uploads that have begun, remembered on disk, so that another process can continue them."""

import json
import os
import uuid
from pathlib import Path

from adaptermesh.core.digests import digest_json


def default_folder() -> Path:
    """Where they are remembered if nothing else is said."""
    return Path.home() / ".adaptermesh" / "uploads"


class UploadMemory:
    """One small file for each upload, by the store's address and the digest of what is uploaded. Blocks."""

    def __init__(self, folder: Path, target: str, header_digest: str) -> None:
        name = digest_json([target, header_digest]).removeprefix("sha256:")
        self._file = folder / f"{name[:32]}.json"
        self._about = {"store": target, "header": header_digest}

    def recall(self) -> str | None:
        """The upload's id; None if it is not remembered, or the file can't be read."""
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or {name: found.get(name) for name in self._about} != self._about:
            return None
        upload_id = found.get("upload_id")
        return upload_id if isinstance(upload_id, str) and upload_id else None

    def keep(self, upload_id: str) -> None:
        """Remembers the id, which is a secret: nobody else may read the file."""
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._file.with_name(f".{uuid.uuid4().hex}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump({**self._about, "upload_id": upload_id}, file)
        temporary.replace(self._file)

    def forget(self) -> None:
        """Nothing happens if it is not remembered."""
        self._file.unlink(missing_ok=True)
