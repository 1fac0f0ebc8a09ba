"""The prediction head beside an adapter of the `adapters` library: checked, described, and not served.

A causal model's own output layer makes the logits, so an adapter is served without a head that it came with:
one for classes or spans says nothing of the next token. An lm head does. It is taken for the base's own where
the base ties it to the embeddings, which such an adapter never trains; anywhere else its digest is kept, and
a worker serves the adapter only if the base's head is the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.config_file import check_unknown_keys, read_config_file, validated
from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import is_tied
from adaptermesh.artifact.source_files import HEAD_CONFIG_FILE, HEAD_FILE
from adaptermesh.artifact.uploaded import Uploaded

MAX_LABELS = 10_000

_Text = Annotated[str, Field(max_length=256)]
_Labels = Annotated[dict[_Text, Annotated[int, Field(ge=0, lt=MAX_LABELS)]], Field(max_length=MAX_LABELS)]
_Count = Annotated[int, Field(ge=1, le=MAX_LABELS)]

_KNOWN = frozenset(
    {"config", "hidden_size", "label2id", "model_class", "model_name", "model_type", "name", "num_labels"}
    | {"version"}
)
# Heads whose last layer has one output for each label.
_LABELLED = frozenset({"classification", "multilabel_classification", "tagging", "question_answering"})
# What a plain model's class says of its only head.
_PLAIN_TYPES = (
    ("LMHeadModel", "lm_head"),
    ("ForCausalLM", "lm_head"),
    ("ForMaskedLM", "masked_lm"),
    ("ForSequenceClassification", "classification"),
    ("ForTokenClassification", "tagging"),
    ("ForQuestionAnswering", "question_answering"),
)


class _FlexConfig(BaseModel):
    """The config of a head that the library added to a model of its own classes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    head_type: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    num_labels: _Count | None = None
    label2id: _Labels | None = None


class _HeadConfig(BaseModel):
    """`head_config.json`; `config` is null for the only head of a plain transformers model."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    config: dict[str, Any] | None = None
    hidden_size: int | None = None
    label2id: _Labels | None = None
    model_class: _Text
    name: _Text | None = None
    num_labels: _Count | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What the manifest says of a head, and why the adapter can't be served beside it; empty if it can.

    `copy` is a weight that has to be the base's.
    """

    described: Mapping[str, Any]
    unservable: str = ""
    copy: TensorEntry | None = None


def read_head(upload: Uploaded, base: BaseFacts, problems: Problems) -> Head | None:
    """Reads and checks the head of an upload; None without one, or with problems."""
    config, header = upload.files.get(HEAD_CONFIG_FILE), upload.headers.get(HEAD_FILE)
    if config is None and HEAD_FILE not in upload.files:
        return None
    if config is None or HEAD_FILE not in upload.files:
        there, missing = (HEAD_FILE, HEAD_CONFIG_FILE) if config is None else (HEAD_CONFIG_FILE, HEAD_FILE)
        problems.add(f"{there} is there without {missing}: add it, or leave both out")
        return None
    raw = read_config_file(HEAD_CONFIG_FILE, config, problems)
    if raw is None or header is None:
        return None
    check_unknown_keys(raw, _KNOWN, HEAD_CONFIG_FILE, problems)
    read = validated(_HeadConfig, raw, HEAD_CONFIG_FILE, problems)
    if read is None:
        return None
    if read.hidden_size is not None and read.hidden_size != base.hidden_size:
        problems.add(
            f"{HEAD_CONFIG_FILE}: hidden_size is {read.hidden_size}, {base.title} has {base.hidden_size}"
        )
    return (
        _flexible(read, header.tensors, base, problems) if read.config else _plain(read, header.tensors, base)
    )


def _flexible(
    head: _HeadConfig, tensors: Mapping[str, TensorEntry], base: BaseFacts, problems: Problems
) -> Head | None:
    """A head with a config: its tensors are `heads.<name>.<layer>.<weight or bias>`."""
    config = validated(_FlexConfig, head.config or {}, f"{HEAD_CONFIG_FILE}: config", problems)
    if config is None:
        return None
    named = re.compile(rf"heads\.{re.escape(head.name or '')}\.([0-9]{{1,3}}\.)?[A-Za-z_.]{{1,128}}")
    for name in tensors:
        if named.fullmatch(name) is None:
            problems.add(f"tensor {shown(name)} is not expected: the head is named {shown(head.name or '')}")
    if config.head_type in _LABELLED and config.num_labels is not None:
        _check_last_layer(tensors, (config.num_labels, base.hidden_size), problems)
    described = _described(config.head_type, head.name, config.num_labels, config.label2id, tensors)
    if config.head_type == "causal_lm":
        return Head(described, _unservable_lm_head())
    return Head(described)


def _check_last_layer(tensors: Mapping[str, TensorEntry], shape: tuple[int, int], problems: Problems) -> None:
    layers = [
        (int(number.group(1)), entry)
        for name, entry in tensors.items()
        if (number := re.search(r"\.([0-9]{1,3})\.weight$", name)) is not None
    ]
    if not layers:
        problems.add(f"{HEAD_FILE} has no weight of a layer, expected one of shape {list(shape)}")
        return
    last = max(layers, key=lambda layer: layer[0])[1]
    if last.shape != shape:
        problems.add(
            f"tensor {shown(last.name)} has shape {list(last.shape)}, expected {list(shape)}: "
            "num_labels from the config and the base's width"
        )


def _plain(head: _HeadConfig, tensors: Mapping[str, TensorEntry], base: BaseFacts) -> Head:
    """The head of a plain model: whatever of it is not the base."""
    kind = next((kind for end, kind in _PLAIN_TYPES if head.model_class.endswith(end)), "unknown")
    if kind != "lm_head":
        return Head(_described(kind, head.name, head.num_labels, head.label2id, tensors))
    described = _described(kind, head.name, None, None, tensors)
    only = tensors.get("lm_head.weight") if len(tensors) == 1 else None
    if only is None or only.shape != (base.vocab_size, base.hidden_size):
        return Head(described, _unservable_lm_head())
    return Head(described, copy=None if is_tied(base) else only)


def _unservable_lm_head() -> str:
    return (
        "not served yet: an lm head of its own. If it is the base's and was not trained, leave "
        f"{HEAD_FILE} and {HEAD_CONFIG_FILE} out, or save the adapter with with_head=False"
    )


def _described(
    kind: str,
    name: str | None,
    num_labels: int | None,
    label2id: Mapping[str, int] | None,
    tensors: Mapping[str, TensorEntry],
) -> Mapping[str, Any]:
    labels = sorted(label2id, key=lambda label: (label2id[label], label)) if label2id else None
    return {
        "type": kind,
        "name": name,
        "num_labels": num_labels,
        "labels": labels,
        "file": HEAD_FILE,
        "tensors": [
            {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape)}
            for entry in tensors.values()
        ],
    }
