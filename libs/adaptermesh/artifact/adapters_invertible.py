"""The `adapters` library's invertible adapters beside bottlenecks: NICE couplings, as the op `coupling`.

It changes what goes into the first layer. The library undoes it in front of the causal heads of its flexible
models alone; a plain causal model's head gets what the layers make of it.
Sources: Pfeiffer et al. (arXiv:2005.00052), section 3.3; Dinh et al. (arXiv:1410.8516), section 3.2.
"""

from collections.abc import Callable
from dataclasses import replace

from adaptermesh.artifact.adapters_methods import BottleneckConfig
from adaptermesh.artifact.adapters_tensors import Reading, check_slots, container_of, group
from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.ops import COUPLING
from adaptermesh.artifact.plan import Plan, PlannedTensor, Shape, check_one_dtype, copied, tensor_name
from adaptermesh.artifact.problems import shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import STREAM

_CONTAINER = "invertible_adapters"
_PARTS = {"down": "0.weight", "down_bias": "0.bias", "up": "2.weight", "up_bias": "2.bias"}


def plan_invertible(
    config: BottleneckConfig,
    model_class: str,
    reading: Reading,
    plan: Callable[[BottleneckConfig, Reading], Plan],
) -> Plan:
    """What a bottleneck adapter with an invertible one becomes; `plan` gives what its bottlenecks do."""
    if model_class.endswith("AdapterModel"):
        return Plan(
            unservable=f"not served: an invertible adapter of a {model_class}, whose causal head undoes it; "
            "train it on the plain causal model"
        )
    own, others = _apart(reading)
    found = plan(config, replace(others, known=len(reading.problems)))
    shapes = _shapes(config, reading.base.hidden_size)
    modules = group(own, _CONTAINER).modules
    if len(modules) != 1:
        count, name = len(modules), shown(reading.name)
        reading.problems.add(f"the file has {count} invertible adapters of the name {name}, not one")
        return Plan()
    [(module, entries)] = modules.items()
    why = f"halves of {reading.base.hidden_size} from the base, inv_adapter_reduction_factor from the config"
    check_slots(f"module {shown(module)}", entries, shapes, why, reading.problems)
    check_one_dtype(module, entries, reading.problems)
    if reading.failed:
        return Plan()
    tensors: list[PlannedTensor] = []
    names: dict[str, str] = {}
    for net in "FG":
        for slot, source in _PARTS.items():
            entry = entries[f"{net}.{source}"]
            name = names[f"{net}_{slot}"] = tensor_name(STREAM, 0, f"{net}_{slot}")
            spec = TensorSpec(name, entry.dtype, entry.shape)
            tensors.append(PlannedTensor(spec, 0, copied(entry.offset, entry.size)))
    dtype = tensors[0].spec.dtype
    op = ModuleOp(STREAM, 0, COUPLING, 0, 1.0, names, dtype, options={"activation": config.activation})
    return found.with_pieces([(op, tuple(tensors))])


def _apart(reading: Reading) -> tuple[Reading, Reading]:
    """The upload with the invertible adapter's tensors alone, and with all others."""
    header, file = reading.upload.weights, reading.upload.layout.weights
    parts = []
    for wanted in (True, False):
        tensors = {
            name: entry
            for name, entry in header.tensors.items()
            if (container_of(name, reading.name) == _CONTAINER) is wanted
        }
        headers = {**reading.upload.headers, file: replace(header, tensors=tensors)}
        parts.append(replace(reading, upload=replace(reading.upload, headers=headers)))
    return parts[0], parts[1]


def _shapes(config: BottleneckConfig, hidden: int) -> dict[str, Shape]:
    """Source: adapters 1.3.0, `methods/modeling.py`, NICECouplingBlock."""
    first, second = hidden // 2, hidden - hidden // 2
    shapes: dict[str, Shape] = {}
    for net, inputs, outputs in (("F", second, first), ("G", first, second)):
        width = int(inputs // (config.inv_adapter_reduction_factor or 1.0))
        sizes = ((width, inputs), (width,), (outputs, width), (outputs,))
        shapes |= {f"{net}.{part}": size for part, size in zip(_PARTS.values(), sizes, strict=True)}
    return shapes
