"""Instructions of CDNA that TIR has no operator for, as LLVM's AMDGPU back end calls them.

Moves between lanes follow AMD's "CDNA3 Instruction Set Architecture": DPP moves within a row of 16 lanes cost what an
addition does, DS_BPERMUTE_B32 goes through the LDS crossbar.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from vllm_compile.targets.rocm import WAVE

# DPP_CTRL: the lane that each lane reads.  Where neighbours agree already, a mirror does what an exclusive or does.
QUAD_XOR_1, QUAD_XOR_2 = 0xB1, 0x4E  # quad_perm:[1,0,3,2] and [2,3,0,1]
ROW_HALF_MIRROR, ROW_MIRROR = 0x141, 0x140  # 7 - i within 8, 15 - i within 16
DPP_STEPS = (QUAD_XOR_1, QUAD_XOR_2, ROW_HALF_MIRROR, ROW_MIRROR)
PERMUTE_STEPS = (16, 32)
ALL_ROWS = 0xF


def move_dpp(value: Any, control: int) -> Any:
    """The float32 `value` of the lane that `control` names."""
    bits = T.reinterpret("int32", value)
    rows = (T.int32(ALL_ROWS), T.int32(ALL_ROWS), T.bool(True))
    moved = T.call_llvm_pure_intrin("int32", "llvm.amdgcn.update.dpp.i32", bits, bits, T.int32(control), *rows)
    return T.reinterpret("float32", moved)


def from_lane(value: Any, lane: Any) -> Any:
    """The float32 `value` of another lane of the wave."""
    moved = T.call_llvm_pure_intrin("int32", "llvm.amdgcn.ds.bpermute", lane * 4, T.reinterpret("int32", value))
    return T.reinterpret("float32", moved)


def reciprocal(value: Any) -> Any:
    """1 / `value`, to one unit in the last place of float32."""
    return T.call_llvm_pure_intrin("float32", "llvm.amdgcn.rcp.f32", value)


def uniform(value: Any) -> Any:
    """An int32 that is the same in all lanes of a wave, in a scalar register: branches on it are the wave's."""
    return T.call_llvm_pure_intrin("int32", "llvm.amdgcn.readfirstlane.i32", value)


def mfma(a: Any, b: Any, c: Any) -> Any:
    """V_MFMA_F32_16X16X16_BF16: c + a @ b of a wave; a and b uint16x4 (bits of bf16), c float32x4.

    Lane l holds a[l % 16, l // 16 * 4 + i], b[l // 16 * 4 + i, l % 16] and c[l // 16 * 4 + i, l % 16] for i = 0 to 3.
    """
    modes = (T.int32(0), T.int32(0), T.int32(0))  # no broadcast of a's blocks, b's lanes as they are
    return T.call_llvm_pure_intrin("float32x4", "llvm.amdgcn.mfma.f32.16x16x16bf16.1k", a, b, c, *modes)


def schedule_barrier() -> None:
    """No instruction before it is moved behind it, nor the other way: loads stay together."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.amdgcn.sched.barrier", T.int32(0)))


def wave_reduce(value: Any, thread: Any, combine: Callable[[Any, Any], Any] = add) -> None:
    """Local value [1] float32 of each lane -> all of its wave's combined, in all lanes the same to the last bit."""
    for control in DPP_STEPS:
        T.buffer_store(value, combine(value[0], move_dpp(value[0], control)), [0])
    for step in PERMUTE_STEPS:
        T.buffer_store(value, combine(value[0], from_lane(value[0], T.bitwise_xor(thread % WAVE, step))), [0])


def wave_scan(value: Any, thread: Any) -> None:
    """Local value [1] float32 of each lane -> the sum of those of all lanes up to it (Hillis and Steele 1986)."""
    before = IRBuilder.name("before", T.alloc_buffer((1,), "float32", scope="local"))
    for step in (1, 2, 4, 8, 16, 32):
        # All lanes move theirs, before some of them add.
        T.buffer_store(before, from_lane(value[0], T.bitwise_and(thread - step, WAVE - 1)), [0])
        T.buffer_store(value, value[0] + T.if_then_else(thread % WAVE >= step, before[0], T.float32(0)), [0])


def block_reduce(
    value: Any, shared: Any, thread: Any, threads: int, combine: Callable[[Any, Any], Any] = add, at: int = 0
) -> None:
    """The same over a thread block; threads / 64 values of `shared` float32, from `at` on, are its memory.

    TVM puts the barrier between the writes to shared memory and the reads of it.
    """
    wave_reduce(value, thread, combine)
    if threads > WAVE:
        with T.If(thread % WAVE == 0), T.Then():
            T.buffer_store(shared, value[0], [at + thread // WAVE])
        T.buffer_store(value, reduce(combine, [shared[at + wave] for wave in range(threads // WAVE)]), [0])
