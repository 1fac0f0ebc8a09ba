"""peft's `adapter_config.json`: read, checked, and reduced to what changes the arithmetic."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.strict_json import parse_object

MAX_CONFIG_BYTES = 256 * 1024
_MAX_DEPTH = 16
_MAX_PATTERNS = 4096
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

# Every key of peft 0.21's LoraConfig and its default.
LORA_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "revision": None,
        "target_modules": None,
        "target_parameters": None,
        "task_type": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
)

# Keys that are read below; then those that changed the training but not what the adapter computes.
_READ = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)

# Keys that make another method of LoRA when they are set, and its name.
_OTHER_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "activated LoRA (aLoRA)",
        "arrow_config": "Arrow routing",
        "bias": "trained biases",
        "kasa_config": "KaSA",
        "layer_replication": "layer replication",
        "lora_bias": "a bias on lora_B",
        "megatron_config": "Megatron parallel layers",
        "modules_to_save": "whole modules saved in place of the base's",
        "monteclora_config": "MonteCLoRA",
        "target_parameters": "LoRA on parameters of experts",
        "trainable_token_indices": "trained token rows",
        "use_bdlora": "block-diagonal LoRA",
        "use_dora": "DoRA",
        "use_qalora": "QALoRA",
        "velora_config": "VeLoRA",
    }
)

# Initialisations that leave the base's weights as they are. The others train against a changed base.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
_TASK_TYPES = frozenset({None, "CAUSAL_LM"})

_Alpha = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
_Rank = Annotated[int, Field(ge=1, le=65536)]
_Layer = Annotated[int, Field(ge=0, le=1_000_000)]
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Names = Annotated[list[_Name], Field(max_length=_MAX_PATTERNS)]


class LoraConfig(BaseModel):
    """The keys that change what a plain LoRA computes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    r: _Rank
    lora_alpha: _Alpha
    target_modules: _Name | _Names
    exclude_modules: _Name | _Names | None = None
    layers_to_transform: _Layer | list[_Layer] | None = None
    layers_pattern: str | _Names | None = None
    rank_pattern: Annotated[dict[_Name, _Rank], Field(max_length=_MAX_PATTERNS)] = {}
    alpha_pattern: Annotated[dict[_Name, _Alpha], Field(max_length=_MAX_PATTERNS)] = {}
    use_rslora: bool = False
    fan_in_fan_out: bool = False


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A config that was read. `lora` is None exactly if `unservable` says why it can't be served (yet)."""

    raw: Mapping[str, Any]
    kind: str
    lora: LoraConfig | None
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
    if kind != "LORA":
        return PeftConfig(raw, kind.lower(), None, f"the method {kind} is not served yet")
    return _read_lora(raw, problems)


def _read_lora(raw: Mapping[str, Any], problems: Problems) -> PeftConfig | None:
    _check_unknown_keys(raw, problems)
    unservable = _other_method(raw, problems)
    if unservable:
        return PeftConfig(raw, "lora", None, unservable)
    try:
        # A null stands for "not set" in keys that have a default.
        given = {key: raw[key] for key in _READ & raw.keys() if raw[key] is not None}
        return PeftConfig(raw, "lora", LoraConfig.model_validate(given))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            where = ".".join(str(part)[:80] for part in item["loc"])
            found = "" if item["type"] == "missing" else f", found {shown(repr(item['input']), 60)}"
            problems.add(f"adapter_config.json: {where}: {item['msg']}{found}")
        return None


def _check_unknown_keys(raw: Mapping[str, Any], problems: Problems) -> None:
    for key, value in raw.items():
        if key in _READ or key in _NO_EFFECT or key in LORA_DEFAULTS:
            continue
        # A key of another version of peft that is switched off changes nothing.
        if value is None or value is False or value in ("", [], {}):
            continue
        problems.add(
            f"adapter_config.json: the key {shown(key)} is unknown and set to {shown(repr(value), 60)}; "
            "remove it if it does not change what the adapter computes"
        )


def _other_method(raw: Mapping[str, Any], problems: Problems) -> str:
    """Why this LoRA is none that is served; empty if it is plain."""
    methods = [
        f"{name} ({key})"
        for key, name in _OTHER_METHODS.items()
        if raw.get(key, LORA_DEFAULTS[key]) not in (LORA_DEFAULTS[key], None, [], {})
    ]
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        methods.append(
            f"init_lora_weights={shown(init, 40)}, which trains against a changed base: save it again with "
            "path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    elif not isinstance(init, bool) and init is not None and init not in _PLAIN_INITS:
        problems.add(f"adapter_config.json: init_lora_weights is {shown(repr(init), 60)}, which is unknown")
    task = raw.get("task_type")
    if not isinstance(task, str | None) or task not in _TASK_TYPES:
        methods.append(f"task_type {shown(repr(task), 60)}, only CAUSAL_LM is served")
    return f"not served yet: {'; '.join(methods)}" if methods else ""
