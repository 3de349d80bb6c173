"""What runs ROCm kernels on a CPU finds the errors it is there to find."""

import numpy as np
import pytest
import torch
from tvm.script import tirx as T

from tests.rocm_on_host import hip, needs_opencl, opencl
from tests.rocm_on_host.runner import OnHost
from tests.rocm_on_host.tensor import call
from vllm_compile.schedules.rocm import intrinsics
from vllm_compile.schedules.rocm.norm import rms_norm
from vllm_compile.targets.rocm import WAVE, for_arch

pytestmark = needs_opencl
TARGET = for_arch()
THREADS = 256


def sums(reduce):
    """x [T, 256] -> each row's `reduce`, in every thread."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        tokens = T.int64()
        x_TD = T.match_buffer(x, (tokens, THREADS), "float32", align=16)
        out_TD = T.match_buffer(out, (tokens, THREADS), "float32", align=16)
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                total = T.alloc_buffer((1,), "float32", scope="local")
                shared = T.alloc_buffer((THREADS // WAVE,), "float32", scope="shared")
                total[0] = x_TD[t, thread]
                reduce(total, shared, thread)
                out_TD[t, thread] = total[0]

    return kernel


def run(kernel, x, folder):
    out = torch.full_like(x, float("nan"))
    OnHost({"sums": kernel}, TARGET, folder).run("sums", x, out)
    return out


def test_a_wave_reduces_its_own_lanes(generator, tmp_path):
    x = torch.randint(-99, 99, (3, THREADS), generator=generator).float()  # sums of integers are exact
    out = run(sums(lambda total, shared, thread: intrinsics.wave_reduce(total, thread)), x, tmp_path)
    waves = x.view(3, -1, WAVE)
    assert torch.equal(out, waves.sum(-1, keepdim=True).expand_as(waves).reshape(out.shape))


def test_a_wave_adds_up_its_lanes_so_far(generator, tmp_path):
    x = torch.randint(-99, 99, (3, THREADS), generator=generator).float()
    out = run(sums(lambda total, shared, thread: intrinsics.wave_scan(total, thread)), x, tmp_path)
    assert torch.equal(out, x.view(3, -1, WAVE).cumsum(-1).view_as(x))


@pytest.mark.parametrize("kind", ["DPP_STEPS", "PERMUTE_STEPS"])
def test_a_wrong_lane_shows(kind, generator, tmp_path, monkeypatch):
    right = getattr(intrinsics, kind)
    monkeypatch.setattr(intrinsics, kind, (right[1], *right[1:]))
    x = torch.randint(-99, 99, (3, THREADS), generator=generator).float()
    out = run(sums(lambda total, shared, thread: intrinsics.wave_reduce(total, thread)), x, tmp_path)
    assert not torch.equal(out[:, 0], x.view(3, -1, WAVE)[:, 0].sum(-1))


@pytest.mark.parametrize("barriers", [True, False])
def test_a_missing_barrier_shows(barriers, generator, tmp_path, monkeypatch):
    source = opencl.source

    def without(kernels):
        code = source(kernels).removeprefix(opencl.LANES)
        assert code.count("barrier(") == 1
        return opencl.LANES + code.replace("barrier(CLK_LOCAL_MEM_FENCE);", "")

    if not barriers:
        monkeypatch.setattr(opencl, "source", without)
    x = torch.randint(-99, 99, (3, THREADS), generator=generator).float()
    kernel = sums(lambda total, shared, thread: intrinsics.block_reduce(total, shared, thread, THREADS))
    out = run(kernel, x, tmp_path)
    assert torch.equal(out, x.sum(-1, keepdim=True).expand_as(out)) == barriers


def a_lane(row, k):
    """AMD's matrix instruction calculator, v_mfma_f32_16x16x16_bf16: lane and item of a[row][k], and of b[k][row]."""
    return 16 * (k // 4) + row, k % 4


def d_lane(row, column):
    """The same of c[row][column] and the result."""
    return 16 * (row // 4) + column, row % 4


@pytest.mark.parametrize("right", [True, False])
def test_lanes_of_a_matrix_instruction(right, generator, tmp_path):
    """One instruction on matrices that NumPy lays out over the lanes as AMD publishes it."""

    @T.prim_func(s_tir=True)
    def kernel(a: T.handle, b: T.handle, c: T.handle, out: T.handle):
        waves = T.int64()
        a_L = T.match_buffer(a, (waves, 4 * WAVE), "uint16", align=16)
        b_L = T.match_buffer(b, (waves, 4 * WAVE), "uint16", align=16)
        c_L = T.match_buffer(c, (waves, 4 * WAVE), "float32", align=16)
        out_L = T.match_buffer(out, (waves, 4 * WAVE), "float32", align=16)
        for wave in T.thread_binding(waves, thread="blockIdx.x"):
            for lane in T.thread_binding(WAVE, thread="threadIdx.x"):
                out_L[wave, T.ramp(lane * 4, 1, 4)] = intrinsics.mfma(
                    a_L.vload([wave, lane * 4], "uint16x4"),
                    b_L.vload([wave, lane * 4], "uint16x4"),
                    c_L.vload([wave, lane * 4], "float32x4"),
                )

    # Integers of three bits: every product and sum is exact.
    a, b, c = (torch.randint(-4, 5, (3, 16, 16), generator=generator).float() for _ in range(3))
    a_L, b_L = (torch.zeros(3, WAVE, 4, dtype=torch.bfloat16) for _ in range(2))
    c_L, expected = (torch.zeros(3, WAVE, 4) for _ in range(2))
    for i, j in np.ndindex(16, 16):
        a_L[:, *a_lane(i, j)] = a[:, i, j].bfloat16()
        b_L[:, *a_lane(j, i)] = b[:, i, j].bfloat16()
        c_L[:, *d_lane(i, j)] = c[:, i, j]
        expected[:, *(d_lane(i, j) if right else d_lane(j, i))] = (c + a @ b)[:, i, j]
    out = torch.full_like(c_L, float("nan"))
    bits = (tensor.view(torch.uint16).flatten(1) for tensor in (a_L, b_L))
    OnHost({"mfma": kernel}, TARGET, tmp_path).run("mfma", *bits, c_L.flatten(1), out.view(3, -1))
    assert torch.equal(out, expected) == right


def test_arguments_of_another_order_than_the_code_object_says(generator, tmp_path):
    """The program that runs has the arguments that the metadata of the code object names, in its order."""
    kernel = rms_norm(256, 1e-5)
    on_host = OnHost({"k": kernel}, TARGET, tmp_path)
    declared = opencl.source({"k": kernel}).split("k_kernel(")[1].split(")")[0]
    names = [word.split()[-1].removesuffix("_ptr") for word in declared.split(",")[1:]]
    assert names == list(on_host.resources["k"].arguments)


def test_what_goes_wrong_in_a_launch_is_raised(generator, tmp_path):
    on_host = OnHost({"k": rms_norm(256, 1e-5)}, TARGET, tmp_path)
    x = torch.zeros(1, 256, dtype=torch.bfloat16)

    def refuse(launch):
        raise ArithmeticError(launch.kernel)

    with pytest.raises(ArithmeticError, match="k_kernel"), hip.recording(refuse):
        call(on_host.library["k"], x, x[0], x)
