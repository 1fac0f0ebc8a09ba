"""From the wire to a request: every field is checked here, and an error names the field's path."""

import re
from collections.abc import Mapping

from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.core.choices import check_choices
from adaptermesh.core.composition import is_composition, parse_composition
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field
from adaptermesh.core.priority import check_priority
from adaptermesh.core.refs import BASE, NAME_PATTERN, parse_ref
from adaptermesh.core.roles import DEFAULT_TENANT
from adaptermesh.gateway.request import Caller, ChatTurn, GenerateCall, Identity, Prompt, Target
from adaptermesh.rpc import metadata as names
from adaptermesh.rpc.sampling import read_sampling

MAX_TEXT_BYTES = 2**20
MAX_CHAT_TURNS = 1024
MAX_TOKEN_IDS = 131072
MAX_COHORT_KEY = 256
MAX_BASE_MODEL = 256
ROLES = ("system", "user", "assistant")

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_NAME = re.compile(NAME_PATTERN)
_POSITION = re.compile(r"[0-9]{1,18}")


def is_request_id(text: str) -> bool:
    """Whether a caller may name its request so: it ends up in headers, logs and traces."""
    return _REQUEST_ID.fullmatch(text) is not None


def read_caller(metadata: Mapping[str, str], request_id: str, identity: Identity | None = None) -> Caller:
    """What the metadata asks for.

    Args:
        metadata: what came with the request.
        request_id: the caller's if it sent a legal one, else a fresh one.
        identity: who it has shown to be; None where nobody was asked.

    Raises:
        MeshError: INVALID_ARGUMENT with the metadata key as the field; PERMISSION_DENIED for another tenant.
    """
    given_id = metadata.get(names.REQUEST_ID, "")
    if given_id and not is_request_id(given_id):
        raise invalid_field(
            names.REQUEST_ID,
            "1 to 128 letters, digits, '.', '_', ':' and '-', starting with a letter or digit",
        )
    tenant = _read_tenant(metadata.get(names.TENANT, ""), identity)
    cohort_key = metadata.get(names.COHORT_KEY, "")
    if len(cohort_key) > MAX_COHORT_KEY:
        raise invalid_field(names.COHORT_KEY, f"longer than {MAX_COHORT_KEY} characters")
    return Caller(
        request_id=request_id,
        tenant=tenant,
        target=_read_target(metadata),
        cohort_key=cohort_key,
        min_feed_position=_read_position(metadata.get(names.FEED_POSITION, "")),
        identity=identity,
    )


def read_generate(request: inference_pb2.GenerateRequest, caller: Caller) -> GenerateCall:
    """The request to generate.

    Raises:
        MeshError: INVALID_ARGUMENT with the field's path.
    """
    if len(request.base_model) > MAX_BASE_MODEL:
        raise invalid_field("base_model", f"longer than {MAX_BASE_MODEL} characters")
    return GenerateCall(
        caller=caller,
        prompt=_read_prompt(request),
        sampling=read_sampling(request.sampling).check(),
        base_model=request.base_model,
        priority=check_priority(request.priority),
        n=check_choices(request.n or 1),
    )


def _read_tenant(asked: str, identity: Identity | None) -> str:
    """Whom the request is for: the key's tenant; an operator may act for any."""
    if asked:
        _check_name(names.TENANT, asked)
    if identity is None or identity.is_operator:
        return asked or DEFAULT_TENANT
    if asked not in ("", identity.tenant):
        raise MeshError(
            Code.PERMISSION_DENIED,
            Reason.PERMISSION_DENIED,
            f"{names.TENANT}: the API key is one of tenant '{identity.tenant}', not of '{asked}'",
            metadata={"field": names.TENANT, "tenant": identity.tenant},
        )
    return identity.tenant


def _read_target(metadata: Mapping[str, str]) -> Target:
    task = metadata.get(names.TASK, "")
    if task:
        _check_name(names.TASK, task)
    ref = metadata.get(names.ADAPTER, "")
    if not ref:
        return Target(task=task)
    if ref != BASE:
        _check_ref(ref)
    return Target(ref=ref)


def _check_name(field: str, name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise MeshError(
            Code.INVALID_ARGUMENT,
            Reason.INVALID_NAME,
            f"{field}: {name[:80]!r} is not a legal name: lower-case letters, digits and hyphens, "
            "at most 63, not starting with a hyphen",
            metadata={"field": field, "name": name[:80]},
        )


def _check_ref(ref: str) -> None:
    try:
        if is_composition(ref):
            parse_composition(ref)
        else:
            parse_ref(ref)
    except MeshError as error:
        about = {**error.metadata, "field": names.ADAPTER}
        message = f"{names.ADAPTER}: {error.message}"
        raise MeshError(error.code, error.reason, message, metadata=about) from error


def _read_position(text: str) -> int:
    if not text:
        return 0
    if _POSITION.fullmatch(text) is None:
        raise invalid_field(names.FEED_POSITION, f"{text[:80]!r} is not a position of the change feed")
    return int(text)


def _read_prompt(request: inference_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            _check_size("text", len(request.text.encode()))
            return Prompt(text=request.text)
        case "chat":
            return Prompt(chat=_read_chat(request.chat))
        case "token_ids":
            return Prompt(token_ids=_read_token_ids(request.token_ids))
        case _:
            raise invalid_field("input", "one of text, chat and token_ids is needed")


def _read_chat(chat: inference_pb2.Chat) -> tuple[ChatTurn, ...]:
    if not 1 <= len(chat.messages) <= MAX_CHAT_TURNS:
        raise invalid_field(
            "chat.messages", f"{len(chat.messages)} messages are not in [1, {MAX_CHAT_TURNS}]"
        )
    turns = tuple(ChatTurn(message.role, message.content) for message in chat.messages)
    for index, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise invalid_field(
                f"chat.messages[{index}].role", f"{turn.role[:40]!r} is not one of {', '.join(ROLES)}"
            )
    _check_size("chat.messages", sum(len(turn.content.encode()) for turn in turns))
    return turns


def _read_token_ids(token_ids: inference_pb2.TokenIds) -> tuple[int, ...]:
    ids = tuple(token_ids.ids)
    if not 1 <= len(ids) <= MAX_TOKEN_IDS:
        raise invalid_field("token_ids.ids", f"{len(ids)} ids are not in [1, {MAX_TOKEN_IDS}]")
    if min(ids) < 0:
        index = next(index for index, token in enumerate(ids) if token < 0)
        raise invalid_field(f"token_ids.ids[{index}]", f"{ids[index]} is negative")
    return ids


def _check_size(field: str, size: int) -> None:
    if size == 0:
        raise invalid_field(field, "empty")
    if size > MAX_TEXT_BYTES:
        raise invalid_field(field, f"{size} bytes are more than {MAX_TEXT_BYTES}")
