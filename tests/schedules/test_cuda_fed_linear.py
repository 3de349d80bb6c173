"""`fed_linear` for sm_90a: its machine code, and what it is for (test_cuda_wide_linear_on_host.py runs it)."""

import shutil

import pytest

from vllm_compile.schedules.cuda import build, fed, matmul
from vllm_compile.schedules.cuda.gate_up import GateUpSilu
from vllm_compile.schedules.cuda.linear import Linear
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import cuda

from .sass import loads_before_waiting, sass_of

TARGET = cuda.for_chip()


def spec_of(N, K, gated=False):
    inputs = (("x", TensorSpec((Sym.TOKENS, K), "bfloat16")), ("weight", TensorSpec((N, K), "bfloat16")))
    out = TensorSpec((Sym.TOKENS, N // 2 if gated else N), "bfloat16")
    return OpSpec("gate_up_silu" if gated else "linear", inputs, (out,))


def config_of(tokens, stages, packed=True):
    return {"kind": "fed", "tokens": tokens, "stages": stages, "prefetch": 0, "lossless": packed}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(library, resources by symbol) of Llama-3.1-8B's gates and lm_head, and of narrow plain weights."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    path = tmp_path_factory.mktemp("fed") / "kernels.so"
    kernels = {
        "gates": GateUpSilu(True).build(spec_of(28672, 4096, True), config_of(64, 4), TARGET),
        "lm_head": Linear(True).build(spec_of(128256, 4096), config_of(64, 4), TARGET),
        "plain": Linear(False).build(spec_of(512, 512), config_of(32, 2, False), TARGET),
    }
    return path, build.build_library(kernels, TARGET, path)


def test_nothing_is_spilled_and_all_threads_have_registers(built):
    for symbol, used in built[1].items():
        assert used.spilled_bytes == 0, symbol
        assert not used.serialized, symbol
        # 20 warps on four schedulers of 16,384 registers: five each, in units of 8 a lane.
        assert 5 * 32 * (-(-used.registers // 8) * 8) <= 1 << 14, symbol


def test_machine_code_has_what_the_kernel_is_about(built):
    for symbol, code in sass_of(built[0]).items():
        tokens = 32 if symbol == "plain" else 64
        wanted = (
            f"HGMMA.64x{tokens}x16.F32.BF16",
            "LDG.E.128",
            "LDGSTS.E.BYPASS",
            "SYNCS.PHASECHK",
            "ACQBULK",
            "PREEXIT",
        )
        for instruction in wanted:
            assert instruction in code, f"{symbol} has no {instruction}"
        assert code.count("LDGSTS") % 3 == 0 or symbol == "plain", "three vectors a block"
        assert set(loads_before_waiting(code)) <= {"LDG.E"}, symbol


def test_what_it_is_for():
    gates = spec_of(28672, 4096, True)
    assert fed.promising(gates, TARGET, True, True, 64) == [config_of(64, 2), config_of(64, 4)]
    assert not fed.promising(spec_of(4096, 4096), TARGET, True, False, 64), "too few rows for the chip"
    assert matmul.admits(gates, config_of(64, 4), TARGET, True, True)
    assert not matmul.admits(spec_of(28672, 4096 + 128, True), config_of(64, 4), TARGET, True, True), "K in rounds"
    assert not matmul.admits(spec_of(28672 + 128, 4096, True), config_of(64, 4), TARGET, True, True), "whole blocks"
