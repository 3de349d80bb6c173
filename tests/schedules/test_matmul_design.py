"""Products in plain TIR: whatever schedule is drawn from their spaces computes the bits of the hand-written kernel."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import tvm_ffi
from tvm.s_tir import Schedule

from vllm_compile.ops import GATE_UP_SILU, LINEAR
from vllm_compile.schedules.build import build_library
from vllm_compile.schedules.cpu import matmul_design as designs
from vllm_compile.schedules.cpu.dot_intrinsic import dot_intrinsic
from vllm_compile.schedules.cpu.gate_up import GateUpSilu, activation, times_up
from vllm_compile.schedules.cpu.linear import Linear, finish
from vllm_compile.schedules.cpu.matmul_design import AHEAD, matmul_design
from vllm_compile.schedules.design import TRACE

from . import harness
from .levels import HOST, TARGETS

FAMILY, GATED = Linear(packed=False), GateUpSilu(packed=False)
N, K = 192, 96  # 12 panels of 16 lanes: the sums of 5 tokens for 2 of them do not fit 1 KiB with all others
OPS = {FAMILY: LINEAR, GATED: GATE_UP_SILU}


def linear(generator, dtype, tokens):
    inputs, _ = LINEAR.sample(generator, dtype, tokens, K, N)
    return inputs


def drawn(design, seed):
    """A configuration for each space, with decisions drawn by a seed."""
    return [design.config(space.trace) for space in design.spaces(Schedule(design.module, seed=seed))]


@pytest.mark.parametrize("family", OPS, ids=["linear", "gated"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_bits_of_the_other_kernels(target, dtype, family, generator, tmp_path):
    seed, op = int(torch.randint(1, 2**31 - 1, (), generator=generator)), OPS[family]
    inputs, _ = op.sample(generator, dtype, 5, K, N)
    spec = harness.op_spec(op, inputs, {})
    kernels, path = {}, tmp_path / "kernels.so"
    for tokens in (1, 5):
        configs = drawn(family.design(spec, tokens, target), seed)
        assert len({config[TRACE] for config in configs}) == len(AHEAD)
        by_hand = next(v.config for v in reversed(family.variants(spec, target)) if v.min_tokens <= tokens)
        picked = [by_hand, *configs[:: len(AHEAD) - 1]]
        kernels |= {f"t{tokens}_{i}": family.build(spec, config, target) for i, config in enumerate(picked)}
    build_library(kernels, target, path)
    symbols = subprocess.run(["nm", "-D", str(path)], check=True, capture_output=True, text=True).stdout
    assert "Workspace" not in symbols, "the serving process has no TVM runtime"
    module = tvm_ffi.load_module(str(path))
    for tokens in (1, 5):
        given = {name: t[:tokens] if name in ("x", "residual") else t for name, t in inputs.items()}
        results = [harness.run(module[f"t{tokens}_{i}"], family, spec, target, given) for i in range(3)]
        harness.assert_matches(op, results[1], harness.results(op, given, {}))
        assert all(torch.equal(result[0], results[0][0]) for result in results)
    other = {**inputs, "x": inputs["x"].roll(1, dims=1)}
    assert not torch.equal(harness.run(module["t5_1"], family, spec, target, other)[0], results[0][0])
    swapped = {**inputs, "weight": torch.cat(inputs["weight"].chunk(2)[::-1])}
    assert not torch.equal(harness.run(module["t5_1"], family, spec, target, swapped)[0], results[0][0])


@pytest.fixture
def design(generator):
    spec = harness.op_spec(LINEAR, linear(generator, torch.bfloat16, 1), {})
    return FAMILY.design(spec, 2, HOST)


def test_a_trace_is_replayed_only_as_our_spaces_write_them(design):
    """Whoever can write a record must not be able to put code into a kernel."""
    trace = drawn(design, 1)[0][TRACE]
    steps, decisions = json.loads(trace)
    assert design.admits(trace)
    injected = ["Annotate", ["b0", '"define void @f() { ret void }"'], ["pragma_import_llvm"], []]
    assert not design.admits(json.dumps([[*steps, injected], decisions]))
    assert not design.admits(json.dumps([steps[:-1], decisions]))
    assert not design.admits("no trace")
    assert not design.admits(json.dumps({"steps": steps}))
    (number, tiles), *rest = decisions
    assert not design.admits(json.dumps([steps, [[number, [tiles[0] * 7, tiles[1]]], *rest]])), "more than there is"
    assert not design.admits(json.dumps([steps, [[number, ["x", 1]], *rest]]))
    for wrong in (
        [10**6, tiles],
        [-1, tiles],
        [number, [0, tiles[1]]],
        [number, [1, 10**6]],
        [number, [-tiles[0], -1]],
    ):
        assert not design.admits(json.dumps([steps, [wrong, *rest]])), "TVM would take it as it is"
    assert not design.admits([steps, decisions]), "a text is wanted"
    assert design.knows([[*steps, ["EnterPostproc", [], [], []]], decisions])
    assert not design.knows([[*steps, injected], decisions])
    assert not design.knows("no trace")


@pytest.mark.parametrize(("tokens", "lossless", "columns"), [(25, False, N), (1, True, N), (1, False, N + 1)])
def test_what_has_no_design(tokens, lossless, columns, generator):
    """Sums that do not fit the registers, lossless weights, ragged panels."""
    inputs, _ = LINEAR.sample(generator, torch.bfloat16, 1, K, columns)
    assert Linear(packed=lossless).design(harness.op_spec(LINEAR, inputs, {}), tokens, HOST) is None


def test_gated_sums_take_two_registers(generator):
    inputs, _ = GATE_UP_SILU.sample(generator, torch.float32, 1, K, N)
    spec, registers = harness.op_spec(GATE_UP_SILU, inputs, {}), 24 if HOST.vector_lanes == 16 else 12
    assert GATED.design(spec, registers // 2, HOST) is not None
    assert GATED.design(spec, registers // 2 + 1, HOST) is None


@pytest.mark.parametrize(
    ("family", "parts"),
    [(FAMILY, {"finish": finish}), (GATED, {"finish": times_up, "activation": activation})],
    ids=["linear", "gated"],
)
def test_a_space_is_known_by_what_it_makes(family, parts, generator, monkeypatch):
    """The same in another process; another one with any change of definition, steps, intrinsic or lowering."""
    inputs, _ = OPS[family].sample(generator, torch.bfloat16, 1, K, N)
    spec = harness.op_spec(OPS[family], inputs, {})
    spec = replace(spec, inputs=tuple((name, t) for name, t in spec.inputs if name != "residual"))

    def space(**other):
        return matmul_design.__wrapped__(spec, 2, HOST, **(parts | other)).space

    made = type(family)
    code = (
        f"from {made.__module__} import {made.__name__} as Family; from vllm_compile.targets import resolve;"
        "from vllm_compile.spec import OpSpec, Sym, TensorSpec;"
        f"print(Family(False).design({spec!r}, 2, resolve('cpu')).space)".replace("<Sym.TOKENS: 'T'>", "Sym.TOKENS")
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split()[-1] == space() == space()
    found, lowered = {space()}, designs._lowered
    for part in parts:
        found.add(space(**{part: lambda tensors, totals, row, column: lambda j: totals[0][j] * 2}))
    for name, changed in {
        "AHEAD": (0, 16),
        "MOST_WORDS": 4,
        "_lowered": lambda scheduled, words: lowered(scheduled, words).with_attr("changed", True),
        "dot_intrinsic": lambda words, rows, ahead: dot_intrinsic(words, rows, ahead + 1),
    }.items():
        with monkeypatch.context() as changes:
            changes.setattr(designs, name, changed)
            found.add(space())
    assert len(found) == 5 + len(parts)
    assert space() in found
