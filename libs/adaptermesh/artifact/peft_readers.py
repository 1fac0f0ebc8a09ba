"""Which reader a peft config asks for. A new method is one reader and one branch here."""

import dataclasses
from collections.abc import Mapping

from adaptermesh.artifact import peft_beside
from adaptermesh.artifact.manifest_parts import Activation, TensorEntry
from adaptermesh.artifact.peft_ia3 import Ia3Reader
from adaptermesh.artifact.peft_lora import LoraReader
from adaptermesh.artifact.peft_lowrank import (
    MAX_LOHA_RANK,
    VERA_SHARED,
    AdaLoraReader,
    LohaReader,
    VeraReader,
    check_vera_shared,
)
from adaptermesh.artifact.peft_models import (
    AdaLoraConfig,
    Ia3Config,
    LohaConfig,
    LoraConfig,
    TargetConfig,
    TokensConfig,
    VeraConfig,
)
from adaptermesh.artifact.peft_plan import Reader, plan
from adaptermesh.artifact.peft_structured import StructuredConfig, structured_reader, why_not_served
from adaptermesh.artifact.peft_targets import Targets
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import EMBED, SiteMap
from adaptermesh.artifact.source_files import PEFT


def plan_method(
    config: TargetConfig,
    tensors: Mapping[str, TensorEntry],
    sites: SiteMap,
    base_name: str,
    problems: Problems,
) -> Plan:
    """What an upload becomes, whatever its method; of use only if no problem was noted."""
    known = len(problems)
    targets = Targets(config, sites, problems)
    if len(problems) > known:
        return Plan()
    beside = peft_beside.split(config, targets, tensors, sites)
    unservable = peft_beside.check(beside, config, targets, sites, base_name, problems)
    if unservable:
        return Plan(unservable=unservable)
    if isinstance(config, TokensConfig):
        for name in beside.own:
            problems.add(f"tensor {shown(name)} is not expected: only rows of tokens are")
        found = Plan()
    else:
        found = _plan_own(config, targets, beside.own, sites, base_name, problems)
    if len(problems) > known:
        return Plan()
    more = peft_beside.pieces(beside, config, targets, sites)
    copies = {site: (PEFT.weights, entry) for site, entry in beside.copies.items()}
    return dataclasses.replace(found.with_pieces(more), copies={} if found.unservable else copies)


def _plan_own(
    config: TargetConfig,
    targets: Targets,
    tensors: Mapping[str, TensorEntry],
    sites: SiteMap,
    base_name: str,
    problems: Problems,
) -> Plan:
    """What becomes of the method's own tensors."""
    known = len(problems)
    reader = _reader(config, targets, tensors, sites, problems)
    if reader is None or len(problems) > known:
        return Plan()
    if isinstance(config, LohaConfig):
        highest = max((targets.rank(module) for module in targets.modules), default=0)
        if highest > MAX_LOHA_RANK:
            return Plan(
                unservable=f"not served: a LoHa of rank {highest} is a LoRA of rank {highest**2}; "
                f"the highest that is served is {MAX_LOHA_RANK}"
            )
    unservable = why_not_served(config, reader, targets, sites)
    if unservable:
        return Plan(unservable=unservable)
    if isinstance(config, VeraConfig):
        tensors = {name: entry for name, entry in tensors.items() if name not in VERA_SHARED}
    found = plan(config, targets, reader, tensors, sites, base_name, problems)
    if isinstance(config, LoraConfig):
        return _activated(found, config, targets, sites)
    if isinstance(config, Ia3Config):
        return found
    return found.bounded(reader.method if isinstance(config, StructuredConfig) else "LoRA")


def _activated(found: Plan, config: LoraConfig, targets: Targets, sites: SiteMap) -> Plan:
    if not config.invocation_tokens or found.unservable:
        return found
    if EMBED in sites.edges and sites.edges[EMBED].module in targets.modules:
        return Plan(unservable="not served: an activated LoRA of the embeddings, which peft does not have")
    return dataclasses.replace(found, activation=Activation(tuple(config.invocation_tokens)))


def _reader(
    config: TargetConfig,
    targets: Targets,
    tensors: Mapping[str, TensorEntry],
    sites: SiteMap,
    problems: Problems,
) -> Reader | None:
    """None if there are problems that leave nothing to read."""
    if isinstance(config, AdaLoraConfig):
        return AdaLoraReader(config)
    if isinstance(config, LohaConfig):
        return LohaReader(targets)
    if isinstance(config, Ia3Config):
        return Ia3Reader(config, problems)
    if isinstance(config, StructuredConfig):
        return structured_reader(config, targets, sites, problems)
    if isinstance(config, VeraConfig):
        known = len(problems)
        check_vera_shared(config, tensors, targets, problems)
        return None if len(problems) > known else VeraReader(config, *(tensors[name] for name in VERA_SHARED))
    return LoraReader(config, targets) if isinstance(config, LoraConfig) else None
