"""The `adapters` library's prompt tuning: checked, and stored with the reason why it is not served.

The library puts its prompt behind a model's embeddings in the encoders that it implements, and in no decoder.
"""

from adaptermesh.artifact.adapters_methods import PromptConfig
from adaptermesh.artifact.adapters_tensors import Reading, check_slots, group
from adaptermesh.artifact.plan import Plan
from adaptermesh.artifact.problems import shown


def plan_prompt(config: PromptConfig, reading: Reading) -> Plan:
    """What a prompt tuning becomes; of use only if no problem was noted."""
    found = group(reading, config.container)
    check_slots("what all modules share", found.shared, {}, "a prompt shares nothing", reading.problems)
    shape = (config.prompt_length, reading.base.hidden_size)
    why = f"prompt_length {config.prompt_length} from the config, the width from {reading.base.title}"
    for module, entries in found.modules.items():
        shapes = {"prompt_embedding.weight": shape}
        check_slots(f"module {shown(module)}", entries, shapes, why, reading.problems)
    if len(found.modules) != 1:
        reading.problems.add(f"the file has {len(found.modules)} prompts {shown(reading.name)}, not one")
    architecture = reading.base.architecture
    if reading.places.post_norm:
        return Plan(unservable=f"not served yet: prompt tuning in a {architecture}")
    return Plan(
        unservable=f"not served: the adapters library has no prompt tuning in a {architecture}; "
        "train it with peft"
    )
