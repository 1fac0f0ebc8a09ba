"""The `adapter_config.json` of AdapterHub's `adapters` library: read, checked, and what the adapter becomes.

Its config is nested: `config` holds the method's, without a name for bottlenecks and with an `architecture`
for everything else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from adaptermesh.artifact.adapters_bottleneck import plan_bottleneck
from adaptermesh.artifact.adapters_head import read_head
from adaptermesh.artifact.adapters_invertible import plan_invertible
from adaptermesh.artifact.adapters_lora import plan_lora
from adaptermesh.artifact.adapters_methods import (
    BOTTLENECK_NO_EFFECT,
    LORA_NO_EFFECT,
    PREFIX_NO_EFFECT,
    PROMPT_NO_EFFECT,
    REFT_NO_EFFECT,
    BottleneckConfig,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    ReftConfig,
)
from adaptermesh.artifact.adapters_places import PLACES
from adaptermesh.artifact.adapters_prefix import plan_prefix
from adaptermesh.artifact.adapters_prompt import plan_prompt
from adaptermesh.artifact.adapters_reft import plan_reft
from adaptermesh.artifact.adapters_tensors import Reading
from adaptermesh.artifact.adapters_union import plan_union, why_not_together
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.config_file import check_unknown_keys, validated
from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import HEAD, SiteMap
from adaptermesh.artifact.source_files import CONFIG_FILE, HEAD_FILE
from adaptermesh.artifact.uploaded import Uploaded

_VERSION = re.compile(
    r"adapters\.(?P<release>(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?)(?P<rest>[A-Za-z0-9.+_-]{0,40})"
)
_BEFORE = re.compile(r"\.?(dev|a|b|rc)[0-9]*.*")
_NAMED_ARCHITECTURE = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MAX_UNION = 16
_PLUGIN_FILE = "adapter_interface.json"

_KNOWN = frozenset(
    {"config", "hidden_size", "model_class", "model_name", "model_type", "name", "version"}
    # Of versions before 1.0; they say nothing of the arithmetic.
    | {"config_id", "label2id", "type"}
)
_LATER = {
    "mtl_lora": "MTL-LoRA, whose projections depend on the task",
}


class TopConfig(BaseModel):
    """What stands around a method's config, or a fusion's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    config: dict[str, Any]
    hidden_size: int | None = None
    model_type: Annotated[str, Field(max_length=64)] | None = None
    # A key of a ModuleDict: it can't hold a dot.
    name: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^.]+$")]


@dataclass(frozen=True, slots=True)
class AdaptersConfig:
    """A config that was read: one method, or those of a union.

    There is none exactly if `unservable` says why it can't be served (yet).
    """

    raw: Mapping[str, Any]
    kind: str
    name: str
    version: str
    methods: tuple[MethodConfig, ...]
    head: Mapping[str, Any] | None = None
    unservable: str = ""
    head_copy: TensorEntry | None = None

    @property
    def named_base(self) -> object:
        """What the config says of the base: a path or a name."""
        return self.raw.get("model_name")

    def plan(self, upload: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:
        """What the adapter becomes on a base; of use only if no problem was noted."""
        places = PLACES.get(base.architecture)
        if places is None or _PLUGIN_FILE in upload.files:
            return Plan(
                unservable=f"not served yet: the adapters library has no {base.architecture} of its own and "
                "puts its modules there through a plug-in"
            )
        if not self.methods:
            return Plan(unservable=self.unservable)
        reading = Reading(self.name, upload, places, sites, base, problems, len(problems))
        if len(self.methods) > 1:
            found = plan_union(self.methods, reading, self._plan_method)
        else:
            found = self._plan_method(self.methods[0], reading)
        if self.head_copy is None or found.unservable:
            return found
        return replace(found, copies={HEAD: (HEAD_FILE, self.head_copy)})

    def _plan_method(self, method: MethodConfig, reading: Reading) -> Plan:
        if isinstance(method, BottleneckConfig):
            if method.inv_adapter is None or reading.places.post_norm:
                return plan_bottleneck(method, reading)
            return plan_invertible(method, str(self.raw.get("model_class")), reading, plan_bottleneck)
        if isinstance(method, PrefixConfig):
            return plan_prefix(method, reading)
        if isinstance(method, PromptConfig):
            return plan_prompt(method, reading)
        if isinstance(method, ReftConfig):
            return plan_reft(method, reading)
        return plan_lora(method, reading)


def is_written_by_adapters(raw: Mapping[str, Any]) -> bool:
    """Whether a config says that the library wrote it."""
    version = raw.get("version")
    return isinstance(version, str) and version.startswith("adapters.")


def read_version(raw: Mapping[str, Any], where: str, problems: Problems) -> str:
    """The library's version, e.g. `1.3.0`; empty, and the problem noted, if it is none."""
    found = _VERSION.fullmatch(str(raw.get("version")))
    if found is None:
        problems.add(
            f"{where}: version is {shown(str(raw.get('version')), 60)}, expected such as 'adapters.1.3.0'"
        )
        return ""
    return found["release"] + found["rest"]


def read_config(
    raw: Mapping[str, Any], upload: Uploaded, base: BaseFacts, problems: Problems
) -> AdaptersConfig | None:
    """Reads a config; None if there are problems that leave nothing to go on with."""
    known = len(problems)
    check_unknown_keys(raw, _KNOWN, CONFIG_FILE, problems)
    version = read_version(raw, CONFIG_FILE, problems)
    top = validated(TopConfig, raw, CONFIG_FILE, problems)
    head = read_head(upload, base, problems)
    if top is None or not version:
        return None
    check_base(top, base, CONFIG_FILE, problems)
    kind, methods, reasons = _read_method(top.config, version, problems)
    if not methods and not reasons and len(problems) > known:
        return None
    unservable = f"not served yet: {'; '.join(reasons)}" if reasons else ""
    if not unservable and head is not None:
        unservable = head.unservable
    return AdaptersConfig(
        raw,
        kind,
        top.name,
        version,
        () if unservable else methods,
        None if head is None else head.described,
        unservable,
        None if head is None else head.copy,
    )


def check_base(top: TopConfig, base: BaseFacts, where: str, problems: Problems) -> None:
    """Notes where a config, the file `where`, was written for another base."""
    if top.hidden_size is not None and top.hidden_size != base.hidden_size:
        problems.add(f"{where}: hidden_size is {top.hidden_size}, {base.title} has {base.hidden_size}")
    model_type = base.config.get("model_type")
    if top.model_type is not None and model_type is not None and top.model_type != model_type:
        problems.add(
            f"{where}: model_type is {shown(top.model_type)}, {base.title} is a {shown(str(model_type))}"
        )


_Read = tuple[str, tuple[MethodConfig, ...], list[str]]
"""The manifest's kind, the configs if they were read, and every reason why it can't be served."""


def _read_method(config: Mapping[str, Any], version: str, problems: Problems) -> _Read:
    where = f"{CONFIG_FILE}: config"
    architecture = config.get("architecture")
    if architecture is None:
        return _read_bottleneck(config, where, problems)
    if architecture == "lora":
        return _read_lora(config, version, where, problems)
    if architecture == "reft":
        return _read_reft(config, where, problems)
    if architecture == "prefix_tuning":
        return _read_prefix(config, where, problems)
    if architecture == "prompt_tuning":
        return _read_prompt(config, where, problems)
    if not isinstance(architecture, str) or _NAMED_ARCHITECTURE.fullmatch(architecture) is None:
        problems.add(
            f"{where}: architecture is {shown(repr(architecture), 60)}, expected a name such as 'lora'"
        )
        return "", (), []
    if architecture == "union":
        return _read_union(config, version, where, problems)
    return architecture, (), [_LATER.get(architecture, f"the method {architecture}")]


def _read_bottleneck(config: Mapping[str, Any], where: str, problems: Problems) -> _Read:
    known = BottleneckConfig.model_fields.keys() | BOTTLENECK_NO_EFFECT | {"architecture"}
    check_unknown_keys(config, known, where, problems)
    read = validated(BottleneckConfig, config, where, problems)
    return ("bottleneck", (), []) if read is None else (read.kind, (read,), list(read.unserved()))


def _read_lora(config: Mapping[str, Any], version: str, where: str, problems: Problems) -> _Read:
    known = LoraConfig.model_fields.keys() | LORA_NO_EFFECT | {"architecture"}
    check_unknown_keys(config, known, where, problems)
    # Before 1.1.0 alpha had no effect: the library itself now reads such a file with alpha = r.
    given = {**config, "alpha": config.get("r")} if _is_before_1_1(version) else config
    read = validated(LoraConfig, given, where, problems)
    wrong = [] if read is None else list(read.problems())
    problems.extend(f"{where}: {problem}" for problem in wrong)
    if read is None or wrong:
        return "lora", (), []
    return read.kind, (read,), list(read.unserved())


def _read_reft(config: Mapping[str, Any], where: str, problems: Problems) -> _Read:
    known = ReftConfig.model_fields.keys() | REFT_NO_EFFECT | {"architecture"}
    check_unknown_keys(config, known, where, problems)
    read = validated(ReftConfig, config, where, problems)
    if read is None:
        return "reft", (), []
    problems.extend(f"{where}: {problem}" for problem in read.problems())
    return read.kind, (read,), list(read.unserved())


def _read_prefix(config: Mapping[str, Any], where: str, problems: Problems) -> _Read:
    known = PrefixConfig.model_fields.keys() | PREFIX_NO_EFFECT | {"architecture"}
    check_unknown_keys(config, known, where, problems)
    read = validated(PrefixConfig, config, where, problems)
    return ("prefix_tuning", (), []) if read is None else (read.kind, (read,), list(read.unserved()))


def _read_prompt(config: Mapping[str, Any], where: str, problems: Problems) -> _Read:
    known = PromptConfig.model_fields.keys() | PROMPT_NO_EFFECT | {"architecture"}
    check_unknown_keys(config, known, where, problems)
    read = validated(PromptConfig, config, where, problems)
    return ("prompt_tuning", (), []) if read is None else (read.kind, (read,), [])


def _is_before_1_1(version: str) -> bool:
    found = _VERSION.fullmatch(f"adapters.{version}")
    if found is None:
        return False
    numbers = tuple(int(number or 0) for number in found.groups()[1:4])
    return numbers < (1, 1, 0) or (numbers == (1, 1, 0) and _BEFORE.fullmatch(found["rest"]) is not None)


def _read_union(config: Mapping[str, Any], version: str, where: str, problems: Problems) -> _Read:
    check_unknown_keys(config, frozenset({"architecture", "configs"}), where, problems)
    members = config.get("configs")
    if not isinstance(members, list) or not 0 < len(members) <= _MAX_UNION:
        problems.add(f"{where}: configs is no list of 1 to {_MAX_UNION} configs")
        return "union", (), []
    methods: list[MethodConfig] = []
    reasons: list[str] = []
    for member in members:
        if not isinstance(member, dict) or member.get("architecture") == "union":
            problems.add(f"{where}: configs holds something that is no config of a method")
            return "union", (), []
        kind, found, why = _read_method(member, version, problems)
        methods.extend(found)
        reasons.extend(f"in a union, {kind}: {reason}" for reason in why)
    together = why_not_together(methods)
    return "union", tuple(methods), [*reasons, together] if together else reasons
