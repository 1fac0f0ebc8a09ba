"""Compiles every Triton kernel for a Hopper card, which needs no card. Prints what it made."""

import sys
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adaptermesh.worker.engine import paged_triton
from adaptermesh.worker.engine.ops import lowrank_triton

HOPPER = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16, "fp32": triton.language.float32}
KERNELS: dict[ModuleType, tuple[str, ...]] = {
    lowrank_triton: ("_shrink_tokens", "_expand_tokens", "_shrink_tiles", "_expand_tiles"),
    paged_triton: ("_attend",),
}
# By parameter: what is no pointer to the computing dtype.
TYPES = {
    **dict.fromkeys(("scales", "inner"), "*fp32"),
    **dict.fromkeys(("singles", "tiles", "spans", "starts", "used", "table"), "*i32"),
    **dict.fromkeys(("width", "x_stride", "a_stride", "b_stride", "y_stride"), "i32"),
    **dict.fromkeys(("scaling", "softcap"), "fp32"),
    **dict.fromkeys(("window", "q_token", "q_head", "out_token"), "i32"),
    **dict.fromkeys(("page_stride", "key_stride", "head_stride", "table_stride"), "i32"),
}
CONSTANTS: dict[str, int] = {
    "TOKENS": 16,
    "ROWS": 16,
    "COLUMNS": 128,
    "SHARED": 4,
    "QUERIES": 64,
    "DIM": 128,
    "WIDTH": 128,
    "PAGE": 16,
    "KEYS": 64,
    "TILED": True,
    "CAPPED": True,
    "WINDOWED": True,
}


def compile_kernel(kernel: Any, dtype: str) -> None:
    constants = {**CONSTANTS, "FACTOR": DTYPES[dtype]}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in names}
    used = {(names.index(name),): value for name, value in constants.items() if name in names}
    made = triton.compile(ASTSource(kernel, signature, used), target=HOPPER)
    print(f"{kernel.__name__} {dtype}: {len(made.asm['cubin'])} bytes", flush=True)


if __name__ == "__main__":
    for module, kernels in KERNELS.items():
        for name in kernels:
            for dtype in sys.argv[1:] or DTYPES:
                compile_kernel(getattr(module, name), dtype)
