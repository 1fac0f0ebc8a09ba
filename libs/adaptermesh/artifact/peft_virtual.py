"""Methods of peft that put virtual tokens in front of a prompt: prompt tuning, p-tuning, prefix tuning."""

from collections.abc import Mapping

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest_parts import MAX_VIRTUAL_TOKENS, TENSOR_DTYPES, ModuleOp, TensorEntry
from adaptermesh.artifact.ops import AFTER, FRONT, PROMPT
from adaptermesh.artifact.peft_models import PrefixConfig, VirtualConfig
from adaptermesh.artifact.plan import Plan, PlannedTensor, copied
from adaptermesh.artifact.prefix_parts import prefix_of, stored_part
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import EMBED, key_heads

TENSOR = "prompt_embeddings"
"""What peft calls the one tensor, whatever it holds."""


def plan_virtual(
    config: VirtualConfig,
    tensors: Mapping[str, TensorEntry],
    base: BaseFacts,
    base_name: str,
    problems: Problems,
) -> Plan:
    """What an upload becomes; of use only if no problem was noted."""
    for name in tensors:
        if name != TENSOR:
            problems.add(f"tensor {shown(name)} is not expected: virtual tokens are in {TENSOR} alone")
    entry = tensors.get(TENSOR)
    if entry is None:
        problems.add(f"tensor {TENSOR} is absent")
        return Plan()
    heads, dim = key_heads(base)
    is_prefix = isinstance(config, PrefixConfig)
    width = heads * dim if is_prefix else base.hidden_size
    _check_numbers(config, width, heads, base, base_name, problems)
    count = config.num_virtual_tokens
    shape = (count, 2 * base.num_layers * width if is_prefix else width)
    if entry.dtype not in TENSOR_DTYPES:
        problems.add(f"tensor {TENSOR} is {entry.dtype}, expected one of {', '.join(TENSOR_DTYPES)}")
    if entry.shape != shape:
        problems.add(
            f"tensor {TENSOR} has shape {list(entry.shape)}, expected {list(shape)}: "
            f"{count} virtual tokens from the config, the widths from {base_name}"
        )
    if len(problems):
        return Plan()
    if count > MAX_VIRTUAL_TOKENS:
        return Plan(unservable=f"not served: it has {count} virtual tokens, the most is {MAX_VIRTUAL_TOKENS}")
    return _plan_prefix(entry, base.num_layers, heads, dim) if is_prefix else _plan_prompt(entry)


def _check_numbers(
    config: VirtualConfig, width: int, heads: int, base: BaseFacts, base_name: str, problems: Problems
) -> None:
    """The config's numbers of the base, where it has them. Heads and layers matter to a prefix alone."""
    found = {"token_dim": (config.token_dim, width)}
    if isinstance(config, PrefixConfig):
        found["num_attention_heads"] = (config.num_attention_heads, heads)
        found["num_layers"] = (config.num_layers, base.num_layers)
    for key, (given, expected) in found.items():
        if given is not None and given != expected:
            problems.add(f"adapter_config.json: {key} is {given}, {base_name} needs {expected}")


def _plan_prompt(entry: TensorEntry) -> Plan:
    name = f"L0.{EMBED}.E"
    options = {"place": FRONT}
    op = ModuleOp(EMBED, 0, PROMPT, 0, 1.0, {"E": name}, entry.dtype, options=options)
    spec = TensorSpec(name, entry.dtype, entry.shape)
    return Plan((op,), (PlannedTensor(spec, 0, copied(entry.offset, entry.size)),))


def _plan_prefix(entry: TensorEntry, layers: int, heads: int, dim: int) -> Plan:
    """The file has for each token the keys and the values of each layer, head by head."""
    count = entry.shape[0]
    shape = (count, 2 * layers, heads, dim)
    return prefix_of(
        lambda part: stored_part(entry, part, shape), (heads, count, dim), layers, entry.dtype, AFTER
    )
