"""What this machine's model cache knows of base models, without their weights."""

import json
from pathlib import Path

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.cli.execute import CommandError

_FACTS_FILE = "base_model.json"
_MAX_BYTES = 2**20


def cached_base(home: Path, name_or_digest: str) -> BaseFacts | None:
    """The base model with a name or a digest, if it is in the cache.

    Raises:
        CommandError: what the cache says of a model of that name can't be read.
        MeshError: it contradicts itself.
    """
    for path in sorted((home / "models").glob(f"*/{_FACTS_FILE}")):
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
        try:
            facts = json.loads(data)
            known = (facts["model_id"], facts["digest"])
        except (ValueError, LookupError, TypeError) as error:
            if path.parent.name != name_or_digest:
                continue
            hint = f"fetch it again: remove {path.parent}, then `adaptermesh models pull {name_or_digest}`"
            raise CommandError(f"{path} is damaged", hint) from error
        if name_or_digest in known:
            return BaseFacts.from_json(facts)
    return None
