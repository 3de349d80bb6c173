// Products of 9 to 64 tokens with a weight matrix that is read once: y[tokens, N] = x[tokens, K] @ weight[N, K].T
//
// A thread block makes ROW_GROUPS * 64 rows of the weight for TOKENS tokens, in K_GROUPS * CLUSTER parts of K: one of
// its warpgroups multiplies 64 rows in one part.  Each lane copies its own weights and its own piece of x of the coming
// STAGES steps (of BLOCKS blocks of 64 columns) to shared memory and reads back what it copied itself, as in
// stream_linear.cuh.  The warpgroups of one part share x: it goes from the stages to two buffers that take turns, one
// barrier a step.
//
// The products go through wgmma: A, the weight, comes from registers, B, x, from shared memory.  The order of k within
// a block is free: lane (g, t) has columns 8 * t to + 7 of each half block, two of them in each fragment, so x's words
// are stored to where the products with these look for them (`store_x`), without bank conflicts.  The products of a
// block run while the next block is unpacked.
//
// Codes of lossless weights are multiplied by 2^64, exactly, so that products do not come near float32's denormals; sums
// are multiplied by the row's scale.  An entry of the side list takes its place among the raised codes: weight / scale,
// which is a bf16 number too unless it is 2^79 times smaller (2^175 times larger) than the row's largest code.
//
// Sums: float32, in an order that depends on the template arguments alone (parts of K in order); a token's result has
// the same bits in every batch.  Weights are copied before griddepcontrol.wait: while the kernel before still runs.
#ifndef VLLM_COMPILE_WIDE_LINEAR
#define VLLM_COMPILE_WIDE_LINEAR

#include "rows.cuh"
#include "side.cuh"
#include "wgmma.cuh"
#include "wide_results.cuh"

namespace vllm_compile {

// PREFETCH: blocks of a part of K, behind those of the stages, that go to the L2 cache while the kernels before still run.
// GATED: the weight's first N / 2 rows are gates, the others ups; y[tokens, N / 2] = silu(gate) * up.
// Bias [N] and residual [tokens, N] may be null, and are if GATED.  `shared` holds x and the stages of all warps, and after
// them, in the same place, their sums (wide.py computes its size).
// Rows says which of x and y those of the tokens are (rows.cuh): a dense layer's, or those of an expert's group.
template <int TOKENS, int ROW_GROUPS, int K_GROUPS, int CLUSTER, int BLOCKS, int STAGES, int PREFETCH, bool PACKED, bool GATED,
          class Rows = DenseRows>
__device__ __forceinline__ void wide_linear(const __nv_bfloat16* x, const void* weight,
                                            const void* bias_or_null,
                                            const void* residual_or_null, __nv_bfloat16* y,
                                            int tokens, int N, int K, void* shared, Rows which = Rows{}) {
  constexpr int V = BLOCK_VECTORS<PACKED>;
  constexpr int TILES = 4 * ROW_GROUPS;      // of 16 rows, one a warp
  constexpr int ROWS = 16 * TILES;           // of a thread block
  constexpr int THREADS = 32 * TILES * K_GROUPS;
  constexpr int X_BLOCK = TOKENS * 128;      // bytes of x in a block
  constexpr int PIECES = TOKENS / 8 * 2 * BLOCKS;          // 8 tokens x 32 columns of x in a step: one load of a warp
  constexpr int OWN_PIECES = (PIECES + TILES - 1) / TILES;
  constexpr int X_STEP = BLOCKS * X_BLOCK;                 // bytes of x in a step
  static_assert(BLOCKS == 1 || BLOCKS == 2, "fragments of a step that registers hold");

  const int token0 = Rows::ROUTED ? 0 : blockIdx.y * TOKENS;  // more tokens than TOKENS: each part reads the weight again
  const __nv_bfloat16* residual = static_cast<const __nv_bfloat16*>(residual_or_null);
  tokens -= token0;
  if constexpr (!Rows::ROUTED) {
    x += (size_t)token0 * K;
    y += (size_t)token0 * (GATED ? N / 2 : N);
    if (residual) residual += (size_t)token0 * N;
  }

  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / 32, tile = warp % TILES, k_group = K_GROUPS == 1 ? 0 : warp / TILES;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int rows_before = blockIdx.x / CLUSTER * ROWS;
  // Gated: tiles of gates and of ups alternate.
  const int first_row = GATED ? rows_before / 2 + tile / 2 * 16 + tile % 2 * (N / 2) : rows_before + tile * 16;

  // This part of K: whole steps, but for the last part's last.
  const int blocks = K / 64, all_steps = (blocks + BLOCKS - 1) / BLOCKS, part = rank * K_GROUPS + k_group;
  const int first_step = all_steps * part / (K_GROUPS * CLUSTER);
  const int steps = all_steps * (part + 1) / (K_GROUPS * CLUSTER) - first_step;
  const int begin = first_step * BLOCKS, end = min(begin + steps * BLOCKS, blocks);

  char* const buffers = static_cast<char*>(shared) + k_group * ((2 + STAGES) * X_STEP);
  const uint4* const x_ring = reinterpret_cast<const uint4*>(buffers + 2 * X_STEP) + lane;
  uint4* const ring = reinterpret_cast<uint4*>(static_cast<char*>(shared) + K_GROUPS * (2 + STAGES) * X_STEP) +
                      warp * (STAGES * BLOCKS * V * 32) + lane;
  const uint32_t buffers_address = shared_address(buffers), ring_address = shared_address(ring);
  const uint32_t x_address = shared_address(x_ring);
  const char* const source = lane_source<PACKED>(weight, first_row, K, lane);

  auto load_weights = [&](int stage, int step) {
    if (step < steps) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        const int block = begin + step * BLOCKS + b;
#pragma unroll
        for (int v = 0; v < V; v++) {
          const uint32_t to = ring_address + ((stage * BLOCKS + b) * V + v) * 512;
          if (b == 0) {
            copy_async(to, source + vector_offset<PACKED>(block, v, K));
          } else {  // none of this block in the last step: zeros
            copy_async_or_zero(to, source + vector_offset<PACKED>(min(block, end - 1), v, K), block < end);
          }
        }
      }
    }
  };
  // Lane (g, t) of a piece: token g, columns 8 * t to + 7.
  const auto x_rows = which.template own<OWN_PIECES>(
      [=](int own) { return min((own * TILES + tile) / (2 * BLOCKS) * 8 + g, tokens - 1); }, tokens);
  auto load_x = [&](int stage, int step) {
    if (step < steps) {
#pragma unroll
      for (int own = 0; own < OWN_PIECES; own++) {
        const int i = own * TILES + tile, token = i / (2 * BLOCKS) * 8 + g;
        const int block = begin + step * BLOCKS + i % (2 * BLOCKS) / 2;
        if (PIECES % TILES == 0 || i < PIECES)
          copy_async_or_zero(x_address + stage * X_STEP + i * 512,
                             x + (size_t)x_rows[own] * K + min(block, end - 1) * 64 + i % 2 * 32 + t * 8,
                             token < tokens && block < end);
      }
    }
  };
  // [block][fragment][half][8 tokens][token][t]: word i of a piece belongs to fragment i of lane t.
  auto store_x = [&](int buffer, int stage) {
#pragma unroll
    for (int own = 0; own < OWN_PIECES; own++) {
      const int i = own * TILES + tile;
      if (PIECES % TILES == 0 || i < PIECES) {
        const uint4 piece = x_ring[stage * (X_STEP / 16) + i * 32];
        char* to = buffers + (buffer * BLOCKS + i % (2 * BLOCKS) / 2) * X_BLOCK + i % 2 * (TOKENS * 16);
        to += i / (2 * BLOCKS) * 128 + lane * 4;
#pragma unroll
        for (int w = 0; w < 4; w++) *reinterpret_cast<uint32_t*>(to + w * (TOKENS * 32)) = element(piece, w);
      }
    }
  };

  if constexpr (!Rows::ROUTED) launch_dependents();
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) load_weights(stage, stage);
  commit_copies();
  if constexpr (PREFETCH > 0) {
    const int staged = begin + STAGES * BLOCKS;
    prefetch_blocks<PACKED>(weight, first_row, K, staged, min(staged + PREFETCH, end), lane);
  }

  Side side;
  if constexpr (PACKED)
    side.start(side_list(weight, N, K), row_table(weight, N, K) + first_row + lane, lane < 16, begin * 64);

  if constexpr (!Rows::ROUTED) wait_for_kernels_before();

#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) load_x(stage, stage), commit_copies();

  float sums[TOKENS / 8][4] = {};
  uint32_t a[BLOCKS][4][4];
  auto unpack = [&](int stage, int step, int b) {
    uint4 v[V];
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = ring[((stage * BLOCKS + b) * V + i) * 32];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      fragment<PACKED>(a[b][i], v, i);
      if constexpr (PACKED)
#pragma unroll
        for (int n = 0; n < 4; n++) a[b][i][n] = raised(a[b][i][n]);
    }
    if constexpr (PACKED) side.put(a[b], min(begin + step * BLOCKS + b + 1, end) * 64, lane);
  };
  auto multiply = [&](int buffer, int b) {
    const uint32_t from = buffers_address + (buffer * BLOCKS + b) * X_BLOCK;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++)
      wgmma<TOKENS>(sums, a[b][i], matrix_descriptor(from + i * (TOKENS * 32), TOKENS * 16, 128));
    wgmma_commit();
  };

  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const int buffer = step % 2;
    wait_copies<STAGES - 1>();
    store_x(buffer, stage);
    unpack(stage, step, 0);
    wgmma_wait<0>();  // after the barrier, nobody uses the other buffer
    proxy_fence();
    sync_threads<32 * TILES>(1 + k_group);
    multiply(buffer, 0);
    if constexpr (BLOCKS > 1) {
      unpack(stage, step, 1);
      multiply(buffer, 1);
    }
    load_weights(stage, step + STAGES);
    load_x(stage, step + STAGES);
    commit_copies();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    wgmma_wait<BLOCKS - 1>();  // a[0] is free
  }
  wgmma_wait<0>();
  wgmma_results(sums);

  write_results<TOKENS, ROWS, K_GROUPS, CLUSTER, THREADS, GATED>(sums, PACKED ? side.scale : 1.f, true, k_group, tile,
                                                                 rows_before, tokens, N, bias_or_null, residual, y, shared,
                                                                 which);
}

}  // namespace vllm_compile

#endif
