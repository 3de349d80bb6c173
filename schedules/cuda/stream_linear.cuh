// Products of a few tokens with a weight matrix that is read once: y[tokens, N] = x[tokens, K] @ weight[N, K].T
//
// A thread block makes ROW_TILES tiles of 16 rows of the weight, for all tokens.  Its WARPS warps take blocks of 64
// columns in turn; each lane copies its own weights of the coming STAGES blocks to shared memory (cp.async) and reads
// back what it copied itself, so that the stream needs neither registers nor barriers.  The products go through
// mma.m16n8k16: the weight's rows are A, eight tokens are B.  As the order of k within a block is free, lane (g, t)
// takes 16 contiguous bytes of x and of the weight: columns 32 * h + 8 * t to + 7, for both halves h of the block.
//
// A lossless weight (vllm_compile/lossless.py) is made of bf16 numbers with exponent fields 0 to 15, which nine bit operations
// restore for each eight weights.  x (or the weight, whichever is less work) is multiplied by 2^64, exactly, so that
// products do not come near float32's denormals; each row's scale is applied to its sum.
//
// Sums: float32, in an order that depends on WARPS alone; a token's result has the same bits in every batch.
// Weights are copied before griddepcontrol.wait, that is, while the kernel before this one still runs.
#ifndef VLLM_COMPILE_STREAM_LINEAR
#define VLLM_COMPILE_STREAM_LINEAR

#include "rows.cuh"
#include "vectors.cuh"
#include "weights.cuh"

namespace vllm_compile {

// PREFETCH: blocks of a tile, behind those of the stages, that go to the L2 cache while the kernels before still run.
// AHEAD: x is loaded before the weights of the block before it are waited for, for more registers.
// GATED: the weight's first N / 2 rows are gates, the others ups; y[tokens, N / 2] = silu(gate) * up.
// Bias [N] and residual [tokens, N] may be null, and are if GATED.  `shared` holds the stages of all warps, and after
// them, in the same place, their sums (stream.py computes its size).
// Rows says which of x and y those of the tokens are (rows.cuh): a dense layer's, or those of an expert's group.
template <int TOKEN_TILES, int ROW_TILES, int WARPS, int STAGES, int PREFETCH, bool AHEAD, bool PACKED, bool GATED,
          class Rows = DenseRows>
__device__ __forceinline__ void stream_linear(const __nv_bfloat16* x, const void* weight,
                                              const void* bias_or_null,
                                              const void* residual_or_null,
                                              __nv_bfloat16* y, int tokens, int N, int K, void* shared,
                                              Rows which = Rows{}) {
  const __nv_bfloat16* const bias = static_cast<const __nv_bfloat16*>(bias_or_null);
  const __nv_bfloat16* residual = static_cast<const __nv_bfloat16*>(residual_or_null);
  constexpr int V = BLOCK_VECTORS<PACKED>;
  constexpr int THREADS = 32 * WARPS;
  constexpr int SUMS = ROW_TILES * TOKEN_TILES * 128;      // sums of a thread block
  constexpr int OWN = (SUMS + THREADS - 1) / THREADS;      // of which a thread finishes these
  constexpr bool RAISE_WEIGHT = PACKED && TOKEN_TILES > 2 * ROW_TILES;
  static_assert(!GATED || ROW_TILES % 2 == 0, "gates and ups come in pairs of tiles");

  const int token0 = Rows::ROUTED ? 0 : blockIdx.y * 8 * TOKEN_TILES;  // more tokens than tiles: each part reads the weight again
  tokens -= token0;
  if constexpr (!Rows::ROUTED) {
    x += (size_t)token0 * K;
    y += (size_t)token0 * (GATED ? N / 2 : N);
  }
  if (residual) residual += (size_t)token0 * N;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  // Of this warp; the same for all where K allows it, so that a compiler which knows K need not ask at each step.
  const int blocks = K / 64, steps = blocks % WARPS == 0 ? blocks / WARPS : (blocks - warp + WARPS - 1) / WARPS;

  // First row of a tile.  Gated: gates and ups alternate.
  auto first_row = [&](int tile) {
    return GATED ? (blockIdx.x * (ROW_TILES / 2) + tile / 2) * 16 + tile % 2 * (N / 2)
                 : (blockIdx.x * ROW_TILES + tile) * 16;
  };

  const char* source = lane_source<PACKED>(weight, first_row(0), K, lane) + vector_offset<PACKED>(warp, 0, K);  // the next block
  uint4* const ring = static_cast<uint4*>(shared) + warp * (STAGES * ROW_TILES * V * 32) + lane;
  const uint32_t ring_address = shared_address(ring);

  auto load = [&](int stage, int step) {
    if (step < steps) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int v = 0; v < V; v++)
          copy_async(ring_address + ((stage * ROW_TILES + r) * V + v) * 512,
                     source + rows_offset<PACKED>(first_row(r) - first_row(0), K) + vector_offset<PACKED>(0, v, K));
    }
    source += vector_offset<PACKED>(WARPS, 0, K);
    commit_copies();
  };

  if constexpr (!Rows::ROUTED) launch_dependents();
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) load(stage, stage);
  if constexpr (PREFETCH > 0)
    if (warp < ROW_TILES)
      prefetch_blocks<PACKED>(weight, first_row(warp), K, STAGES * WARPS, min(STAGES * WARPS + PREFETCH, blocks), lane);

  // What the sums that this thread finishes need besides: read while the weights are on their way.
  const Row* const rows = row_table(weight, N, K);
  const Entry* const side = side_list(weight, N, K);
  float scale[OWN], extra[OWN];
  uint32_t first[OWN], last[OWN];
  auto place = [&](int own, int& token, int& row, int& r) {
    const int i = own * THREADS + threadIdx.x;
    row = i % 16;
    r = i / 16 % ROW_TILES;
    token = i / (16 * ROW_TILES);
    return i < SUMS && token < tokens;
  };
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    int token, row, r;
    scale[own] = 1.f, extra[own] = 0.f, first[own] = last[own] = 0;
    if (PACKED && place(own, token, row, r)) {
      const Row* header = rows + first_row(r) + row;
      first[own] = header[0].first, last[own] = header[1].first, scale[own] = header[0].scale;
    }
  }

  if constexpr (!Rows::ROUTED) wait_for_kernels_before();

  float add[OWN];
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    int token, row, r;
    add[own] = 0.f;
    if (place(own, token, row, r)) {
      for (uint32_t e = first[own]; e < last[own]; e++)
        extra[own] += side[e].value * __bfloat162float(x[(size_t)which.x(token) * K + side[e].k]);
      if (!GATED && residual) add[own] = __bfloat162float(residual[(size_t)token * N + first_row(r) + row]);
    }
  }

  float sums[ROW_TILES][TOKEN_TILES][4] = {};
  // The steps of a round know their places, which takes registers: with more tiles of rows than of tokens so many that one
  // thread block less has room, with plain weights more than there are.
  constexpr int PARTS = AHEAD ? 2 : 1, PLACES = STAGES % PARTS ? PARTS * STAGES : STAGES;
  constexpr int ROUND = PACKED && ROW_TILES <= TOKEN_TILES ? PLACES : PARTS;
  uint4 parts[PARTS][TOKEN_TILES][2] = {};
  const auto x_rows = which.template own<TOKEN_TILES>([=](int m) { return m * 8 + g; }, tokens);
  const __nv_bfloat16* columns = x + (size_t)x_rows[0] * K + warp * 64 + t * 8;  // of the block that is loaded next
  auto load_x = [&](uint4(&to)[TOKEN_TILES][2], int step) {
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        // Zeros of tokens that there are not stay from before the loop, where registers are enough for that.
        if constexpr (!PACKED) to[m][h] = make_uint4(0, 0, 0, 0);
        if (m * 8 + g < tokens && step < steps)
          to[m][h] = *reinterpret_cast<const uint4*>(columns + (ptrdiff_t)(x_rows[m] - x_rows[0]) * K + h * 32);
      }
    columns += WARPS * 64;
  };
  auto multiply = [&](const uint4(&part)[TOKEN_TILES][2], int stage) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      uint4 v[V];
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = ring[((stage * ROW_TILES + r) * V + i) * 32];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        fragment<PACKED>(a, v, i);
        if constexpr (RAISE_WEIGHT)
#pragma unroll
          for (int n = 0; n < 4; n++) a[n] = raised(a[n]);
#pragma unroll
        for (int m = 0; m < TOKEN_TILES; m++) {
          uint32_t b0 = element(part[m][0], i), b1 = element(part[m][1], i);
          if constexpr (PACKED && !RAISE_WEIGHT) b0 = raised(b0), b1 = raised(b1);
          mma(sums[r][m], a, b0, b1);
        }
      }
    }
  };
  load_x(parts[0], 0);
  int stage = 0;
#pragma unroll 1
  for (int first = 0; first < steps; first += ROUND) {
    if constexpr (ROUND % STAGES == 0) stage = 0;
#pragma unroll
    for (int i = 0; i < ROUND; i++) {
      const int step = first + i;
      if (step >= steps) break;
      if constexpr (AHEAD) load_x(parts[(i + 1) % PARTS], step + 1);
      wait_copies<STAGES - 1>();
      multiply(parts[i % PARTS], stage);
      load(stage, step + STAGES);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      if constexpr (!AHEAD) load_x(parts[0], step + 1);
    }
  }

  // Each warp's sums: [warp][row tile][token tile][lane][4], the accumulators of the mma.
  wait_copies<0>();
  __syncthreads();
  float4* const shared_sums = static_cast<float4*>(shared);
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; m++)
      shared_sums[((warp * ROW_TILES + r) * TOKEN_TILES + m) * 32 + lane] =
          make_float4(sums[r][m][0], sums[r][m][1], sums[r][m][2], sums[r][m][3]);
  __syncthreads();

#pragma unroll
  for (int own = 0; own < OWN; own++) {
    int token, row, r;
    if (place(own, token, row, r)) {
      const int from = (r * TOKEN_TILES + token / 8) * 128 + (row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += static_cast<const float*>(shared)[w * SUMS + from];
      sum = sum * scale[own] + extra[own];
      const int n = first_row(r) + row;
      if constexpr (GATED) {
        // Tiles alternate, so the up of a gate is another thread's: 16 threads on.
        const float value = rounded(sum), up = __shfl_down_sync(0xffffffff, value, 16);
        if (r % 2 == 0) {
          const float silu = rounded(value / (1.f + __expf(-value)));
          y[(size_t)which.y(token) * (N / 2) + n] = __float2bfloat16_rn(silu * up);
        }
      } else {
        if (bias) sum += __bfloat162float(bias[n]);
        if (residual) sum = add[own] + rounded(sum);
        y[(size_t)which.y(token) * N + n] = __float2bfloat16_rn(sum);
      }
    }
  }
}

}  // namespace vllm_compile

#endif
