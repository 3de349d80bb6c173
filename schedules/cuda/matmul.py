"""The matrix product of `linear` and `gate_up_silu` for few tokens: y[T, N] = x[T, K] @ w[N, K].T, weights read once.

TVM's function checks the arguments, computes the grid and launches; the work of a thread block is the device function
`stream_linear` (stream_linear.cuh, which says how it goes about it).

Roofline.  N * K * 2 bytes of weights (1.5 if lossless), 2 * T * N * K operations: up to some hundred tokens an H200's
bound is memory, 4.8 TB/s.  Gates and ups of Llama-3.1-8B (28672 x 4096): 235 MB, 49 us; lossless 176 MB, 37 us.
x is read again by every thread block, T * K * 2 bytes from L1 or L2, against 16 * row_tiles * K * 2 of weights:
as many from 16 tokens on, which is where these kernels cease to be the right ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from .. import lossless
from ..family import Config, Variant

SOURCE = '#include "stream_linear.cuh"\n'
TOKENS = 8  # of one mma
VENDOR_TOKENS = 17  # from so many on cuBLASLt is faster (benchmarks/baseline.md)
MOST_SUMS = 64  # tiles of sums of a thread block's warps that its registers hold without spilling
LAUNCH = ("blockIdx.x", "blockIdx.y", "threadIdx.x")
# Start while the kernel before runs; it is waited for before anything but weights is read.
DEPENDENT_LAUNCH = "tirx.use_programtic_dependent_launch"
DYNAMIC_SHARED_MEMORY = "tirx.use_dyn_shared_memory"


def shared_bytes(config: Config) -> int:
    """Shared memory of a thread block: the stages of all warps, or in the same place their sums."""
    vectors = 3 if config["lossless"] else 4
    return 512 * config["warps"] * config["row_tiles"] * max(config["stages"] * vectors, config["token_tiles"])


def fits(spec: OpSpec, config: Config, target: CudaTarget, gated: bool = False) -> bool:
    """True if a kernel of this configuration can be built."""
    N = spec.input("weight").size(0)
    halves = 2 if gated else 1
    return (
        N % (lossless.TILE * max(config["row_tiles"], halves)) == 0
        and config["row_tiles"] % halves == 0
        and shared_bytes(config) <= target.shared_bytes
    )


def serves(spec: OpSpec) -> bool:
    """True for bf16 weights of whole blocks; of a gated product, each half in whole tiles."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    return spec.input("x").dtype == spec.input("weight").dtype == "bfloat16" and lossless.serves(N, K)


def space(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool = False) -> Sequence[Config]:
    """Every configuration that can be built."""
    configs = [
        {"token_tiles": m, "row_tiles": r, "warps": warps, "stages": stages, "ahead": ahead, "lossless": packed}
        for m in (1, 2, 4, 8)
        for r in (1, 2, 4)
        for warps in (4, 8, 16)
        for stages in (2, 3, 4, 6)
        for ahead in (False, True)
        if warps * m * r <= MOST_SUMS
    ]
    return [config for config in configs if fits(spec, config, target, gated)]


def default_variants(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool = False) -> Sequence[Variant]:
    """What was fastest on an H200 (benchmarks/baseline.md).

    Many warps to a tile of rows where a multiprocessor has no more than two tiles.  Two stages, which leave most of the
    memory to L1 and so to x.  x ahead for up to eight tokens, save for gated weights and where a multiprocessor has
    three tiles.  All variants of a product have the same number of warps, so that a token's result has the same bits
    in each.
    """
    row_tiles = 2 if gated else 1
    shares = spec.input("weight").size(0) / (lossless.TILE * row_tiles) / target.multiprocessors
    warps = 16 if shares <= 2 or not (packed or gated) else 8
    variants = []
    for min_tokens, token_tiles in ((1, 1), (9, 2), (17, 4), (33, 8)):
        if warps * token_tiles * row_tiles > MOST_SUMS:
            break
        config = {
            "token_tiles": token_tiles,
            "row_tiles": row_tiles,
            "warps": warps,
            "stages": 2 if packed or not gated else 3,
            "ahead": token_tiles == 1 and not (gated or 2 < shares <= 3),
            "lossless": packed,
        }
        variants.append(Variant(min_tokens, config))
    return variants


def matmul(spec: OpSpec, config: Config, target: CudaTarget, gated: bool) -> tirx.PrimFunc:
    """The kernel of `spec`; any number of tokens, though made for token_tiles * 8."""
    assert fits(spec, config, target, gated), (spec, config)
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    packed, warps = config["lossless"], config["warps"]
    flags = map(_cpp, (config["ahead"], packed, gated))
    template = (config["token_tiles"], config["row_tiles"], warps, config["stages"], *flags)
    function = f"vllm_compile::stream_linear<{', '.join(map(str, template))}>"

    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        T.func_attr({"tirx.kernel_launch_params": [*LAUNCH, DEPENDENT_LAUNCH, DYNAMIC_SHARED_MEMORY]})
        handles = [T.arg(name, T.handle()) for name, _ in spec.inputs] + [T.arg("out", T.handle())]
        tokens = IRBuilder.name("tokens", T.int64())
        tensors = {}
        for handle, (name, tensor) in zip(handles, (*spec.inputs, ("out", spec.outputs[0])), strict=True):
            shape = [tokens if dim == Sym.TOKENS else dim for dim in tensor.shape]
            dtype = tensor.dtype
            if name == "weight" and packed:
                shape, dtype = [lossless.offsets(N, K)[2]], "uint8"
            tensors[name] = IRBuilder.name(name, T.match_buffer(handle, shape, dtype, align=16))
        row_blocks = N // (lossless.TILE * config["row_tiles"])
        with (
            T.thread_binding(row_blocks, thread="blockIdx.x"),
            T.thread_binding(T.ceildiv(tokens, TOKENS * config["token_tiles"]), thread="blockIdx.y"),
            T.thread_binding(32 * warps, thread="threadIdx.x"),
        ):
            shared = T.alloc_buffer((shared_bytes(config),), "uint8", scope="shared.dyn")
            null = T.reinterpret("handle", T.uint64(0))
            bias, residual = (tensors[n].data if n in tensors else null for n in ("bias", "residual"))
            x, weight, out = (tensors[name].data for name in ("x", "weight", "out"))
            arguments = (x, weight, bias, residual, out, T.Cast("int32", tokens), N, K, shared.data)
            T.evaluate(T.cuda.func_call(function, *arguments, source_code=SOURCE, return_type="void"))
    return builder.get()


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"
