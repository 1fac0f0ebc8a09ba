"""peft's `adapter_config.json`: read, checked, and reduced to what changes the arithmetic."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adaptermesh.artifact.peft_methods import METHODS, Method, MethodConfig
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.strict_json import parse_object

MAX_CONFIG_BYTES = 256 * 1024
_MAX_DEPTH = 16
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

# What every config says of itself.
_ABOUT = frozenset({"peft_type", "task_type"})

# Initialisations that leave the base's weights as they are. The others train against a changed base.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
_TASK_TYPES = frozenset({None, "CAUSAL_LM"})


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A config that was read. `method` is None exactly if `unservable` says why it can't be served (yet)."""

    raw: Mapping[str, Any]
    kind: str
    method: MethodConfig | None
    unservable: str = ""

    @property
    def peft_version(self) -> str:
        """The version that wrote it; empty before peft 0.17, which did not say."""
        version = self.raw.get("peft_version")
        return version if isinstance(version, str) else ""


def read_config(path: Path, problems: Problems) -> PeftConfig | None:
    """Reads a config; None if there are problems that leave nothing to go on with."""
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        problems.add(f"adapter_config.json has {size} bytes, more than {MAX_CONFIG_BYTES}")
        return None
    try:
        raw = parse_object(path.read_bytes(), _MAX_DEPTH)
    except ValueError as error:
        problems.add(f"adapter_config.json is not valid: {str(error)[:200]}")
        return None
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or _KIND.fullmatch(kind) is None:
        version = raw.get("version")
        if isinstance(version, str) and version.startswith("adapters."):
            problems.add(
                "adapter_config.json was written by the 'adapters' library, whose format is not read yet"
            )
        else:
            problems.add(
                f"adapter_config.json: peft_type is {shown(str(kind))}, expected a method such as 'LORA'"
            )
        return None
    method = METHODS.get(kind)
    if method is None:
        return PeftConfig(raw, kind.lower(), None, f"the method {kind} is not served yet")
    return _read_method(raw, kind.lower(), method, problems)


def _read_method(raw: Mapping[str, Any], kind: str, method: Method, problems: Problems) -> PeftConfig | None:
    _check_unknown_keys(raw, method, problems)
    unservable = _other_method(raw, method, problems)
    if unservable:
        return PeftConfig(raw, kind, None, unservable)
    try:
        # A null stands for "not set" in keys that have a default.
        keys = (field.alias or name for name, field in method.model.model_fields.items())
        given = {key: raw[key] for key in keys if raw.get(key) is not None}
        return PeftConfig(raw, kind, method.model.model_validate(given))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            where = ".".join(str(part)[:80] for part in item["loc"])
            found = "" if item["type"] == "missing" else f", found {shown(repr(item['input']), 60)}"
            problems.add(f"adapter_config.json: {where}: {item['msg']}{found}")
        return None


def _check_unknown_keys(raw: Mapping[str, Any], method: Method, problems: Problems) -> None:
    for key, value in raw.items():
        if key in _ABOUT or key in method.no_effect or key in method.defaults:
            continue
        # A key of another version of peft that is switched off changes nothing.
        if value is None or value is False or value in ("", [], {}):
            continue
        problems.add(
            f"adapter_config.json: the key {shown(key)} is unknown and set to {shown(repr(value), 60)}; "
            "remove it if it does not change what the adapter computes"
        )


def _other_method(raw: Mapping[str, Any], method: Method, problems: Problems) -> str:
    """Why this is none of the methods that are served; empty if it is one."""
    methods = [
        f"{name} ({key})"
        for key, name in method.others.items()
        if raw.get(key, method.defaults[key]) not in (method.defaults[key], None, [], {})
    ]
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        methods.append(
            f"init_lora_weights={shown(init, 40)}, which trains against a changed base: save it again with "
            "path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    elif not isinstance(init, bool | None) and not (isinstance(init, str) and init in _PLAIN_INITS):
        problems.add(f"adapter_config.json: init_lora_weights is {shown(repr(init), 60)}, which is unknown")
    task = raw.get("task_type")
    if not isinstance(task, str | None) or task not in _TASK_TYPES:
        methods.append(f"task_type {shown(repr(task), 60)}, only CAUSAL_LM is served")
    return f"not served yet: {'; '.join(methods)}" if methods else ""
