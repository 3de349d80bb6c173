// From the sums of a thread block's warpgroups to rows of y: parts of K added up, bias, residual, SiLU.
#ifndef VLLM_COMPILE_WIDE_RESULTS
#define VLLM_COMPILE_WIDE_RESULTS

#include "arrivals.cuh"
#include "splits.cuh"
#include "vectors.cuh"
#include "wgmma.cuh"

namespace vllm_compile {

// Called by all THREADS of a thread block that has ROWS rows from `rows_before` on, for TOKENS tokens, `tokens` of them
// real, in K_GROUPS * CLUSTER parts of K.  A warp that `multiplies` has the sums of 16 rows, tile number `tile`, in one
// part; its lane r has row r's scale.  Tiles, the bias, GATED: as in wide_linear.cuh.  y and residual begin with the first
// of the tokens; which.y(token) is its row of y.  `shared`, K_GROUPS * TOKENS * (ROWS + 4) floats, may be in use until all
// copies have been waited for.  All that is one of SPLITS parts of K, number `split` (splits.cuh).
template <int TOKENS, int ROWS, int K_GROUPS, int CLUSTER, int THREADS, bool GATED, int SPLITS = 1, class Rows>
__device__ __forceinline__ void write_results(const float (&sums)[TOKENS / 8][4], float scale, bool multiplies, int k_group,
                                              int tile, int rows_before, int tokens, int N, const void* bias_or_null,
                                              const __nv_bfloat16* residual, __nv_bfloat16* y, void* shared,
                                              const Rows& which, int split = 0) {
  // What this thread finishes: 4 neighbouring rows of a token at a time.  The thread blocks of a cluster share the tokens.
  constexpr int QUADS = (GATED ? ROWS / 2 : ROWS) / 4;
  constexpr int SHARE = (TOKENS + CLUSTER - 1) / CLUSTER, ITEMS = SHARE * QUADS, OWN = (ITEMS + THREADS - 1) / THREADS;
  const int width = GATED ? N / 2 : N, rank = CLUSTER > 1 ? cluster_rank() : 0;
  auto place = [&](int own, int& token, int& quad) {
    const int i = own * THREADS + threadIdx.x;
    token = rank * SHARE + i / QUADS;
    quad = i % QUADS;
    return i < ITEMS && token < min(tokens, TOKENS);
  };
  auto each = [&](auto&& does) {
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      int token, quad;
      if (place(own, token, quad)) does(own, token, quad);
    }
  };
  const int first_result = GATED ? rows_before / 2 : rows_before;
  const __nv_bfloat16* const bias = static_cast<const __nv_bfloat16*>(bias_or_null);
  struct Extras {  // four numbers each
    uint2 bias, residual;
  };
  auto extras = [&](int token, int quad) {
    Extras found = {};
    const int n = first_result + quad * 4;
    if (!GATED && residual) found.residual = *reinterpret_cast<const uint2*>(residual + (size_t)token * N + n);
    if (!GATED && bias) found.bias = *reinterpret_cast<const uint2*>(bias + n);
    return found;
  };
  Extras early[OWN];  // on their way while the sums are exchanged, unless another thread block may want them
  if constexpr (SPLITS == 1) each([&](int own, int token, int quad) { early[own] = extras(token, quad); });

  // [k_group][token][row], rows padded against bank conflicts.
  constexpr int STRIDE = ROWS + 4;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float low = __shfl_sync(0xffffffff, scale, g), high = __shfl_sync(0xffffffff, scale, g + 8);
  wait_copies<0>();
  __syncthreads();
  float* const shared_sums = static_cast<float*>(shared);
  if (multiplies) {
    float* const to = shared_sums + k_group * (TOKENS * STRIDE) + tile * 16 + g;
#pragma unroll
    for (int m = 0; m < TOKENS / 8; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = m * 8 + t * 2 + i % 2;
        to[token * STRIDE + i / 2 * 8] = sums[m][i] * (i < 2 ? low : high);
      }
  }
  if constexpr (CLUSTER > 1) {
    cluster_arrive_and_wait();
  } else {
    __syncthreads();
  }

  // Of one row group of four: all parts of K, in order.
  auto total = [&](float(&sum)[4], int token, int row) {
#pragma unroll
    for (int r = 0; r < CLUSTER; r++)
#pragma unroll
      for (int k = 0; k < K_GROUPS; k++) {
        const float* from = shared_sums + (k * TOKENS + token) * STRIDE + row;
        float4 part;
        if constexpr (CLUSTER > 1) {
          part = load_cluster(shared_address(from), r);
        } else {
          part = *reinterpret_cast<const float4*>(from);
        }
        if (r == 0 && k == 0) {
          sum[0] = part.x, sum[1] = part.y, sum[2] = part.z, sum[3] = part.w;
        } else {
          sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
      }
  };
  auto half = [](const uint2& words, int i) {
    const uint32_t word = i < 2 ? words.x : words.y;
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  };
  // The sums of gates, and of ups behind them; or of rows, and nothing.
  auto totals = [&](float(&sum)[4], float(&up)[4], int token, int quad) {
    if constexpr (GATED) {
      total(sum, token, quad / 4 * 32 + quad % 4 * 4);
      total(up, token, quad / 4 * 32 + quad % 4 * 4 + 16);
    } else {
      total(sum, token, quad * 4);
    }
  };
  auto finish = [&](float(&sum)[4], const float(&up)[4], const Extras& more, int token, int quad) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (GATED) {
        const float gate = rounded(sum[i]);
        sum[i] = rounded(gate / (1.f + __expf(-gate))) * rounded(up[i]);
      } else {
        if (bias) sum[i] += half(more.bias, i);
        if (residual) sum[i] = half(more.residual, i) + rounded(sum[i]);
      }
    }
    *reinterpret_cast<uint2*>(y + (size_t)which.y(token) * width + first_result + quad * 4) =
        make_uint2(word_of(sum[0], sum[1]), word_of(sum[2], sum[3]));
  };
  if constexpr (SPLITS == 1) {
    each([&](int own, int token, int quad) {
      float sum[4], up[4];
      totals(sum, up, token, quad);
      finish(sum, up, early[own], token, quad);
    });
    if constexpr (CLUSTER > 1) cluster_arrive_and_wait();  // others may still read our sums
  } else {
    const int group = rows_before / ROWS * CLUSTER + rank;
    auto stored = [&](int of_split, int own, bool ups) {  // [group][split][rows or gates, ups][quad of a token]
      return split_sums<(SPLITS > 1)> + ((group * SPLITS + of_split) * (GATED ? 2 : 1) + ups) * ITEMS + own * THREADS + threadIdx.x;
    };
    each([&](int own, int token, int quad) {
      float sum[4], up[4];
      totals(sum, up, token, quad);
      *stored(split, own, false) = make_float4(sum[0], sum[1], sum[2], sum[3]);
      if (GATED) *stored(split, own, true) = make_float4(up[0], up[1], up[2], up[3]);
    });
    if constexpr (CLUSTER > 1) cluster_arrive_and_wait();
    if (!last_to_arrive(split_arrivals<(SPLITS > 1)> + group, SPLITS)) return;
    auto added = [&](float(&sum)[4], int own, bool ups) {
#pragma unroll
      for (int s = 0; s < SPLITS; s++) {
        const float4 part = __ldcg(stored(s, own, ups));
        sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
      }
    };
#pragma unroll 1
    for (int own = 0; own < OWN; own++) {
      int token, quad;
      float sum[4] = {}, up[4] = {};
      if (place(own, token, quad)) {
        const Extras more = extras(token, quad);
        added(sum, own, false);
        if (GATED) added(up, own, true);
        finish(sum, up, more, token, quad);
      }
    }
  }
}

}  // namespace vllm_compile

#endif
