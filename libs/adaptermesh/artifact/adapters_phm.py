"""Compacter's layers: hypercomplex multiplications (arXiv:2102.08597), made plain matrices here."""

import numpy as np

from adaptermesh.artifact.adapters_methods import BottleneckConfig
from adaptermesh.artifact.ordered_product import kron_sum, matmul
from adaptermesh.artifact.plan import Entries, Shape, Values, values_of

_POSITIONS = {"down": "adapter_down.0.", "up": "adapter_up."}


def own_shapes(config: BottleneckConfig, position: str, inputs: int, outputs: int) -> dict[str, Shape]:
    """The tensors that one layer keeps for itself, by slot."""
    prefix = _POSITIONS[position]
    shapes: dict[str, Shape] = {}
    if not config.shared_W_phm:
        shapes |= {f"{prefix}{name}": shape for name, shape in _weights(config, "", inputs, outputs).items()}
    if not config.shared_phm_rule:
        shapes |= {f"{prefix}{name}": shape for name, shape in _rules(config).items()}
    if config.phm_bias:
        shapes[f"{prefix}b"] = (outputs,)
    return shapes


def shared_shapes(config: BottleneckConfig, hidden: int, width: int) -> dict[str, Shape]:
    """The tensors that all layers share, by slot."""
    shapes = _rules(config) if config.shared_phm_rule else {}
    if config.shared_W_phm:
        shapes |= _weights(config, "down_", hidden, width) | _weights(config, "up_", width, hidden)
    return shapes


def matrix(config: BottleneckConfig, position: str, own: Entries, shared: Entries) -> Values:
    """The layer's weight [out, in]: the transpose of the sum over k of kron(rule[k], W[k]).

    rule: [n, n, n]; W: [n, in/n, out/n], both perhaps products of two factors. The layer computes x H + b.
    Source: adapters 1.3.0, `methods/modeling.py`, PHMLayer.forward.
    """
    prefix = _POSITIONS[position]
    rule_from, rule_name = (shared, "") if config.shared_phm_rule else (own, prefix)
    if config.shared_W_phm:
        weight_from, weight_name = shared, f"W_{position}"
    else:
        weight_from, weight_name = own, f"{prefix}W"
    rule = _product(rule_from, f"{rule_name}phm_rule", factorized=config.factorized_phm_rule)
    weight = _product(weight_from, weight_name, factorized=config.factorized_phm_W)

    return lambda file: kron_sum(rule(file), weight(file)).T


def bias(position: str, own: Entries, outputs: int) -> Values:
    """The layer's bias [out]; zeros if it has none."""
    entry = own.get(f"{_POSITIONS[position]}b")
    return values_of(entry) if entry is not None else lambda _: np.zeros(outputs, np.float32)


def _product(entries: Entries, name: str, *, factorized: bool) -> Values:
    if not factorized:
        return values_of(entries[name])
    left, right = values_of(entries[f"{name}_left"]), values_of(entries[f"{name}_right"])
    return lambda file: matmul(left(file), right(file))


def _rules(config: BottleneckConfig) -> dict[str, Shape]:
    n = config.phm_dim
    if config.factorized_phm_rule:
        return {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
    return {"phm_rule": (n, n, n)}


def _weights(config: BottleneckConfig, position: str, inputs: int, outputs: int) -> dict[str, Shape]:
    n, rank = config.phm_dim, config.phm_rank
    name = f"W_{position}".removesuffix("_")
    if config.factorized_phm_W:
        return {f"{name}_left": (n, inputs // n, rank), f"{name}_right": (n, rank, outputs // n)}
    return {name: (n, inputs // n, outputs // n)}
