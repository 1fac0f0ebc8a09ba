"""peft's IA3: a factor for each output of a module, or for each input of a feed-forward one."""

from collections.abc import Iterator, Mapping, Sequence

from typing_extensions import override

from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.ops import AFFINE
from adaptermesh.artifact.patterns import Budget, Matcher, PatternError, full_matcher
from adaptermesh.artifact.peft_models import Ia3Config
from adaptermesh.artifact.peft_plan import Reader
from adaptermesh.artifact.pieces import vector, width_out
from adaptermesh.artifact.plan import Entries, Piece, PlannedTensor, Shape, copied, tensor_name
from adaptermesh.artifact.problems import Problems
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import HEAD, Site


class Ia3Reader(Reader):
    """`ia3_l`: [out, 1] scales what comes out, the bias too; of feed-forward modules [1, in] what goes in."""

    method = "IA3"
    edges = frozenset({HEAD})
    suffixes: Mapping[str, str] = {".ia3_l": "ia3_l"}
    decider = ""

    def __init__(self, config: Ia3Config, problems: Problems) -> None:
        self._is_feedforward: Matcher = lambda _: False
        try:
            self._is_feedforward = _feedforward(config.feedforward_modules)
        except PatternError as error:
            problems.add(
                f"adapter_config.json: feedforward_modules: {error}; use plain module names or paths"
            )

    @override
    def because(self, module: str) -> str:
        return f"it is {'a' if self._is_feedforward(module) else 'no'} feed-forward module in the config"

    @override
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        return {"ia3_l": (1, sites[0].in_features) if self._is_feedforward(module) else (width_out(sites), 1)}

    @override
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        entry = entries["ia3_l"]
        for site in sites:
            if not self._is_feedforward(module):
                yield vector(site, layer, "out_scale", entry)
                continue
            spec = TensorSpec(tensor_name(site.name, layer, "in_scale"), entry.dtype, (site.in_features,))
            yield (
                ModuleOp(site.name, layer, AFFINE, 0, 1.0, {"in_scale": spec.name}, entry.dtype),
                (PlannedTensor(spec, layer, copied(entry.offset, spec.size)),),
            )


def _feedforward(names: str | Sequence[str] | None) -> Matcher:
    """As peft matches: a text is a pattern for the whole path, a list holds ends of paths."""
    if isinstance(names, str):
        return full_matcher(names, Budget())
    ends = tuple(names or ())
    return lambda path: path.endswith(ends)
