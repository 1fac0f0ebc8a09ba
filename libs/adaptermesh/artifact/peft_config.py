"""peft's `adapter_config.json`: read, checked, and reduced to what changes the arithmetic."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.config_file import check_unknown_keys, validated
from adaptermesh.artifact.manifest_parts import Activation
from adaptermesh.artifact.peft_methods import METHODS, Method
from adaptermesh.artifact.peft_models import MethodConfig, VirtualConfig
from adaptermesh.artifact.peft_readers import plan_method
from adaptermesh.artifact.peft_virtual import plan_virtual
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.artifact.source_files import CONFIG_FILE
from adaptermesh.artifact.uploaded import Uploaded

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
    def version(self) -> str:
        """The version that wrote it; empty before peft 0.17, which did not say."""
        version = self.raw.get("peft_version")
        return version if isinstance(version, str) else ""

    @property
    def named_base(self) -> object:
        """What the config says of the base: a path, a name or a digest."""
        return self.raw.get("base_model_name_or_path")

    @property
    def head(self) -> None:
        """There is none: peft saves a head as whole modules, which are not served."""

    def plan(self, upload: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:
        """What the adapter becomes on a base; of use only if no problem was noted."""
        if self.method is None:
            return Plan(unservable=self.unservable)
        tensors = upload.weights.tensors
        if isinstance(self.method, VirtualConfig):
            return plan_virtual(self.method, tensors, base, base.title, problems)
        plan = plan_method(self.method, tensors, sites, base.title, problems)
        if plan.activation is not None:
            _check_activation(plan.activation, base, problems)
        return plan


def read_config(raw: Mapping[str, Any], problems: Problems) -> PeftConfig | None:
    """Reads a config; None if there are problems that leave nothing to go on with."""
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or _KIND.fullmatch(kind) is None:
        problems.add(f"{CONFIG_FILE}: peft_type is {shown(str(kind))}, expected a method such as 'LORA'")
        return None
    method = METHODS.get(kind)
    if method is None:
        return PeftConfig(raw, kind.lower(), None, f"the method {kind} is not served yet")
    return _read_method(raw, kind.lower(), method, problems)


def _read_method(raw: Mapping[str, Any], kind: str, method: Method, problems: Problems) -> PeftConfig | None:
    known = _ABOUT | method.no_effect | method.defaults.keys()
    check_unknown_keys(raw, known, CONFIG_FILE, problems)
    unservable = _other_method(raw, method, problems)
    if unservable:
        return PeftConfig(raw, kind, None, unservable)
    # A null stands for "not set" in keys that have a default.
    keys = (field.alias or name for name, field in method.model.model_fields.items())
    given = {key: raw[key] for key in keys if raw.get(key) is not None}
    values = validated(method.model, given, CONFIG_FILE, problems)
    return None if values is None else PeftConfig(raw, kind, values)


def _check_activation(activation: Activation, base: BaseFacts, problems: Problems) -> None:
    for token in activation.invocation_tokens:
        if token >= base.vocab_size:
            problems.add(
                f"{CONFIG_FILE}: alora_invocation_tokens has token {token}, "
                f"but {base.title} has tokens 0 to {base.vocab_size - 1}"
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
