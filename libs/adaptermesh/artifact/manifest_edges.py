"""What must hold of modules around the layers, and of those that take the place of the base's own tensors."""

from collections.abc import Mapping

from adaptermesh.artifact.manifest_parts import MAX_TOKEN_ROWS, BaseRef, ModuleOp
from adaptermesh.artifact.ops import AFFINE, COUPLING, LOWRANK, REPLACE, TOKEN_ROWS
from adaptermesh.artifact.sites import EDGES, EMBED, FINAL_NORM, HEAD, NORMS, STREAM

_AT_EDGES = {EMBED: (LOWRANK, TOKEN_ROWS, REPLACE), HEAD: (LOWRANK, AFFINE, TOKEN_ROWS, REPLACE)}

Shapes = Mapping[str, tuple[int, ...]]
"""Of a module's tensors, by slot."""


def is_around(module: ModuleOp) -> bool:
    """Whether a module acts around the layers and not in one: its shapes follow from the manifest alone."""
    return module.site in (*EDGES, FINAL_NORM) and module.op in {*_AT_EDGES[EMBED], *_AT_EDGES[HEAD]}


def what_is_wrong(module: ModuleOp, shapes: Shapes, base: BaseRef) -> str:
    """What of such a module, or of one that replaces something, can't be; empty if it is all right."""
    if module.op == REPLACE and (module.rank or module.scale != 1.0 or not shapes):
        return f"has rank {module.rank}, scale {module.scale} and {len(shapes)} tensors"
    if module.op == TOKEN_ROWS and module.site not in EDGES:
        return "is neither at the embeddings nor at the head"
    if module.tokens and module.op != TOKEN_ROWS:
        return "has tokens for nothing"
    if module.op == REPLACE and module.site in NORMS:
        return _other_shapes(shapes, {"weight": (base.hidden_size,), "bias": (base.hidden_size,)})
    if module.op == COUPLING:
        return _wrong_coupling(module, shapes, base)
    return _wrong_around(module, shapes, base) if is_around(module) else ""


def _wrong_coupling(module: ModuleOp, shapes: Shapes, base: BaseRef) -> str:
    if module.site != STREAM or module.layer or module.rank or module.scale != 1.0:
        return f"has rank {module.rank} and scale {module.scale}, at a place that is not before all layers"
    first, second = base.hidden_size // 2, base.hidden_size - base.hidden_size // 2
    expected: dict[str, tuple[int, ...]] = {}
    for net, inputs, outputs in (("F", second, first), ("G", first, second)):
        width = shapes[f"{net}_down"][0]
        sizes = {
            "down": (width, inputs),
            "down_bias": (width,),
            "up": (outputs, width),
            "up_bias": (outputs,),
        }
        expected |= {f"{net}_{slot}": size for slot, size in sizes.items()}
    return _other_shapes(shapes, expected)


def _wrong_around(module: ModuleOp, shapes: Shapes, base: BaseRef) -> str:
    if module.op not in _AT_EDGES.get(module.site, ()):
        return "can't be there"
    if module.expert is not None or module.layer != (0 if module.site == EMBED else base.num_layers - 1):
        return "is not of the layer to which its site is counted"
    inputs, outputs = base.hidden_size, base.vocab_size
    expected: Shapes = {}
    if module.op == TOKEN_ROWS:
        if module.rank or module.scale != 1.0:
            return f"has rank {module.rank} and scale {module.scale}"
        tokens = module.tokens
        if not 0 < len(tokens) <= MAX_TOKEN_ROWS or len(set(tokens)) < len(tokens):
            return f"has {len(tokens)} tokens, not 1 to {MAX_TOKEN_ROWS} different ones"
        if not 0 <= min(tokens) <= max(tokens) < base.vocab_size:
            return f"has tokens {min(tokens)} to {max(tokens)} of a vocabulary of {base.vocab_size}"
        expected = {"rows": (len(tokens), base.hidden_size)}
    elif module.op == REPLACE:
        expected = {"weight": (outputs, inputs)}
        expected |= {"bias": (outputs,)} if module.site == HEAD else {}
    elif module.op == AFFINE:
        if "magnitude" in shapes:
            return "has a magnitude, which needs the rows of the base"
        expected = {"in_scale": (inputs,), "out_scale": (outputs,), "bias_delta": (outputs,)}
    else:
        if module.site == EMBED:
            inputs, outputs = outputs, inputs
        expected = {"A": (module.rank, inputs), "B": (outputs, module.rank)}
    return _other_shapes(shapes, expected)


def _other_shapes(shapes: Shapes, expected: Shapes) -> str:
    for slot, shape in shapes.items():
        if shape != expected.get(slot):
            return f"has {slot} of shape {shape}"
    return ""
