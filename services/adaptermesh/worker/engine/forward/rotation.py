"""Rotations of positions that the engine can't use, whatever computes them."""

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.base import Base


def check_rotation(base: Base, max_context_tokens: int) -> None:
    """Refuses rotations that follow the longest row of a batch: rows would change each other's answers.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED), with the context up to which they do not.
    """
    config = base.model.config.get_text_config()
    longest = min(max_context_tokens, base.max_context_tokens)
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    for parameters in [part for part in rope.values() if isinstance(part, dict)] or [rope]:
        kind = parameters.get("rope_type", "default")
        limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if (kind == "longrope" or "dynamic" in kind) and longest > limit:
            name = base.facts.model_id
            raise MeshError(
                Code.FAILED_PRECONDITION,
                Reason.ADAPTER_UNSUPPORTED,
                f"the engine can't compute {name}: it turns positions another way ({kind}) past {limit} "
                "tokens: set max_context_tokens to that",
                metadata={"name": name},
            )
