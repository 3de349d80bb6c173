"""`fed_linear` for sm_90a: its machine code, and what it is for (test_cuda_wide_linear_on_host.py runs it)."""

import shutil

import pytest

from benchmarks import kernels_cuda_linear
from vllm_compile.schedules.cuda import build, fed, matmul
from vllm_compile.schedules.cuda.gate_up import GateUpSilu
from vllm_compile.schedules.cuda.linear import Linear
from vllm_compile.targets import cuda

from .sass import loads_before_waiting, sass_of

TARGET = cuda.for_chip()


def spec_of(N, K, gated=False):
    return kernels_cuda_linear.spec_of("gate_up_silu" if gated else "linear", N, K, residual=False)


def config_of(tokens, row_groups, k_groups, cluster, stages, packed=True, **others):
    names = ("tokens", "row_groups", "k_groups", "cluster", "stages")
    shape = zip(names, (tokens, row_groups, k_groups, cluster, stages), strict=True)
    return {"kind": "fed", **dict(shape), "prefetch": 0, "lossless": packed, **others}


CASES = {
    "gates": (GateUpSilu, spec_of(28672, 4096, True), config_of(64, 4, 1, 1, 4)),
    "lm_head": (Linear, spec_of(128256, 4096), config_of(64, 4, 1, 1, 4)),
    "lm_head_of_few": (Linear, spec_of(128256, 4096), config_of(8, 4, 1, 1, 2)),
    "qkv": (Linear, spec_of(6144, 4096), config_of(16, 2, 1, 4, 4)),
    "down": (Linear, spec_of(4096, 14336), config_of(32, 1, 4, 2, 4)),
    "down_of_many": (Linear, spec_of(4096, 14336), config_of(64, 4, 1, 7, 4)),
    "down_in_splits": (Linear, spec_of(4096, 14336), config_of(64, 4, 1, 2, 4, splits=4)),
    "down_of_few_in_splits": (Linear, spec_of(4096, 14336), config_of(16, 2, 2, 1, 4, splits=4)),
    "o_in_splits": (Linear, spec_of(4096, 4096), config_of(64, 4, 1, 1, 4, splits=8)),
    "gates_of_fewer": (GateUpSilu, spec_of(28672, 4096, True), config_of(64, 4, 1, 1, 4, tiles=14)),
    "gates_in_splits": (GateUpSilu, spec_of(16384, 2048, True), config_of(64, 4, 1, 1, 4, splits=2)),
    "qkv_of_1b": (Linear, spec_of(3072, 2048), config_of(64, 1, 2, 2, 4)),
    "plain": (Linear, spec_of(512, 512), config_of(32, 4, 1, 1, 2, packed=False)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(library, resources by symbol) of Llama-3.1-8B's linear layers, and of narrow plain weights."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    path = tmp_path_factory.mktemp("fed") / "kernels.so"
    kernels = {
        name: family(config["lossless"]).build(spec, config, TARGET) for name, (family, spec, config) in CASES.items()
    }
    return path, build.build_library(kernels, TARGET, path)


def test_nothing_is_spilled_and_all_threads_have_registers(built):
    for symbol, used in built[1].items():
        assert used.spilled_bytes == 0, symbol
        assert not used.serialized, symbol
        # A scheduler has 16,384 registers, which lanes get in units of 8: for a warp of each warpgroup and its share of
        # those that bring x.
        config = CASES[symbol][2]
        warps = -(-5 * config["row_groups"] * config["k_groups"] // 4)
        assert warps * 32 * (-(-used.registers // 8) * 8) <= 1 << 14, symbol


def test_machine_code_has_what_the_kernel_is_about(built):
    for symbol, code in sass_of(built[0]).items():
        config = CASES[symbol][2]
        wanted = (
            f"HGMMA.64x{config['tokens']}x16.F32.BF16",
            "LDG.E.128",
            "LDGSTS.E.BYPASS",
            "SYNCS.PHASECHK",
            "ACQBULK",
            "PREEXIT",
        )
        if config["cluster"] > 1:
            wanted += ("UCGABAR_ARV", "UCGABAR_WAIT")
        if "splits" in config:
            wanted += ("ATOMG.E.ADD", "STG.E.128", "LDG.E.128.STRONG.GPU")
        for instruction in wanted:
            assert instruction in code, f"{symbol} has no {instruction}"
        assert code.count("LDGSTS") % 3 == 0 or not config["lossless"], "three vectors a block"
        assert set(loads_before_waiting(code)) <= {"LDG.E"}, symbol


def shapes(spec, tokens, gated=False):
    """What is worth measuring, with four stages."""
    found = fed.promising(spec, TARGET, True, gated, tokens)
    names = ("row_groups", "k_groups", "cluster", "splits")
    four = [config for config in found if config["stages"] == 4 and "tiles" not in config]
    return {tuple(config[name] for name in names if name in config) for config in four}


def test_what_it_is_for():
    gates, down = spec_of(28672, 4096, True), spec_of(4096, 14336)
    assert shapes(gates, 32, True) == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 1), (1, 2, 1)}, "rows enough: whole K"
    assert (1, 4, 1) not in shapes(gates, 64, True), "x of a warp that brings it"
    four, two = {(4, 1, 4), (4, 1, 7), (4, 1, 8), (2, 2, 2), (2, 2, 4)}, {(2, 1, 2), (2, 1, 4), (2, 1, 7), (2, 1, 8)}
    splits = {(4, 1, 1, 7), (4, 1, 1, 8), (4, 1, 2, 4), (2, 2, 1, 4), (2, 2, 2, 2)}
    splits_of_two = {(2, 1, 1, 7), (2, 1, 1, 8), (2, 1, 2, 4), (1, 2, 1, 4), (1, 2, 2, 2)}
    assert shapes(down, 64) == {*four, *two, (1, 2, 1), (1, 2, 2), (1, 2, 4), *splits, *splits_of_two}, (
        "64 to 256 thread blocks, parts of K in a cluster alike; of splits those that all have a place at once"
    )
    assert not shapes(spec_of(256, 14336), 16), "too few rows for the chip"
    fewer = [c for c in fed.promising(gates, TARGET, True, True, 64) if "tiles" in c]
    assert {(c["row_groups"], c["k_groups"], c["tiles"]) for c in fewer} == {(4, 1, 14)}, "128 thread blocks, not 112"
    assert not [c for c in fed.promising(spec_of(128256, 4096), TARGET, True, False, 64) if "tiles" in c], "rounds"


def test_what_can_be_built():
    gates = spec_of(28672, 4096, True)
    assert matmul.admits(gates, config_of(64, 4, 1, 1, 4), 33, TARGET, True, True)
    assert not matmul.admits(gates, config_of(64, 1, 4, 1, 4), 33, TARGET, True, True), "x of a warp that brings it"
    assert not matmul.admits(gates, config_of(8, 4, 2, 1, 2), 33, TARGET, True, True), "four warpgroups"
    assert not matmul.admits(spec_of(28672, 4096 + 128, True), config_of(64, 4, 1, 1, 4), 33, TARGET, True, True), (
        "rounds"
    )
    assert not matmul.admits(spec_of(28672 + 128, 4096, True), config_of(64, 4, 1, 1, 4), 33, TARGET, True, True), (
        "rows"
    )
    assert matmul.admits(spec_of(256, 2048), config_of(16, 1, 4, 4, 2), 33, TARGET, True)
    assert not matmul.admits(spec_of(256, 1024), config_of(16, 1, 4, 4, 2), 33, TARGET, True), "rounds of each part"
    assert matmul.admits(gates, config_of(64, 4, 1, 1, 4, tiles=14), 33, TARGET, True, True)
    assert not matmul.admits(gates, config_of(64, 4, 1, 1, 4, tiles=15), 33, TARGET, True, True), "a gate for each up"
    assert not matmul.admits(gates, config_of(64, 4, 1, 1, 4, tiles=12), 33, TARGET, True, True), "three warpgroups"
    assert not matmul.admits(gates, config_of(64, 4, 1, 1, 4, tiles=16), 33, TARGET, True, True), "which is all"
    narrow, split = spec_of(4096, 4096), config_of(32, 4, 1, 1, 4, splits=8)
    assert matmul.admits(narrow, split, 17, TARGET, True)
    assert not matmul.admits(narrow, split, 33, TARGET, True), "more tokens than there is memory for"
    assert not matmul.admits(spec_of(4096, 1024), split, 17, TARGET, True), "a round for each"
    assert not matmul.admits(spec_of(128256, 4096), split, 17, TARGET, True), "memory for sums"
