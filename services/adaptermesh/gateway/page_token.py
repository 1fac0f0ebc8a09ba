"""Opaque page tokens of ListModels: which page of the store comes next, and after which model to go on."""

import base64
import binascii
import json
from dataclasses import dataclass

from adaptermesh.core.errors import invalid_field

_MAX_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Where a list was left."""

    bases_after: str | None = None
    """Base models after this `model_id digest` are still to come; None when all have been listed."""
    store_token: str = ""
    after_adapter: str = ""
    """The adapter that the store's page begins with, if some of its versions have been listed already."""
    after_number: int = 0
    """The last of its versions that has been listed; they are listed newest first."""


START = Place(bases_after="")


def encode(place: Place) -> str:
    fields = [place.bases_after, place.store_token, place.after_adapter, place.after_number]
    return base64.urlsafe_b64encode(json.dumps(fields, separators=(",", ":")).encode()).decode()


def decode(token: str) -> Place:
    """The place that a token stands for; the start for an empty one.

    Raises:
        MeshError: INVALID_ARGUMENT if the token is not one of ours.
    """
    if not token:
        return START
    if len(token) > _MAX_LENGTH:
        raise _not_ours()
    try:
        fields = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error) as error:
        raise _not_ours() from error
    match fields:
        case [
            None | str() as bases_after,
            str() as store_token,
            str() as after_adapter,
            int() as after_number,
        ]:
            return Place(bases_after, store_token, after_adapter, after_number)
        case _:
            raise _not_ours()


def _not_ours() -> Exception:
    return invalid_field("page_token", "not a token of an earlier page")
