"""The emulator itself: instructions against torch, and what it has to find in kernels that are wrong."""

import pytest
import torch

from .runner import AVAILABLE, KERNELS, EmulationError, run

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")

LANE = "const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;"


def launch(body, *, block=32, grid=1, shared_bytes=1024, arguments=None, **options):
    """Run a kernel with this body; its parameters are the arguments."""
    arguments = arguments or {}
    parameters = "".join(f"{_type(value)} {name}, " for name, value in arguments.items())
    source = f"using namespace vllm_compile;\nstatic void kernel({parameters}void* shared) {{\n{LANE}\n{body}\n}}\n"
    call = f"kernel({''.join(f'{name}, ' for name in arguments)}shared)"
    return run(
        "ptx.cuh",
        call,
        grid=grid,
        block=block,
        arguments=arguments,
        shared_bytes=shared_bytes,
        source=source,
        **options,
    )


def _type(value):
    if not isinstance(value, torch.Tensor):
        return "int"
    return {"bfloat16": "__nv_bfloat16*", "float32": "float*", "int32": "int*"}[str(value.dtype).removeprefix("torch.")]


def random(generator, *shape):
    return torch.randn(*shape, generator=generator).bfloat16()


# ---- Instructions


def test_mma(generator):
    a, b, sum_ = random(generator, 16, 16), random(generator, 8, 16), torch.randn(16, 8, generator=generator)
    expected = sum_.double() + a.double() @ b.double().T
    body = """
      auto word = [](const __nv_bfloat16* from) { return *reinterpret_cast<const uint32_t*>(from); };
      const uint32_t fragment[4] = {word(a + g * 16 + 2 * t), word(a + (g + 8) * 16 + 2 * t),
                                    word(a + g * 16 + 2 * t + 8), word(a + (g + 8) * 16 + 2 * t + 8)};
      float own[4];
      for (int i = 0; i < 4; i++) own[i] = sum[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
      mma(own, fragment, word(b + g * 16 + 2 * t), word(b + g * 16 + 2 * t + 8));
      for (int i = 0; i < 4; i++) sum[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = own[i];
    """
    launch(body, arguments={"a": a, "b": b, "sum": sum_})
    torch.testing.assert_close(sum_.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed, generator):
    matrices = random(generator, 4, 8, 8)
    out = torch.zeros(4, 8, 8, dtype=torch.bfloat16)
    body = f"""
      copy_async(shared_address(shared) + lane * 16, matrices + lane * 8);
      commit_copies();
      wait_copies<0>();
      __syncwarp();
      uint32_t words[4];
      load_matrices{"_transposed" * transposed}(words, shared_address(shared) + lane * 16);
      for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(out + i * 64 + g * 8 + 2 * t) = words[i];
    """
    launch(body, arguments={"matrices": matrices, "out": out})
    assert torch.equal(out, matrices.mT if transposed else matrices)


# How B [columns, 64] is stored in shared memory, and the descriptor of 16 of its columns of k, from `from` on.
SWIZZLED = """
  auto store = [&](int column, int k, __nv_bfloat16 value) {
    const int at = column * 128 + k * 2;
    *reinterpret_cast<__nv_bfloat16*>(static_cast<char*>(shared) + (at ^ (at >> 7 & 7) << 4)) = value;
  };
  auto descriptor = [&](int k) {
    const uint32_t from = shared_address(shared) + k * 2;
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | 1 << 16 | from >> 4;
  };
"""
UNSWIZZLED = """
  auto store = [&](int column, int k, __nv_bfloat16 value) {
    const int at = k / 8 * (COLUMNS * 16) + column * 16 + k % 8 * 2;
    *reinterpret_cast<__nv_bfloat16*>(static_cast<char*>(shared) + at) = value;
  };
  auto descriptor = [&](int k) {
    const uint32_t from = shared_address(shared) + k / 8 * (COLUMNS * 16);
    return uint64_t{128 >> 4} << 32 | (COLUMNS * 16 >> 4) << 16 | from >> 4;
  };
"""
WGMMA = """
  for (int i = threadIdx.x; i < COLUMNS * 64; i += 128) store(i / 64, i % 64, b[i]);
  proxy_fence();
  __syncthreads();
  auto word = [](const __nv_bfloat16* from) { return *reinterpret_cast<const uint32_t*>(from); };
  const int row = threadIdx.x / 32 * 16 + g;
  float own[COLUMNS / 8][4] = {};
  uint32_t fragment[4][4];
  for (int step = 0; step < 4; step++)
    for (int i = 0; i < 4; i++)
      fragment[step][i] = word(a + (row + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + 2 * t);
  wgmma_fence();
  for (int step = 0; step < 4; step++) {
    wgmma<COLUMNS>(own, fragment[step], descriptor(step * 16));
    wgmma_commit();
  }
  wgmma_wait<0>();
  for (int j = 0; j < COLUMNS / 8; j++)
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * COLUMNS + j * 8 + 2 * t + i % 2] = own[j][i];
"""


def wgmma(generator, columns=24, stored=SWIZZLED, changed=lambda body: body):
    a, b, out = random(generator, 64, 64), random(generator, columns, 64), torch.full((64, columns), float("nan"))
    body = changed(f"constexpr int COLUMNS = {columns};" + stored + WGMMA)
    launch(body, block=128, shared_bytes=columns * 128, arguments={"a": a, "b": b, "out": out})
    return out.double(), a.double() @ b.double().T


@pytest.mark.parametrize("stored", [SWIZZLED, UNSWIZZLED], ids=["swizzled", "unswizzled"])
@pytest.mark.parametrize("columns", [8, 16, 64])
def test_wgmma(columns, stored, generator):
    torch.testing.assert_close(*wgmma(generator, columns, stored), rtol=1e-5, atol=1e-5)


def test_shuffles_and_votes(generator):
    out = torch.zeros(7, 32, dtype=torch.int32)
    body = """
      out[lane] = __shfl_sync(0xffffffff, lane, 5);
      out[32 + lane] = __shfl_xor_sync(0xffffffff, lane, 3);
      out[64 + lane] = __shfl_down_sync(0xffffffff, lane, 4);
      out[96 + lane] = __shfl_up_sync(0xffffffff, lane, 2, 8);
      out[128 + lane] = __ballot_sync(0xffffffff, lane % 3 == 0);
      out[160 + lane] = __any_sync(0xffffffff, lane == 31);
      if (lane < 8) out[192 + lane] = __shfl_sync(0xff, lane, lane + 1, 8);
    """
    launch(body, arguments={"out": out})
    lanes = torch.arange(32)
    votes = sum(1 << i for i in range(0, 32, 3))
    assert torch.equal(out[0], torch.full((32,), 5).int())
    assert torch.equal(out[1], (lanes ^ 3).int())
    assert torch.equal(out[2], torch.where(lanes < 28, lanes + 4, lanes).int())
    assert torch.equal(out[3], torch.where(lanes % 8 >= 2, lanes - 2, lanes).int())
    assert bool((out[4].long() % 2**32 == votes).all())
    assert bool((out[5] == 1).all())
    assert torch.equal(out[6, :8], ((lanes[:8] + 1) % 8).int())


def test_atomics_of_all_threads():
    total = torch.zeros(1, dtype=torch.int32)
    launch("atomicAdd(total, 1 + threadIdx.x * 0);", block=96, grid=(3, 2), arguments={"total": total})
    assert total.item() == 96 * 6


def test_blocks_that_wait_for_each_other():
    body = """
      if (threadIdx.x == 0) {
        atomicAdd(arrived, 1);
        while (atomicAdd(arrived, 0) < 3) {}
      }
    """
    arrived = torch.zeros(1, dtype=torch.int32)
    launch(body, grid=3, together=3, arguments={"arrived": arrived})
    assert arrived.item() == 3
    with pytest.raises(EmulationError, match="waits in a loop for what does not happen"):
        launch(body, grid=3, arguments={"arrived": torch.zeros(1, dtype=torch.int32)})


def test_clusters():
    out = torch.zeros(4, 32)
    body = """
      const uint32_t there = shared_address(shared) + lane * 16;
      store_cluster(there, cluster_rank() ^ 1, make_float4(100 * blockIdx.x + lane, 0, 0, 0));
      cluster_arrive_and_wait();
      out[blockIdx.x * 32 + lane] = load_cluster(there, cluster_rank()).x;
      cluster_arrive_and_wait();
    """
    launch(body, grid=4, cluster=2, arguments={"out": out})
    assert torch.equal(out, 100 * torch.tensor([[1.0], [0.0], [3.0], [2.0]]) + torch.arange(32))


def test_named_barriers():
    out = torch.zeros(128)
    body = """
      float* numbers = static_cast<float*>(shared);
      numbers[threadIdx.x] = threadIdx.x;
      sync_threads<64>(1 + threadIdx.x / 64);
      out[threadIdx.x] = numbers[threadIdx.x ^ 32];
    """
    launch(body, block=128, arguments={"out": out})
    assert torch.equal(out, (torch.arange(128) ^ 32).float())


def test_tensors_keep_their_strides():
    wide = torch.zeros(4, 8)
    launch("if (lane < 4) x[lane * 8] = 1;", arguments={"x": wide[:, 2:4]})
    assert torch.equal(wide[:, 2], torch.ones(4))
    assert wide.sum() == 4


# ---- What is wrong

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
