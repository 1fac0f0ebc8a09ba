"""The kernels' interface: the structures of decoder.cpp and its functions, through ctypes."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch

from adaptermesh.worker.engine.native.build import NoKernels, find_library

SITES = ("q", "k", "v", "o", "gate", "up", "down")
"""The sites in the order of the kernels' arrays."""

STAGES = (
    *("take_qkv", "qkv", "attend", "o", "join_attention"),
    *("take_gated", "gated", "activate", "down", "join_ffn"),
)
"""What a layer consists of, in the order of the kernels' `Stage`."""

ACTIVATIONS = ("linear", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu")
INPUTS = ("output", "sum", "residual")
"""Of a bottleneck, in the order of the kernels' `Activation` and `BottleneckInput`."""

FLOAT32, BFLOAT16 = 0, 1
"""How a matrix may be stored; it is computed in float32 in either case."""


class Matrix(Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("inputs", c_int32),
        ("panel_count", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        ("norm_in", c_void_p),
        ("norm_mid", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cache", c_void_p),
        *((site, Matrix) for site in SITES),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("norm_out", c_void_p),
        ("head", Matrix),
        ("layer_count", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
        ("inner", c_int32),
        ("vocabulary", c_int32),
        ("block", c_int32),
        ("sites", c_int32 * len(SITES)),
        ("window", c_int32),
        ("epsilon", c_float),
        ("scaling", c_float),
    )


class Adapters(Structure):
    _fields_ = (
        ("tables", c_void_p),
        ("inner", c_void_p),
        ("max_rank", c_int32),
        ("used", c_int32),
    )


class Factors(Structure):
    """Of one site: [rows, layers, width] float32, and the distances of its rows and layers in floats."""

    _fields_ = (("values", c_void_p), ("row_stride", c_int64), ("layer_stride", c_int64))


class Scales(Structure):
    """`rows`: [tokens] int32; the sites are in the order of SITES."""

    _fields_ = (
        ("rows", c_void_p),
        ("inputs", Factors * len(SITES)),
        ("outputs", Factors * len(SITES)),
        ("shifts", Factors * len(SITES)),
    )


class Bottlenecks(Structure):
    _fields_ = (
        ("tables", c_void_p),
        ("inner", c_void_p),
        ("max_width", c_int32),
        ("used", c_int32),
    )


class Step(Structure):
    _fields_ = (
        ("hidden", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("spans", c_void_p),
        ("tables", c_void_p),
        ("outputs", c_void_p),
        ("logits", c_void_p),
        ("scratch", c_void_p),
        ("adapters", Adapters),
        ("scales", Scales),
        ("bottlenecks", Bottlenecks),
        ("tokens", c_int32),
        ("span_count", c_int32),
        ("output_count", c_int32),
        ("first_layer", c_int32),
        ("last_layer", c_int32),
        ("threads", c_int32),
        ("first_stage", c_int32),
        ("last_stage", c_int32),
        ("moved", c_int32),
        ("apart", c_int32),
        ("head", c_int32),
    )


class Scratch(Structure):
    """Where a step's intermediate values are; see decoder.cpp for what each holds and when."""

    _fields_ = tuple((name, c_void_p) for name in ("x", "own", "qkv", "mixed", "inner", "upper"))


LOAD = np.dtype(
    [
        *((name, np.int64) for name in ("from_a", "from_b", "a", "b", "scales")),
        *((name, np.int32) for name in ("inputs", "outputs", "rank")),
        ("scale", np.float32),
    ]
)
"""`Load`: one module to copy. The first five are addresses."""
Loads = np.ndarray[tuple[int], np.dtype[np.void]]

BOTTLENECK = np.dtype(
    [
        *((name, np.int64) for name in ("a", "b", "scales", "rank", "down_bias", "up_bias")),
        ("scale", np.float32),
        *((name, np.int32) for name in ("activation", "input", "unused")),
    ]
)
"""`Bottleneck`: its first four are `Rows`."""


class Kernels:
    """The loaded library. Its calls let other Python threads run."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.adaptermesh_scratch_floats.restype = c_int64
        self._library.adaptermesh_scratch_floats.argtypes = (POINTER(Model), c_int64)
        self._library.adaptermesh_pack.restype = None
        self._library.adaptermesh_pack.argtypes = (c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int32)
        self._library.adaptermesh_run.restype = None
        self._library.adaptermesh_run.argtypes = (POINTER(Model), POINTER(Step))
        self._library.adaptermesh_project.restype = None
        self._library.adaptermesh_project.argtypes = (
            POINTER(Matrix),
            c_void_p,
            c_int32,
            c_void_p,
            c_int32,
            c_int32,
        )
        self._library.adaptermesh_lay_out.restype = None
        self._library.adaptermesh_lay_out.argtypes = (POINTER(Model), c_int64, c_void_p, POINTER(Scratch))
        self._library.adaptermesh_add_bottleneck.restype = None
        self._library.adaptermesh_add_bottleneck.argtypes = (
            *(POINTER(Bottlenecks), c_int32, c_void_p, c_void_p),
            *(c_int32, c_int32, c_int32),
        )
        self._library.adaptermesh_load.restype = None
        self._library.adaptermesh_load.argtypes = (c_void_p, c_int32)
        self._library.adaptermesh_add_lowrank.restype = None
        self._library.adaptermesh_add_lowrank.argtypes = (
            *(POINTER(Adapters), c_int32),
            *(c_void_p, c_int32, c_int64),
            *(c_void_p, c_int32, c_int64),
            *(c_int32, c_int32),
        )
        self.panel = int(self._library.adaptermesh_panel())

    def panels(self, outputs: int) -> int:
        return -(-outputs // self.panel)

    def pack(self, weight: torch.Tensor, kind: int, to: torch.Tensor) -> None:
        """weight: [out, in] float32. to: [panels, in, panel] float32 or bfloat16, as `kind` says."""
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        threads = torch.get_num_threads()
        self._library.adaptermesh_pack(weight.data_ptr(), outputs, inputs, kind, to.data_ptr(), threads)

    def scratch_floats(self, model: Model, tokens: int) -> int:
        """Floats of scratch memory that a step needs."""
        return int(self._library.adaptermesh_scratch_floats(model, tokens))

    def lay_out(self, model: Model, tokens: int, memory: torch.Tensor) -> Scratch:
        """Where the parts of a step's scratch memory are."""
        found = Scratch()
        self._library.adaptermesh_lay_out(model, tokens, memory.data_ptr(), found)
        return found

    def run(self, model: Model, step: Step) -> None:
        """Runs some stages of some layers of a step, and the head if it is asked for."""
        self._library.adaptermesh_run(model, step)

    def project(self, matrix: Matrix, x: torch.Tensor, outputs: int, threads: int) -> torch.Tensor:
        """X W^T without the bias, in float32. x: [n, in] -> [n, outputs]."""
        x = x.float().contiguous()
        y = torch.empty(len(x), outputs)
        self._library.adaptermesh_project(matrix, x.data_ptr(), len(x), y.data_ptr(), outputs, threads)
        return y

    def load(self, loads: Loads) -> None:
        """Copies modules into the memory of an adapter; all addresses must be good while it runs."""
        self._library.adaptermesh_load(loads.ctypes.data, len(loads))

    def add_lowrank(self, adapters: Adapters, index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds s B (A x) to y for each token. x: [tokens, in]; y: [tokens, out]. The columns lie together.

        `index` is that of the site and layer in the adapters' tables.
        """
        if x.stride(1) != 1 or y.stride(1) != 1:
            raise ValueError("the columns of x and y must lie together")
        tokens, outputs = y.shape
        x_part = (x.data_ptr(), x.shape[1], x.stride(0))
        y_part = (y.data_ptr(), outputs, y.stride(0))
        self._library.adaptermesh_add_lowrank(
            adapters, index, *x_part, *y_part, tokens, torch.get_num_threads()
        )

    def add_bottleneck(
        self, bottlenecks: Bottlenecks, index: int, v: torch.Tensor, y: torch.Tensor, threads: int
    ) -> None:
        """Adds s (up act(down v + b) + c) to y for each token that has one. v, y: [tokens, hidden].

        `index` is that of the block and layer in the tables.
        """
        if not (v.is_contiguous() and y.is_contiguous()):
            raise ValueError("v and y must be contiguous")
        tokens, hidden = y.shape
        self._library.adaptermesh_add_bottleneck(
            bottlenecks, index, v.data_ptr(), y.data_ptr(), hidden, tokens, threads
        )


def load_kernels(folder: Path) -> Kernels:
    """Loads the kernels for this machine, building them into the folder if need be; raises NoKernels."""
    path = find_library(folder)
    try:
        return Kernels(path)
    except OSError as error:
        raise NoKernels(f"{path} can't be loaded: {error}") from error
