"""What an engine is built with. Every limit is here and has a unit in its name."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from adaptermesh.core.errors import invalid_field

FORWARDS = ("auto", "native", "lean", "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The limits of one engine on one device.

    Attributes:
        disk_dir: Folder of the disk cache; made when absent.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16", or "auto" (float32 on a CPU, bfloat16 on CUDA).
        threads: CPU threads of a tensor operation; 0 means the cores that this process may use.
        load_format: "auto" loads the base's weights; "dummy" makes random ones from config.json alone, to
            measure a shape. Its answers mean nothing.
        forward: "auto" takes the fastest way through the base that this machine and architecture allow:
            "native" (kernels in C++, on a CPU), "lean" (few torch calls a layer), or "plain" (the modules of
            transformers). One of these names takes that way or is refused.
        kernel_dir: Folder in which the native kernels are built once for the machine, if they did not come
            with the package.
        attention: "auto": on a CPU by gathering the keys; on CUDA over pages, by the first that gives right
            results there: torch's "varlen", our "triton" kernel, else "gather". Or one of them by name, or
            "plain", the slow twin of those over pages.
        cuda_graphs: On CUDA, record steps of decodes and replay them. No effect on a CPU.
        max_graphs: Graphs that may be recorded; steps that would need more run without.
        pack_weights: On the lean way, keep a second copy of the base's matrices in the CPU library's own
            layout, which makes small batches faster. No effect on CUDA.
        quantization: "none", or "int8": the matrices of the base's layers and their inputs in 8 bits, by
            torch on a CPU with VNNI. No longer the base to the last digit; adapters stay exact.
        max_batch_rows: Requests in one step.
        max_context_tokens: Longest prompt and output together; the model's own limit wins when it is smaller.
        step_tokens: Tokens of one step; longer prompts are computed in chunks.
        early_tokens: Tokens of prompts that may be on their way through the layers while their adapters
            still arrive from the store; 0: none. Never more than `step_tokens`. Their hidden states are held
            between steps. No effect where the forward can't stop between layers.
        scored_tokens: Prompt tokens that one step gives log probabilities of; prompts that ask for them are
            computed in chunks of no more. The logits of each take 4 bytes a token of the vocabulary.
        block_tokens: Tokens of one KV block.
        kv_tokens: Tokens that the KV cache holds in all.
        prefix_cache: Keep computed blocks and share them with requests that begin with the same tokens, for
            the same adapter version and tenant.
        device_slots: Adapters on the device at once.
        device_bytes: Bytes that their weights may take there, in the computing dtype; 0: the slots alone
            bound them.
        host_bytes: Bytes of adapters in host memory; page-locked when the device is CUDA.
        disk_bytes: Bytes of adapters in the disk cache.
        max_waiting: Requests that may wait; more are refused.
        max_overtakes: Requests that may pass one that waits for a device slot; then a slot is drained for it.
        priority_overtakes: Requests that may pass one of lower priority before it counts one level higher.
        max_step_adapters: Different adapters in one step; 0: as many as there are device slots.
        prompt_token_weight: What one computed token of a prompt adds to its tenant's share.
        output_token_weight: What one generated token adds to its tenant's share.
        tenant_counters: Tenants whose shares are remembered; above that, idle ones are forgotten.
        io_threads: Threads that read adapters from the disk cache.
        unhealthy_after: Steps that fail one after the other before the engine says that it is unhealthy.
    """

    disk_dir: Path
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    load_format: str = "auto"
    forward: str = "auto"
    kernel_dir: Path = field(default_factory=lambda: Path.home() / ".adaptermesh" / "kernels")
    attention: str = "auto"
    cuda_graphs: bool = True
    max_graphs: int = 32
    pack_weights: bool = True
    quantization: str = "none"
    max_batch_rows: int = 32
    max_context_tokens: int = 2048
    step_tokens: int = 512
    early_tokens: int = 512
    scored_tokens: int = 256
    block_tokens: int = 16
    kv_tokens: int = 32768
    prefix_cache: bool = True
    device_slots: int = 16
    device_bytes: int = 0
    host_bytes: int = 2**30
    disk_bytes: int = 8 * 2**30
    max_waiting: int = 1024
    max_overtakes: int = 64
    priority_overtakes: int = 64
    max_step_adapters: int = 0
    prompt_token_weight: float = 1.0
    output_token_weight: float = 2.0
    tenant_counters: int = 4096
    io_threads: int = 2
    unhealthy_after: int = 3

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise invalid_field("load_format", f"{self.load_format!r} is neither 'auto' nor 'dummy'")
        if self.forward not in FORWARDS:
            raise invalid_field("forward", f"{self.forward!r} is none of {', '.join(FORWARDS)}")
        if self.attention not in ("auto", "gather", "varlen", "triton", "plain"):
            raise invalid_field("attention", f"{self.attention!r} is no way to attend")
        if self.quantization not in ("none", "int8"):
            raise invalid_field("quantization", f"{self.quantization!r} is neither 'none' nor 'int8'")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise invalid_field("dtype", f"{self.dtype!r} is not a dtype the engine computes in")
        for name in (
            *("max_batch_rows", "max_context_tokens", "scored_tokens", "block_tokens", "device_slots"),
            *("io_threads", "max_graphs"),
        ):
            if getattr(self, name) < 1:
                raise invalid_field(name, "needs to be at least 1")
        self._check_fairness()
        for name in ("early_tokens", "device_bytes"):
            if getattr(self, name) < 0:
                raise invalid_field(name, "must not be negative")
        if self.step_tokens < self.max_batch_rows:
            # Each running row decodes in each step: a smaller budget would leave rows behind.
            raise invalid_field("step_tokens", f"{self.step_tokens} is less than max_batch_rows")
        if self.kv_tokens < self.block_tokens:
            raise invalid_field("kv_tokens", f"{self.kv_tokens} is less than one block")

    def _check_fairness(self) -> None:
        for name in ("priority_overtakes", "tenant_counters"):
            if getattr(self, name) < 1:
                raise invalid_field(name, "needs to be at least 1")
        if self.max_step_adapters < 0:
            raise invalid_field("max_step_adapters", "must not be negative")
        for name in ("prompt_token_weight", "output_token_weight"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise invalid_field(name, "needs to be more than 0, and finite")
