"""The configs of peft's methods: what of each one changes the arithmetic."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from adaptermesh.artifact.manifest_parts import MAX_INVOCATION_TOKENS, MAX_TOKEN_ROWS

PREFIX = "base_model.model."
"""How the name of every module begins in a file of peft."""
MAX_PATTERNS = 4096
MAX_RANK = 65536
_MAX_FACTOR = 2**31

_Alpha = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Count = Annotated[int, Field(ge=0, le=_MAX_FACTOR)]
_Layer = Annotated[int, Field(ge=0, le=1_000_000)]
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Names = Annotated[list[_Name], Field(max_length=MAX_PATTERNS)]
_Tokens = Annotated[list[_Token], Field(max_length=MAX_TOKEN_ROWS)]


class TargetConfig(BaseModel):
    """The keys that choose modules."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    target_modules: _Name | _Names
    exclude_modules: _Name | _Names | None = None
    layers_to_transform: _Layer | list[_Layer] | None = None
    layers_pattern: str | _Names | None = None
    fan_in_fan_out: bool = False
    modules_to_save: _Names | None = None
    bias: Annotated[str, Field(pattern=r"^(none|all|[a-z]{1,16}_only)$")] = "none"


class RankedConfig(TargetConfig):
    """A method whose rank and alpha may differ by module."""

    r: _Rank
    alpha: _Alpha
    rank_pattern: Annotated[dict[_Name, _Rank], Field(max_length=MAX_PATTERNS)] = {}
    alpha_pattern: Annotated[dict[_Name, _Alpha], Field(max_length=MAX_PATTERNS)] = {}


class LoraConfig(RankedConfig):
    """LoRA (arXiv:2106.09685); rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353) if asked for.

    With invocation tokens an activated LoRA (arXiv:2504.12397); an empty list is none, as in peft.
    """

    alpha: _Alpha = Field(alias="lora_alpha")
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    trainable_token_indices: _Tokens | Annotated[dict[_Name, _Tokens], Field(max_length=8)] | None = None
    invocation_tokens: Annotated[list[_Token], Field(max_length=MAX_INVOCATION_TOKENS)] = Field(
        default=[], alias="alora_invocation_tokens"
    )

    @field_validator("invocation_tokens")
    @classmethod
    def _check_variant(cls, tokens: list[int], info: ValidationInfo) -> list[int]:
        if tokens and info.data.get("use_dora"):
            raise ValueError("a DoRA can't be activated: peft has no such variant")
        return tokens


class TokensConfig(TargetConfig):
    """Trainable tokens: rows of the embeddings, and of a head that is tied to them."""

    target_modules: _Name | _Names = []
    token_indices: _Tokens


class LohaConfig(RankedConfig):
    """LoHa: the entrywise product of two low-rank products (arXiv:2108.06098)."""


class AdaLoraConfig(TargetConfig):
    """AdaLoRA (arXiv:2303.10512): every module begins with `init_r` and may have been pruned to less.

    `rank_pattern` says by the name of each lora_E which of its rows are left.
    """

    init_r: _Rank
    lora_alpha: _Alpha
    rank_pattern: Annotated[
        dict[_Name, Annotated[list[bool], Field(max_length=MAX_RANK)]], Field(max_length=MAX_PATTERNS)
    ] = {}


class VeraConfig(TargetConfig):
    """VeRA (arXiv:2310.11454): one A and B for all modules, two vectors for each."""

    r: _Rank


class Ia3Config(TargetConfig):
    """IA3 (arXiv:2205.05638): a factor for each output, or for each input of feed-forward modules."""

    feedforward_modules: _Name | _Names | None = None


class LokrConfig(RankedConfig):
    """LoKr: a Kronecker product of two matrices, which may be low-rank products (arXiv:2309.14859)."""

    decompose_both: bool = False
    decompose_factor: Annotated[int, Field(ge=-_MAX_FACTOR, le=_MAX_FACTOR)] = -1


class OftConfig(TargetConfig):
    """OFT: block-diagonal rotations of what goes into a module (arXiv:2306.07280).

    `r` is the number of blocks, `oft_block_size` their width; one of the two is 0 and follows.
    """

    r: _Count = 0
    oft_block_size: _Count = 32
    block_share: bool = False
    coft: bool = False
    eps: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 6e-5
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Field(ge=0, le=16)] = 5
    peft_version: str | None = None


class BoftConfig(TargetConfig):
    """BOFT: products of block-diagonal rotations between which inputs change places (arXiv:2311.06243).

    `boft_block_num` is the number of blocks, `boft_block_size` their width; one of the two is 0 and follows.
    """

    boft_block_size: _Count = 4
    boft_block_num: _Count = 0
    boft_n_butterfly_factor: Annotated[int, Field(ge=1, le=32)] = 1


class VirtualConfig(BaseModel):
    """Virtual tokens in front of every prompt, in one tensor.

    The numbers are those of the base that it was trained on, where the config has them.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    num_virtual_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)]
    num_transformer_submodules: Literal[1] = 1
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None


class PromptConfig(VirtualConfig):
    """Prompt tuning (arXiv:2104.08691) and p-tuning (arXiv:2103.10385): embeddings of virtual tokens.

    The encoder of p-tuning is evaluated when it is saved.
    """


class PrefixConfig(VirtualConfig):
    """Prefix tuning (arXiv:2101.00190): keys and values of virtual tokens, for every layer.

    The projection is evaluated when it is saved.
    """


MethodConfig = TargetConfig | VirtualConfig
