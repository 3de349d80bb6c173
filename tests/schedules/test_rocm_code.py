"""The machine code of ROCm kernels: instructions meant, nothing in scratch, waves enough to hide latency."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from tvm.script import tirx as T

from tests.rocm_on_host import REQUIRED, needs_lld
from vllm_compile import toolchain
from vllm_compile.errors import TargetError
from vllm_compile.ops import EXPERT_GATE_UP_SILU, EXPERT_LINEAR, GATE_UP_SILU, LINEAR, OwnOp
from vllm_compile.schedules.rocm import build
from vllm_compile.schedules.rocm.elementwise import embedding, silu_mul
from vllm_compile.schedules.rocm.expression import elementwise
from vllm_compile.schedules.rocm.norm import add_rms_norm, rms_norm
from vllm_compile.schedules.rocm.paged_attention import paged_attention
from vllm_compile.schedules.rocm.rope_cache import qkv_rope_cache
from vllm_compile.schedules.rocm.route import route
from vllm_compile.schedules.select import choose
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets.rocm import ARCHS, for_arch

from .expressions import spec_of, weighted_sum

pytestmark = needs_lld


def product(op, N, K, tokens, lossless=False):
    """The kernel of a matrix product for so many tokens, as it is chosen for an MI300X."""
    width = N // 2 if op is GATE_UP_SILU else N
    x, y = (TensorSpec((Sym.TOKENS, size), "bfloat16") for size in (K, width))
    spec = OpSpec(op.name, (("x", x), ("weight", TensorSpec((N, K), "bfloat16"))), (y,))
    choice = choose(spec, for_arch(), lossless)
    assert bool(choice.layouts) == lossless
    (variant,) = [variant for variant in choice.variants if variant.min_tokens == tokens]
    return choice.family.build(spec, variant.config, for_arch())


def experts(op: OwnOp, N, K, rows, tokens):
    """The kernel of eight experts' products, two a token, for so many tokens; x has `rows` a token."""
    width = N // 2 if op is EXPERT_GATE_UP_SILU else N
    x = TensorSpec((Sym.TOKENS, *rows, K), "bfloat16")
    places = tuple((name, TensorSpec((Sym.TOKENS, 2), "int32")) for name in ("experts", "order", "ends"))
    inputs = (("x", x), *places, ("weight", TensorSpec((8, N, K), "bfloat16")))
    spec = OpSpec(op.name, inputs, (TensorSpec((Sym.TOKENS, 2, width), "bfloat16"),))
    choice = choose(spec, for_arch())
    (variant,) = [variant for variant in choice.variants if variant.min_tokens == tokens]
    return choice.family.build(spec, variant.config, for_arch())


OBJDUMP = shutil.which(f"llvm-objdump-{toolchain.TVM_LLVM}")
MFMA = "v_mfma_f32_16x16x16_?bf16"
UNPACKING = ("v_alignbit_b32", "v_and_or_b32")
# Llama-3.1-8B's first.  16-byte loads (None: as LLVM unrolls) and stores of a lane, waves of a SIMD at least,
# instructions that must be there.
KERNELS = {
    "rms_norm": (rms_norm(4096, 1e-5), 4, 2, 8, ("v_add_f32_dpp", "ds_bpermute_b32", "s_barrier", "ds_read_b128")),
    "add_rms_norm": (add_rms_norm(4096, 1e-5), 6, 4, 8, ("v_add_f32_dpp", "ds_bpermute_b32", "s_barrier")),
    "widest_norm": (add_rms_norm(16384, 1e-5), 24, 16, 3, ()),
    "embedding": (embedding(128256, 4096, "int32"), 2, 2, 8, ()),
    "silu_mul": (silu_mul(14336), 2, 1, 8, ("v_exp_f32", "v_rcp_f32")),
    "linear": (
        product(LINEAR, 4096, 14336, 1),
        32,
        0,
        4,
        (MFMA, "ds_write_b128", "ds_read_b128"),
    ),
    "linear_of_64": (product(LINEAR, 4096, 14336, 33), 20, 0, 4, (MFMA, "ds_read_b128")),
    "logits": (product(LINEAR, 128256, 4096, 1), None, 0, 4, (MFMA, "ds_read_b128")),
    "gate_up": (product(GATE_UP_SILU, 28672, 4096, 1), None, 0, 4, (MFMA, "v_exp_f32")),
    "lossless_logits": (product(LINEAR, 128256, 4096, 1, True), 20, 0, 4, (MFMA, *UNPACKING, "ds_read_b128")),
    "lossless_gate_up": (product(GATE_UP_SILU, 28672, 4096, 1, True), 20, 0, 4, (MFMA, *UNPACKING, "v_exp_f32")),
    "lossless_of_32": (product(GATE_UP_SILU, 28672, 4096, 17, True), None, 0, 3, (MFMA, *UNPACKING)),
    "paged_attention": (paged_attention(32, 8, 128, 0.1, 4, 608), 12, 3, 4, (MFMA, "ds_bpermute_b32", "ds_write_b128")),
    "paged_attention_1": (None, None, 0, 8, ("v_exp_f32", "ds_read_b128", "ds_write_b128")),  # its second launch
    # Mixtral-8x7B's.
    "router": (product(LINEAR, 8, 4096, 1), None, 0, 4, (MFMA, "ds_read_b128")),
    "route": (route(8, 2, True, "bfloat16"), 0, 0, 8, ("v_add_f32_dpp", "v_mov_b32_dpp", "ds_bpermute_b32")),
    "route_1": (None, 0, 0, 8, ("s_barrier", "ds_bpermute_b32")),
    "experts": (experts(EXPERT_GATE_UP_SILU, 28672, 4096, (), 1), None, 0, 3, (MFMA, "ds_read_b128", "v_exp_f32")),
    "experts_of_some": (experts(EXPERT_GATE_UP_SILU, 28672, 4096, (), 64), None, 0, 2, (MFMA, "ds_read_b128")),
    "experts_of_many": (experts(EXPERT_LINEAR, 4096, 14336, (2,), 512), None, 0, 3, (MFMA,)),
    "elementwise": (elementwise(spec_of(weighted_sum(4096))), 3, 1, 8, ()),
    "rope_cache": (qkv_rope_cache(32, 8, 128), 14, 6, 8, ("v_pk_mul_f32",)),
}


@pytest.fixture(scope="module", params=list(ARCHS))
def compiled(request):
    target = for_arch(request.param)
    code, _ = build.compile_kernels({name: case[0] for name, case in KERNELS.items() if case[0]}, target)
    return target, code


@pytest.fixture(scope="module")
def disassembly(compiled, tmp_path_factory):
    """Instructions of each kernel, out of the linked code object."""
    if OBJDUMP is None:
        assert not REQUIRED, "llvm-objdump of TVM's LLVM is missing"
        pytest.skip("needs llvm-objdump of TVM's LLVM")
    target, code = compiled
    path = tmp_path_factory.mktemp("code") / "kernels.hsaco"
    path.write_bytes(code.elf)
    command = [OBJDUMP, "--disassemble", f"--mcpu={target.arch}", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(\w+_kernel\w*)>:$", text, flags=re.MULTILINE)
    return {
        name.replace("_kernel", ""): body.split("s_endpgm")[0].split()
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("name", KERNELS)
def test_resources(name, compiled):
    target, code = compiled
    resources = {kernel.replace("_kernel", ""): r for kernel, r in code.resources.items()}[name]
    assert resources.spilled == resources.scratch_bytes == 0
    waves = target.waves(resources.registers, resources.lds_bytes, resources.threads)
    assert waves >= KERNELS[name][3], resources


@pytest.mark.parametrize("name", KERNELS)
def test_instructions(name, disassembly):
    _, loads, stores, _, wanted = KERNELS[name]
    words = disassembly[name]
    assert words.count("global_load_dwordx4") == loads or loads is None
    assert words.count("global_store_dwordx4") == stores
    for instruction in wanted:
        assert any(re.match(instruction, word) for word in words), instruction
    # Narrow loads are of ids and slots, which are scalars of a block, of logits, and of x where a weight is listed.
    narrow = () if name.startswith("lossless") or name in ("route", "route_1") else ("global_load_ushort",)
    assert not {word for word in words if word.startswith(("scratch_", "flat_", "buffer_", *narrow))}


def test_loads_of_weights_are_under_way_together(disassembly):
    """Four steps of a wave, of 2 vectors of the weight and 2 of x each, before the first product waits for one."""
    words = disassembly["linear"]
    first = next(i for i, word in enumerate(words) if re.match(MFMA, word))
    assert words[:first].count("global_load_dwordx4") >= 16


def unawaited(words):
    """Barriers that a wave may come to before its accesses to LDS are done: S_BARRIER itself waits for none."""
    found, since = 0, []
    for word in words:
        if word == "s_barrier":
            found += "lgkmcnt(0)" not in since
        if word.startswith(("ds_", "s_cbranch", "s_branch", "s_barrier")):
            since = []
        since.append(word)
    return found


def test_barriers_wait_for_lds(disassembly):
    """Another wave reads behind a barrier what this one writes before it."""
    barriers = {name: words.count("s_barrier") for name, words in disassembly.items() if "s_barrier" in words}
    assert {"rms_norm", "linear", "experts", "paged_attention", "paged_attention_1", "route_1"} <= set(barriers)
    for name, count in barriers.items():
        words = disassembly[name]
        assert unawaited(words) == 0, name
        assert unawaited([word for word in words if word != "lgkmcnt(0)"]) == count


@pytest.mark.parametrize("name", ["experts", "experts_of_some"])
def test_a_block_reads_a_tile_before_it_writes_the_next(name, disassembly):
    """A barrier before sums are read, and one before those of the next tile are written over them."""
    assert disassembly[name].count("s_barrier") >= 2


def test_a_second_buffer_of_lds_is_an_error():
    """Where its uses are apart from the first's, TVM would have it share that one's memory, as global memory."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle):
        rows = T.int64()
        x_TD = T.match_buffer(x, (rows, 256), "float32", align=16)
        for row in T.thread_binding(rows, thread="blockIdx.x"):
            for thread in T.thread_binding(256, thread="threadIdx.x"):
                first = T.alloc_buffer((256,), "float32", scope="shared")
                second = T.alloc_buffer((256,), "float32", scope="shared")
                first[thread] = x_TD[row, thread]
                x_TD[row, thread] = first[255 - thread]
                second[thread] = x_TD[row, thread] + T.float32(1)
                x_TD[row, thread] = second[T.bitwise_xor(thread, 64)]

    with pytest.raises(AssertionError, match="one buffer of LDS"):
        build.compile_kernels({"twice": kernel}, for_arch())


def test_waves_of_a_simd():
    """512 registers a lane shared by up to 8 waves; a block of 256 threads has one wave on each of the 4 SIMDs."""
    target = for_arch("gfx942")
    assert [target.waves(n, 0, 256) for n in (1, 64, 65, 128, 136, 256, 257, 512)] == [8, 8, 7, 4, 3, 2, 1, 1]
    assert target.waves(32, 33 << 10, 256) == 1
    assert target.waves(32, 32 << 10, 256) == 2
    assert for_arch("gfx950").waves(32, 32 << 10, 256) == 5


def test_unknown_gpu():
    with pytest.raises(TargetError, match=r"no AMD GPU 'gfx900'; .* gfx90a, gfx942, gfx950"):
        for_arch("gfx900")


def linker(folder, name, version, script="exit 0"):
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "LLD {version}.1.0 (compatible)" && exit\n{script}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A folder that is all there is to find a linker in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "ROCM_LLD", str(tmp_path / "rocm" / "ld.lld"))
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    return tmp_path


def test_the_newest_linker_is_taken(alone, monkeypatch):
    linker(alone, "ld.lld-14", 14)
    with pytest.raises(TargetError, match=r"LLVM 19 or later .* apt-get install lld-19, or pip install ziglang"):
        build.build_library({"k": rms_norm(64, 1e-5)}, for_arch(), alone / "kernels.so")
    assert [path.name for path in alone.iterdir()] == ["ld.lld-14"]
    monkeypatch.setattr(toolchain, "find_spec", lambda name: name == "ziglang")
    assert toolchain.find_lld()[1:] == ["-m", "ziglang", "ld.lld"]
    linker(alone, "ld.lld", 18)
    assert toolchain.find_lld()[1:] == ["-m", "ziglang", "ld.lld"]
    plain = linker(alone, "ld.lld", 20)
    assert toolchain.find_lld() == [plain]
    numbered = linker(alone, "ld.lld-19", 19)
    assert toolchain.find_lld() == [numbered]


def test_linker_fails(alone):
    linker(alone, "ld.lld", 20, "echo 'undefined symbol: sinf' >&2; exit 1")
    with pytest.raises(TargetError, match="failed: undefined symbol: sinf"):
        build.build_library({"k": rms_norm(64, 1e-5)}, for_arch(), alone / "kernels.so")
    assert not (alone / "kernels.so").exists()


def test_arguments_of_four_bytes_are_refused():
    """runtime/hip.c lays arguments out as an array of 8 bytes each."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle):
        tokens = T.int32()
        x_T = T.match_buffer(x, (tokens,), "float32")
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            x_T[t] = T.Cast("float32", tokens)

    with pytest.raises(TargetError, match="argument tokens is not of 8 bytes"):
        build.compile_kernels({"k": kernel}, for_arch())
