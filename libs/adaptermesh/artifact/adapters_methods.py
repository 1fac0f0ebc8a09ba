"""The methods of the `adapters` library that are read: their configs, and what of them is not served.

Keys and defaults are those of adapters 1.3.0, `configuration/adapter_config.py`.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

_MAX_LAYERS = 1_000_000

_Layers = Annotated[list[Annotated[int, Field(ge=0, le=_MAX_LAYERS)]], Field(max_length=4096)]
_Reduction = Annotated[float, Field(ge=1e-4, le=1e9, allow_inf_nan=False)]
_Scale = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
_Small = Annotated[int, Field(ge=1, le=65536)]
_Text = Annotated[str, Field(max_length=64)]

# What each name of an activation computes; the names are transformers', "leakyrelu" is the library's own.
_ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "relu": "relu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_new",
        "gelu_fast": "gelu_new",
        "gelu_pytorch_tanh": "gelu_new",
        "gelu_python_tanh": "gelu_new",
        "gelu_accurate": "gelu_new",
        "silu": "silu",
        "swish": "silu",
        "tanh": "tanh",
        "sigmoid": "sigmoid",
        "leakyrelu": "leaky_relu",
        "leaky_relu": "leaky_relu",
        "linear": "linear",
    }
)


class _Config(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    leave_out: _Layers = []
    use_gating: bool = False


class BottleneckConfig(_Config):
    """Bottlenecks of every shape (arXiv:1902.00751, 2005.00247, 2110.04366), Compacter (arXiv:2106.04647).

    No key may be null but those that say so: to the library a null is something else than the default.
    """

    container: ClassVar[str] = "adapters"

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: _Reduction | dict[_Text, _Reduction]
    non_linearity: _Text
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: _Scale | Literal["learned", "channel"] = 1.0
    residual_before_ln: bool | Literal["post_add"] = True
    inv_adapter: _Text | None = None
    inv_adapter_reduction_factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    cross_adapter: bool = False
    phm_layer: bool = False
    phm_dim: _Small = 4
    phm_rank: _Small = 1
    phm_bias: bool = True
    factorized_phm_W: bool = True  # noqa: N815 (the library's key)
    factorized_phm_rule: bool = False
    shared_W_phm: bool = False  # noqa: N815
    shared_phm_rule: bool = True

    @property
    def kind(self) -> str:
        """The manifest's name of it."""
        return "compacter" if self.phm_layer else "bottleneck"

    @property
    def activation(self) -> str:
        """The canonical name of the activation; empty for one that is not served."""
        return _ACTIVATIONS.get(self.non_linearity.lower(), "")

    @property
    def reads(self) -> str:
        """What the bottleneck reads, as the canonical form names it."""
        if self.is_parallel:
            return "residual"
        return "sum" if self.original_ln_before else "output"

    def blocks(self) -> tuple[str, ...]:
        """The block sites that have one."""
        return ("attention",) * self.mh_adapter + ("ffn",) * self.output_adapter

    def width(self, hidden: int, layer: int) -> int | None:
        """The inner width in a layer, as the library rounds it; None if the map leaves the layer open."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            found = factor.get(str(layer), factor.get("default"))
            if found is None:
                return None
            factor = found
        return max(int(hidden // factor), 1)

    def unserved(self) -> Iterator[str]:
        """Why it can't be served, whatever the base."""
        if self.use_gating:
            yield "use_gating: a learned gate on each bottleneck"
        if self.inv_adapter not in (None, "nice"):
            yield f"inv_adapter {self.inv_adapter!r}: of the invertible adapters only 'nice' is served"
        elif self.inv_adapter is not None and not self.inv_adapter_reduction_factor:
            yield "inv_adapter without an inv_adapter_reduction_factor"
        if self.cross_adapter:
            yield "cross_adapter: bottlenecks after cross-attention"
        if self.ln_before or self.ln_after:
            yield "ln_before or ln_after: a layer norm of its own inside of the bottleneck"
        if not self.activation:
            yield (
                f"non_linearity {self.non_linearity!r}: the bottlenecks that are served have one of "
                f"{', '.join(sorted(_ACTIVATIONS))}"
            )
        yield from self._odd_residuals()

    def _odd_residuals(self) -> Iterator[str]:
        """Without a layer norm behind it the stream must come out with exactly one residual.

        Source: adapters 1.3.0, `methods/modeling.py`, Adapter.pre_forward and post_forward.
        """
        if not self.is_parallel and self.residual_before_ln == "post_add":
            yield "residual_before_ln 'post_add', which the library computes only before a layer norm"
            return
        inside = not self.is_parallel and self.original_ln_before and not self.residual_before_ln
        if inside + self.original_ln_after != 1:
            times = "twice" if inside else "not at all"
            yield (
                f"original_ln_before {self.original_ln_before}, original_ln_after {self.original_ln_after} "
                f"and residual_before_ln {self.residual_before_ln}, which add the residual stream {times}"
            )


class LoraConfig(_Config):
    """LoRA (arXiv:2106.09685), IA3 (2205.05638), VeRA (2310.11454), DoRA (2402.09353), and both of the last.

    `alpha` is what the library of today takes it for: before 1.1.0 it had no effect.
    """

    container: ClassVar[str] = "loras"

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    r: _Small
    alpha: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
    attn_matrices: Annotated[list[Literal["q", "k", "v", "o"]], Field(max_length=16)] = ["q", "v"]
    composition_mode: Literal["add", "scale"] = "add"
    use_dora: bool = False
    vera_d: int | float | None = None
    vera_b: int | float | None = None

    @property
    def is_vera(self) -> bool:
        """To the library an integer is no value for vera_d."""
        return isinstance(self.vera_d, float) or isinstance(self.vera_b, float)

    @property
    def is_ia3(self) -> bool:
        """Factors on outputs in place of a low-rank sum."""
        return self.composition_mode == "scale"

    @property
    def kind(self) -> str:
        """The manifest's name of it."""
        if self.is_ia3:
            return "ia3"
        if self.is_vera:
            return "dvora" if self.use_dora else "vera"
        return "dora" if self.use_dora else "lora"

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.r

    def problems(self) -> Iterator[str]:
        """What the library itself would refuse."""
        if self.is_ia3 and self.r != 1:
            yield f"r is {self.r}, composition_mode 'scale' needs 1"
        if self.is_ia3 and (self.use_dora or self.is_vera):
            yield "composition_mode 'scale' goes with neither DoRA nor VeRA"

    def unserved(self) -> Iterator[str]:
        """Why it can't be served, whatever the base."""
        if self.use_gating:
            yield "use_gating: a learned gate in place of alpha/r"
        if self.is_ia3 and self.alpha != 1:
            yield f"composition_mode 'scale' with an alpha of {self.alpha:g}, only 1 is served"


class ReftConfig(BaseModel):
    """LoReFT, NoReFT and DiReFT (arXiv:2404.03592).

    The library does not save whether a projection is subtracted, so the last two look alike.
    """

    container: ClassVar[str] = "refts"

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    layers: Literal["all"] | _Layers = "all"
    prefix_positions: Annotated[int, Field(ge=0, le=1_000_000)]
    suffix_positions: Annotated[int, Field(ge=0, le=1_000_000)]
    r: _Small
    orthogonality: bool
    tied_weights: bool = False
    subtract_projection: bool | None = None
    non_linearity: _Text | None = None
    output_reft: bool = True

    @property
    def kind(self) -> str:
        """The manifest's name of it."""
        if self.orthogonality:
            return "loreft"
        return "direft" if self.subtract_projection is False else "noreft"

    @property
    def activation(self) -> str:
        """The canonical name of the activation; empty for one that is not served."""
        return "linear" if self.non_linearity is None else _ACTIVATIONS.get(self.non_linearity.lower(), "")

    @property
    def subtracts(self) -> bool:
        """Whether the projection of the stream is subtracted."""
        return self.subtract_projection is not False

    def problems(self) -> Iterator[str]:
        """What can mean nothing."""
        if not self.prefix_positions and not self.suffix_positions:
            yield "prefix_positions and suffix_positions are both 0: it would act on no token"

    def unserved(self) -> Iterator[str]:
        """Why it can't be served, whatever the base."""
        if not self.orthogonality and self.subtract_projection is None:
            yield (
                "NoReFT and DiReFT are saved alike by the adapters library: say in the config which it is, "
                'with "subtract_projection": true for NoReFT or false for DiReFT'
            )
        if not self.activation:
            yield f"non_linearity {self.non_linearity!r}"
        if not self.output_reft:
            yield "output_reft false"


class PrefixConfig(_Config):
    """Prefix tuning (arXiv:2101.00190), `flat` where its keys and values are parameters themselves."""

    container: ClassVar[str] = "prefix_tunings"

    flat: bool = False
    prefix_length: _Small = 30
    bottleneck_size: _Small = 512
    non_linearity: _Text = "tanh"

    kind: ClassVar[str] = "prefix_tuning"

    @property
    def activation(self) -> str:
        """The canonical name of the projection's activation; empty for one that is not served."""
        found = _ACTIVATIONS.get(self.non_linearity.lower(), "")
        return found if found in ("tanh", "relu") else ""

    def unserved(self) -> Iterator[str]:
        """Why it can't be served, whatever the base."""
        if self.use_gating:
            yield "use_gating: a learned gate on the prefix"
        if self.leave_out:
            yield "leave_out: a prefix that some layers do not have"
        if not self.flat and not self.activation:
            yield f"non_linearity {self.non_linearity!r}: a projected prefix is served with tanh or relu"


class PromptConfig(BaseModel):
    """Prompt tuning (arXiv:2104.08691)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    container: ClassVar[str] = "prompt_tunings"
    kind: ClassVar[str] = "prompt_tuning"

    prompt_length: _Small = 10
    combine: Literal["prefix", "prefix_after_bos"] = "prefix"


MethodConfig = BottleneckConfig | LoraConfig | PrefixConfig | PromptConfig | ReftConfig

BOTTLENECK_NO_EFFECT = frozenset(
    {
        # Only where ln_after is set, which is not served.
        "adapter_residual_before_ln",
        "dropout",
        "hypercomplex_nonlinearity",
        "init_weights",
        "init_weights_seed",
        "learn_phm",
        "phm_c_init",
        "phm_init_range",
        "stochastic_depth",
    }
)
PREFIX_NO_EFFECT = frozenset(
    # Where a decoder has one prefix, they choose nothing.
    {"encoder_prefix", "cross_prefix", "dropout", "init_weights_seed", "shared_gating"}
)
PROMPT_NO_EFFECT = frozenset({"init_weights_seed", "prompt_init", "prompt_init_text", "random_uniform_scale"})
REFT_NO_EFFECT = frozenset({"dropout", "dtype", "init_weights_seed"})
LORA_NO_EFFECT = frozenset({"dropout", "dtype", "init_weights", "init_weights_seed"})
