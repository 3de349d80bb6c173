"""What the emulator has to find in kernels that are wrong."""

import pytest
import torch

from .bodies import LANE, launch, random, wgmma
from .runner import AVAILABLE, KERNELS, EmulationError, run

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")

COPY = """
  copy_async(shared_address(shared) + lane * 16, x + lane * 4);
  commit_copies();
  {wait}
  const float4 mine = static_cast<float4*>(shared)[lane];
  *reinterpret_cast<float4*>(y + lane * 4) = mine;
"""


def test_copies_arrive_when_they_are_waited_for(generator):
    x = torch.randn(128, generator=generator)
    for wait, arrives in (("wait_copies<0>();", True), ("", False), ("wait_copies<1>();", False)):
        y = torch.zeros(128)
        launch(COPY.format(wait=wait), arguments={"x": x, "y": y})
        assert torch.equal(x, y) is arrives
        assert arrives or y.isnan().all()


WRONG = {
    "a missing barrier": (
        "float* s = static_cast<float*>(shared); s[threadIdx.x] = 1; x[threadIdx.x] = s[threadIdx.x ^ 32];",
        r"(reads|writes) byte \d+ of shared memory, which thread \d+ .*(wrote|read): a race.*\(source:",
    ),
    "a missing __syncwarp": (
        "static_cast<float*>(shared)[threadIdx.x] = 1; x[threadIdx.x] = static_cast<float*>(shared)[threadIdx.x ^ 1];",
        "a race",
    ),
    "a barrier too late": (
        "float* s = static_cast<float*>(shared); s[threadIdx.x] = 1; __syncthreads(); x[0] = s[0]; s[0] = 2;",
        "a race",
    ),
    "a copy that is not waited for": (
        "copy_async(shared_address(shared) + 16 * lane, x); commit_copies(); __syncthreads();"
        "if (threadIdx.x < 32) wait_copies<0>(); x[threadIdx.x] = static_cast<float*>(shared)[threadIdx.x];",
        "a race",
    ),
    "a divergent shuffle": (
        "if (lane < 16) __shfl_xor_sync(0xffffffff, lane, 1);",
        r"deadlock.*\n.*lanes ffff0000 have returned; lanes 0000ffff wait at __shfl_xor_sync \(source:\d+\) for lanes",
    ),
    "different shuffles": (
        "if (lane < 16) __shfl_xor_sync(0xffffffff, lane, 1); else __shfl_down_sync(0xffffffff, lane, 1);",
        r"(?s)deadlock.*__shfl_down_sync.*__shfl_xor_sync",
    ),
    "a shuffle without its own lane": ("__shfl_sync(0xfffffffe, lane, 1);", "not among the lanes fffffffe"),
    "a barrier that some do not come to": ("if (threadIdx.x < 32) sync_threads<64>(1);", "deadlock.*\n.*named barrier"),
    "a barrier in a branch": (
        "if (lane < 16)\n__syncthreads();\nelse\n__syncthreads();",
        r"comes to a barrier, but lane \d+ of its warp to another",
    ),
    "barriers of other sizes": (
        "if (threadIdx.x < 32)\nsync_threads<64>(1);\nelse\nsync_threads<96>(1);",
        r"wants (64|96) threads at barrier 1, others (64|96)",
    ),
    "an address past shared memory": (
        "uint32_t to[4]; load_matrices(to, shared_address(shared) + 1008 + 16 * (lane == 31));",
        "ldmatrix of 16 bytes at byte 1024 of shared memory, which has 1024",
    ),
    "a store past shared memory": (
        "static_cast<float*>(shared)[256] = 0;",
        r"writes 0 bytes past the end of shared memory|accesses 0 bytes past the end of shared memory",
    ),
    "a load before a tensor": ("x[threadIdx.x] = x[(int)threadIdx.x - 1];", "4 bytes before x"),
    "a load past a tensor": ("x[threadIdx.x] = x[threadIdx.x + 1];", "0 bytes past the end of x"),
    "a misaligned copy": ("copy_async(shared_address(shared) + 8, x);", "cp.async of 16 bytes at byte 8 .*misaligned"),
    "a misaligned vector": ("*reinterpret_cast<float4*>(x + 1) = float4{};", "writes 16 bytes, misaligned"),
    "an array out of bounds": ("float own[4] = {}; own[threadIdx.x] = x[0]; x[1] = own[3];", "array of its own"),
    "no address": (
        "x[0] = *reinterpret_cast<float*>((uintptr_t)lane * 8);",
        "accesses address .*, which no tensor has",
    ),
}

ALL_WRONG = "\n".join(
    [
        "using namespace vllm_compile;",
        "static void (*const wrong[])(float* x, void* shared) = {",
        *(f"[](float* x, void* shared) {{\n{LANE}\n{body}\n}}," for body, _ in WRONG.values()),
        "};",
    ]
)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_kernels_are_reported(kind):
    with pytest.raises(EmulationError, match=WRONG[kind][1]):
        run(
            "ptx.cuh",
            "wrong[which](x, shared)",
            grid=1,
            block=64,
            shared_bytes=1024,
            arguments={"x": torch.zeros(64), "which": list(WRONG).index(kind)},
            source=ALL_WRONG,  # one source for all: it is compiled once
        )


def summed(change, seed):
    """What the last of three thread blocks finds of parts that all have stored, with a change of arrivals.cuh."""
    arrivals = (KERNELS / "arrivals.cuh").read_text()
    assert change[0] in arrivals
    source = (
        arrivals.replace(*change)
        + """
      using namespace vllm_compile;
      static float parts[3 * 64];
      static int arrived;
      static void sum(const float* x, float* y) {
        parts[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
        if (!last_to_arrive(&arrived, 3)) return;
        float all = 0;
        for (int part = 0; part < 3; part++) all += __ldcg(parts + part * 64 + 63 - threadIdx.x);
        y[threadIdx.x] = all;
      }
    """
    )
    x, y = torch.arange(1.0, 193).view(3, 64) + 200 * seed, torch.full((64,), float("nan"))
    options = {"grid": 3, "block": 64, "together": 3, "seed": seed}
    run("ptx.cuh", "sum(x, y)", arguments={"x": x, "y": y}, source=source, **options)
    return bool((y == x.sum(0).flip(0)).all())


def test_the_last_to_arrive_finds_all_parts():
    assert all(summed(("", ""), seed) for seed in range(20))
    barrier = "  __syncthreads();\n  if (threadIdx.x == 0)", "  if (threadIdx.x == 0)"
    assert not all(summed(barrier, seed) for seed in range(20)), "stored after the first thread has arrived"
    assert not summed(("count - 1", "count - 2"), 0)


def test_shared_memory_ends_with_its_block():
    body = """
      static_cast<float4*>(shared)[lane] = make_float4(lane, 0, 0, 0);
      cluster_arrive_and_wait();
      if (cluster_rank() == 1) return;
      for (int i = 0; i < 1000; i++) __nanosleep(1);
      x[lane] = load_cluster(shared_address(shared) + lane * 16, 1).x;
    """
    options = {"grid": 2, "cluster": 2, "shared_bytes": 512}
    with pytest.raises(EmulationError, match="in block 1 of the cluster, whose threads have returned"):
        launch(body, arguments={"x": torch.zeros(32)}, **options)
    x = torch.zeros(32)
    waits = body.replace("if (cluster_rank() == 1) return;", "") + "cluster_arrive_and_wait();"
    launch(waits, arguments={"x": x}, **options)
    assert x.tolist() == list(range(32))


PHASES = """
  const uint32_t filled = shared_address(shared), emptied = filled + 16;
  float* const places = static_cast<float*>(shared) + 16;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) phase_init(filled + i * 8, 32), phase_init(emptied + i * 8, 1);
  __syncthreads();
  for (int round = 0; round < 5; round++) {
    const int place = round % 2, parity = round / 2 % 2;
    if (threadIdx.x < 32) {
      if (round >= 2) phase_wait(emptied + place * 8, 1 - parity);
      places[place * 32 + lane] = x[round * 32 + lane];
      phase_arrive(filled + place * 8);
    } else {
      phase_wait(filled + place * 8, parity);
      y[round * 32 + lane] = places[place * 32 + 31 - lane];
      __syncwarp();
      if (lane == 0) phase_arrive(emptied + place * 8);
    }
  }
"""


def phases(changed, x):
    y = torch.full_like(x, float("nan"))
    launch(PHASES.replace(*changed), block=64, shared_bytes=64 + 2 * 128, arguments={"x": x, "y": y})
    return y


def test_phases_pass_on_what_was_written(generator):
    x = torch.randn(5, 32, generator=generator)
    assert torch.equal(phases(("", ""), x), x.flip(1))


WRONG_PHASES = {
    "x is not waited for": ("phase_wait(filled + place * 8, parity);", "", "a race"),
    "places are not waited for": ("if (round >= 2)", "if (false)", "a race|deadlock"),
    "one does not arrive": ("phase_arrive(filled", "if (lane > 0) phase_arrive(filled", "deadlock"),
    "the wrong phase": ("emptied + place * 8, 1 - parity", "emptied + place * 8, parity", "a race|deadlock"),
    "no barrier there": ("phase_arrive(filled + place * 8)", "phase_arrive(filled + 64)", "where there is no barrier"),
    "no threads": ("emptied + i * 8, 1", "emptied + i * 8, 0", "a barrier of no threads"),
}


@pytest.mark.parametrize("kind", WRONG_PHASES)
def test_wrong_phases_are_reported(kind, generator):
    before, after, message = WRONG_PHASES[kind]
    assert before in PHASES
    with pytest.raises(EmulationError, match=message):
        phases((before, after), torch.randn(5, 32, generator=generator))


WRONG_WGMMA = {
    "no fence of stores": ("proxy_fence();", "", "reads what has no fence"),
    "no barrier": ("__syncthreads();", "", "a race"),
    "no fence of registers": ("wgmma_fence();", "", "wgmma without wgmma_fence"),
    "a changed fragment": ("wgmma_wait<0>();", "fragment[0][0]++; wgmma_wait<0>();", "A of a wgmma was changed"),
    "another swizzle": ("uint64_t{1} << 62", "uint64_t{2} << 62", "a swizzle that is not emulated"),
}


@pytest.mark.parametrize("kind", WRONG_WGMMA)
def test_wrong_wgmma_is_reported(kind, generator):
    before, after, message = WRONG_WGMMA[kind]
    with pytest.raises(EmulationError, match=message):
        wgmma(generator, changed=lambda body: body.replace(before, after))


def test_sums_arrive_when_they_are_waited_for(generator):
    out, _ = wgmma(generator, changed=lambda body: body.replace("wgmma_wait<0>", "wgmma_wait<1>"))
    assert out.isnan().all()


def test_strides_of_a_descriptor_matter(generator):
    out, expected = wgmma(generator, changed=lambda body: body.replace("1024 >> 4", "0 >> 4"))
    torch.testing.assert_close(out[:, :8], expected[:, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, 8:16], expected[:, :8], rtol=1e-5, atol=1e-5)


def test_dependent_launch_is_counted():
    report = launch("if (lane > 3) launch_dependents(); wait_for_kernels_before();")
    assert (report.launched, report.waited) == ((0, 1), (1, 1))
    with pytest.raises(EmulationError, match="writes x before it waits"):
        launch("x[lane] = 0; wait_for_kernels_before();", early={"x"}, arguments={"x": torch.zeros(32)})


# ---- Our kernels, broken

BROKEN = {
    "no wait for copies": ("wait_copies<STAGES - 1>();", ""),
    "copies waited for too early": ("wait_copies<STAGES - 1>();", "wait_copies<STAGES>();"),
    "no barrier before sums": ("  wait_copies<0>();\n  __syncthreads();", "  wait_copies<0>();"),
    "no barrier after sums": ("sums[r][m][3]);\n  __syncthreads();", "sums[r][m][3]);"),
    "tokens that do not exist": ("m * 8 + g < tokens &&", ""),
    "blocks that do not exist": ("if (block < blocks) {", "{"),
    "results that do not exist": ("return i < SUMS && token < tokens;", "return i < SUMS;"),
}


def streamed(tokens, change, generator):
    """The result of stream_linear with a change of its source, and what it should be."""
    source = (KERNELS / "stream_linear.cuh").read_text()
    assert change[0] in source
    x, w, y = random(generator, tokens, 320), random(generator, 32, 320), torch.full((tokens, 32), float("nan"))
    y = y.bfloat16()
    run(
        "",
        "vllm_compile::stream_linear<1, 1, 4, 2, 0, false, false, false>"
        "(x, w, nullptr, nullptr, y, T, 32, 320, shared)",
        grid=(2, -(-tokens // 8)),
        block=128,
        shared_bytes=512 * 4 * 8,
        arguments={"x": x, "w": w, "y": y, "T": tokens},
        early={"w"},
        source=source.replace(*change),
    )
    return y, (x.float() @ w.float().T).bfloat16()


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_matmul_is_noticed(kind, generator):
    torch.testing.assert_close(*streamed(11, ("", ""), generator), rtol=2**-7, atol=2e-2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*streamed(11, BROKEN[kind], generator), rtol=2**-7, atol=2e-2)
