"""What a base model is called: on the command line, and as a folder of the cache."""

import re

from adaptermesh.core.errors import Code, MeshError, Reason

_MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_repository(name: str) -> bool:
    """Whether a name reads `ORG/NAME`, as on the Hugging Face hub."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name


def check_model_id(model_id: str) -> str:
    """Returns the id if it is safe as a folder name.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_NAME).
    """
    if _MODEL_ID.fullmatch(model_id) is None or ".." in model_id:
        raise MeshError(
            Code.INVALID_ARGUMENT,
            Reason.INVALID_NAME,
            f"{model_id[:96]!r} is not a legal model id: lower-case letters, digits, '.', '_' and '-', at "
            "most 96, starting with a letter or a digit",
            metadata={"field": "model_id", "name": model_id[:96]},
        )
    return model_id


def model_id_of(name: str) -> str:
    """The id of a hub repository or of a folder: lower case, `/` becomes `--`, the rest that is illegal `-`.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_NAME): nothing legal is left.
    """
    flat = re.sub(r"[^a-z0-9._-]+", "-", name.strip().lower().replace("/", "--"))
    return check_model_id(re.sub(r"\.{2,}", ".", flat).strip("-._"))
