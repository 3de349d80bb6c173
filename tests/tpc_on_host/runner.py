"""Compiles a generated kernel and its glue code with the host's C++ compiler, and runs it on torch tensors."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_compile.schedules.gaudi.build import sources
from vllm_compile.schedules.gaudi.glue import guid
from vllm_compile.schedules.gaudi.kernel import Kernel
from vllm_compile.spec import Sym

HERE = Path(__file__).parent
DIMS = 5


class Argument(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64 * DIMS),
        ("is_bf16", ctypes.c_int64),
    )


@dataclass
class HostKernel:
    """A kernel that runs on this machine.  `piece`: places of each dimension of the index space that run at once."""

    symbol: str
    kernel: Kernel
    library: ctypes.CDLL

    def __call__(self, inputs: list[torch.Tensor], piece: int = 1) -> list[torch.Tensor]:
        """Results, which start as NaN; RuntimeError for an access that the glue code does not announce."""
        tokens = inputs[0].shape[0]
        made = [torch.full(_sizes(a.shape, tokens), float("nan"), dtype=inputs[0].dtype) for a in self.kernel.outputs]
        shapes = [_sizes(access.shape, tokens) for access in self.kernel.inputs]
        given = [tensor.reshape(shape).contiguous() for tensor, shape in zip(inputs, shapes, strict=True)]
        arguments = (Argument * (len(given) + len(made)))(*map(_argument, [*given, *made]))
        problem = self.library.run(guid(self.symbol).encode(), arguments, piece)
        if problem is not None:
            raise RuntimeError(problem.decode())
        return made


def _sizes(shape, tokens: int) -> list[int]:
    return [tokens if dim == Sym.TOKENS else int(dim) for dim in shape]


def _argument(tensor: torch.Tensor) -> Argument:
    sizes = (ctypes.c_int64 * DIMS)(*reversed(tensor.shape))
    return Argument(tensor.data_ptr(), tensor.dim(), sizes, tensor.dtype == torch.bfloat16)


def build(kernel: Kernel, folder: Path, change=lambda files: files) -> HostKernel:
    """The kernel compiled; `change` may tamper with the files of the archive first."""
    symbol = "kernel_0_t1"
    files = change(sources({symbol: kernel}, "gaudi2"))
    for name, text in files.items():
        (folder / name).write_text(text)
    count, code = len(kernel.tensors), f"_binary___{symbol}_o"
    call = ", ".join(f"t[{n}]" for n in range(count))
    (folder / "all.cpp").write_text(
        f'#include "{HERE / "tpc.h"}"\n#define main tpc_main\n#include "{symbol}.c"\n#undef main\n#include "glue.cpp"\n'
        f'asm(".data\\n.globl {code}_start\\n{code}_start: .byte 7\\n.globl {code}_end\\n{code}_end: .byte 0");\n'
        f"#define INPUTS {len(kernel.inputs)}\n#define OUTPUTS {len(kernel.outputs)}\n#define CALL tpc_main({call})\n"
        f'#include "{HERE / "run.cpp"}"\n'
    )
    # Products and sums must not be contracted: the reference rounds each.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{HERE}"]
    subprocess.run(["g++", *flags, str(folder / "all.cpp"), "-o", str(folder / "kernel.so")], check=True)
    library = ctypes.CDLL(str(folder / "kernel.so"))
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
    return HostKernel(symbol, kernel, library)
