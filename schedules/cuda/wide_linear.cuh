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
#include "vectors.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

namespace vllm_compile {

// The side list of a tile of 16 rows, from column `begin` on: lane r < 16 is at the next entry of row r.
struct Side {
  const Entry* entries;
  uint32_t next, last;   // of the row
  Entry now, ahead;      // now: its value over the scale; ahead: loaded long before it is needed
  float scale, inverse;  // powers of two
  uint32_t nearest;      // column of the next entry of all rows: one comparison says that a block has none

  __device__ __forceinline__ Entry entry(uint32_t at) const {
    return at < last ? entries[at] : Entry{0xffffffffu, 0.f};
  }

  __device__ __forceinline__ void start(const Entry* list, const Row* row, bool mine, uint32_t begin) {
    entries = list;
    next = last = 0, scale = 1.f;
    if (mine) next = row[0].first, last = row[1].first, scale = row[0].scale;
    inverse = 1.f / scale;
    if (begin > 0) {
      uint32_t before = 0;
#pragma unroll 1
      for (uint32_t at = next; at < last; at += 4)
#pragma unroll
        for (int i = 0; i < 4; i++) before += entry(at + i).k < begin;
      next += before;
    }
    ahead = entry(next++);
    advance();
    nearest = __reduce_min_sync(0xffffffff, now.k);
  }

  __device__ __forceinline__ void advance() {
    now = Entry{ahead.k, ahead.value * inverse};
    ahead = entry(next++);
  }

  // Puts the entries of columns up to `end` into the fragments of the block before it.
  __device__ __forceinline__ void put(uint32_t (&a)[4][4], uint32_t end, int lane) {
#pragma unroll 1
    while (nearest < end) {
      const int row = __ffs(__ballot_sync(0xffffffff, now.k == nearest)) - 1;
      const float value = __shfl_sync(0xffffffff, now.value, row);
      if (lane == row % 8 * 4 + nearest / 8 % 4) {
        const int place = nearest / 2 % 4 * 4 + nearest / 32 % 2 * 2 + row / 8;
        const uint32_t bits = word_of(nearest % 2 ? 0.f : value, nearest % 2 ? value : 0.f);
#pragma unroll
        for (int i = 0; i < 16; i++) a[i / 4][i % 4] |= i == place ? bits : 0;  // the code is a zero of the same sign
      }
      if (lane == row) advance();
      nearest = __reduce_min_sync(0xffffffff, now.k);
    }
  }
};

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
  const int width = GATED ? N / 2 : N;
  tokens -= token0;
  if constexpr (!Rows::ROUTED) {
    x += (size_t)token0 * K;
    y += (size_t)token0 * width;
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

  // What this thread finishes: 4 neighbouring rows of a token at a time.  The thread blocks of a cluster share the tokens.
  constexpr int QUADS = (GATED ? ROWS / 2 : ROWS) / 4;
  constexpr int ITEMS = TOKENS / CLUSTER * QUADS, OWN = (ITEMS + THREADS - 1) / THREADS;
  auto place = [&](int own, int& token, int& quad) {
    const int i = own * THREADS + threadIdx.x;
    token = rank * (TOKENS / CLUSTER) + i / QUADS;
    quad = i % QUADS;
    return i < ITEMS && token < tokens;
  };
  const int first_result = GATED ? rows_before / 2 : rows_before;
  const __nv_bfloat16* const bias = static_cast<const __nv_bfloat16*>(bias_or_null);
  const __nv_bfloat16* const residual = static_cast<const __nv_bfloat16*>(residual_or_null);
  uint2 add[OWN], biases[OWN];  // on their way while the sums are exchanged
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    int token, quad;
    add[own] = biases[own] = make_uint2(0, 0);
    if (!GATED && place(own, token, quad)) {
      const int n = first_result + quad * 4;
      if (residual) add[own] = *reinterpret_cast<const uint2*>(residual + (size_t)(token0 + token) * N + n);
      if (bias) biases[own] = *reinterpret_cast<const uint2*>(bias + n);
    }
  }

  // [k_group][token][row], rows padded against bank conflicts.
  constexpr int STRIDE = ROWS + 4;
  float low = 1.f, high = 1.f;
  if constexpr (PACKED) {
    low = __shfl_sync(0xffffffff, side.scale, g);
    high = __shfl_sync(0xffffffff, side.scale, g + 8);
  }
  wait_copies<0>();
  __syncthreads();
  float* const shared_sums = static_cast<float*>(shared);
  float* const to = shared_sums + k_group * (TOKENS * STRIDE) + tile * 16 + g;
#pragma unroll
  for (int m = 0; m < TOKENS / 8; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = m * 8 + t * 2 + i % 2;
      to[token * STRIDE + i / 2 * 8] = sums[m][i] * (i < 2 ? low : high);
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
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    int token, quad;
    if (place(own, token, quad)) {
      float sum[4];
      if constexpr (GATED) {
        float up[4];
        total(sum, token, quad / 4 * 32 + quad % 4 * 4);
        total(up, token, quad / 4 * 32 + quad % 4 * 4 + 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float gate = rounded(sum[i]);
          sum[i] = rounded(gate / (1.f + __expf(-gate))) * rounded(up[i]);
        }
      } else {
        total(sum, token, quad * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (bias) sum[i] += half(biases[own], i);
          if (residual) sum[i] = half(add[own], i) + rounded(sum[i]);
        }
      }
      *reinterpret_cast<uint2*>(y + (size_t)which.y(token) * width + first_result + quad * 4) =
          make_uint2(word_of(sum[0], sum[1]), word_of(sum[2], sum[3]));
    }
  }
  if constexpr (CLUSTER > 1) cluster_arrive_and_wait();  // others may still read our sums
}

}  // namespace vllm_compile

#endif
