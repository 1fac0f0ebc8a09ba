"""Unions of the `adapters` library: several methods under one name in one file, such as MAM."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from adaptermesh.artifact.adapters_methods import BottleneckConfig, LoraConfig, MethodConfig
from adaptermesh.artifact.adapters_tensors import SHARED, Reading, container_of
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.uploaded import Uploaded


def why_not_together(methods: Sequence[MethodConfig]) -> str:
    """Why some methods can't be told apart in one file; empty if they can."""
    counts = Counter(method.container for method in methods)
    twice = [name for name, count in counts.items() if count > 1]
    return f"a union of several methods that keep their tensors in '{twice[0]}'" if twice else ""


def plan_union(
    methods: Sequence[MethodConfig], reading: Reading, plan: Callable[[MethodConfig, Reading], Plan]
) -> Plan:
    """What the methods become together; `plan` gives what one of them makes of its own tensors."""
    parts = _parts(methods, reading.name, reading.upload)
    plans = [
        plan(method, replace(reading, upload=part, known=len(reading.problems)))
        for method, part in zip(methods, parts, strict=True)
    ]
    unservable = next((one.unservable for one in plans if one.unservable), "")
    if unservable:
        return Plan(unservable=unservable)
    return Plan(
        modules=tuple(sorted((op for one in plans for op in one.modules), key=lambda op: op.layer)),
        tensors=tuple(sorted((part for one in plans for part in one.tensors), key=lambda part: part.layer)),
    )


def _parts(methods: Sequence[MethodConfig], name: str, upload: Uploaded) -> list[Uploaded]:
    """The upload with each method's tensors alone; what is nobody's goes to the first, which refuses it."""
    names = [method.container for method in methods]
    sharing = next((number for number, method in enumerate(methods) if _shares(method)), 0)
    found: list[set[str]] = [set() for _ in methods]
    for tensor in upload.weights.tensors:
        container = container_of(tensor, name)
        number = sharing if container == SHARED else names.index(container) if container in names else 0
        found[number].add(tensor)
    header, file = upload.weights, upload.layout.weights
    parts = []
    for own in found:
        tensors = {key: entry for key, entry in header.tensors.items() if key in own}
        parts.append(replace(upload, headers={**upload.headers, file: replace(header, tensors=tensors)}))
    return parts


def _shares(method: MethodConfig) -> bool:
    """Whether its modules share tensors."""
    if isinstance(method, BottleneckConfig):
        return method.phm_layer
    return isinstance(method, LoraConfig) and method.is_vera
