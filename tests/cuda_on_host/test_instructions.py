"""The emulator's instructions, against torch."""

import pytest
import torch

from .bodies import SWIZZLED, UNSWIZZLED, launch, random, wgmma
from .runner import AVAILABLE, EmulationError

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")


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


def test_movmatrix(generator):
    matrix, out = random(generator, 8, 8), torch.zeros(8, 8, dtype=torch.bfloat16)
    body = """
      const uint32_t word = *reinterpret_cast<const uint32_t*>(matrix + g * 8 + 2 * t);
      *reinterpret_cast<uint32_t*>(out + g * 8 + 2 * t) = transposed_matrix(word);
    """
    launch(body, arguments={"matrix": matrix, "out": out})
    assert torch.equal(out, matrix.T)


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
