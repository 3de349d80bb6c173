// Products of up to 64 tokens with a weight matrix that is read once, x brought by a warpgroup of its own:
// y[tokens, N] = x[tokens, K] @ weight[N, K].T
//
// A thread block makes 256 rows of the weight for TOKENS tokens: each of four warpgroups multiplies 64 of them, as in
// wide_linear.cuh, which see for the order of k, for raised codes and for the side list.  A fifth warpgroup loads x, block
// of 64 columns by block, and stores it to where products look for it, in STAGES places that take turns.  Nothing but
// these places holds warps together: of each, one barrier says that x is there, another that all products with it are
// done.  So warps that meet with entries of the side list delay no others, and none spends instructions on x.
//
// K has a multiple of STAGES blocks: with rounds that may end early, products behind branches, the assembler serialises
// them.
//
// Sums: float32, blocks in order; a token's result has the same bits in every batch.  Weights are copied before
// griddepcontrol.wait: while the kernel before still runs.
#ifndef VLLM_COMPILE_FED_LINEAR
#define VLLM_COMPILE_FED_LINEAR

#include "rows.cuh"
#include "side.cuh"
#include "wgmma.cuh"
#include "wide_results.cuh"

namespace vllm_compile {

// x of one thread block, as the fifth warpgroup brings it: [places][fragment][half][8 tokens][token][t], words.
template <int TOKENS, int PLACES>
struct FedVectors {
  static constexpr int BYTES = TOKENS * 128;  // of a place
  static constexpr int WARPS = 4, OWN = TOKENS / 4 / WARPS;  // pieces of a warp: 8 tokens x 32 columns, one load each
  static constexpr int AHEAD = 2;                            // blocks that are loaded before they are stored
  static_assert(PLACES % AHEAD == 0, "places and blocks ahead keep step");

  uint32_t filled, emptied;  // barriers, 8 bytes each, of the first place

  __device__ __forceinline__ void start(uint32_t barriers, int multiplying_warps) {
    filled = barriers, emptied = barriers + PLACES * 8;
    if (threadIdx.x == 0)
#pragma unroll
      for (int place = 0; place < PLACES; place++)
        phase_init(filled + place * 8, WARPS), phase_init(emptied + place * 8, multiplying_warps);
    __syncthreads();
  }

  // All of x, by one of the WARPS warps.
  __device__ __forceinline__ void bring(const __nv_bfloat16* x, int tokens, int K, char* places, int warp) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks = K / 64;
    uint4 pieces[AHEAD][OWN];
    // Lane (g, t) of a piece: token g, columns 8 * t to + 7.
    auto load = [&](uint4 (&to)[OWN], int block) {
#pragma unroll
      for (int own = 0; own < OWN; own++) {
        const int i = own * WARPS + warp, token = i / 2 * 8 + g;
        to[own] = make_uint4(0, 0, 0, 0);
        if (token < tokens && block < blocks)
          to[own] = *reinterpret_cast<const uint4*>(x + (size_t)token * K + block * 64 + i % 2 * 32 + t * 8);
      }
    };
    // Word w of a piece belongs to fragment w of lane t.
    auto store = [&](const uint4 (&from)[OWN], char* place) {
#pragma unroll
      for (int own = 0; own < OWN; own++) {
        const int i = own * WARPS + warp;
        char* const to = place + i % 2 * (TOKENS * 16) + i / 2 * 128 + lane * 4;
#pragma unroll
        for (int w = 0; w < 4; w++) *reinterpret_cast<uint32_t*>(to + w * (TOKENS * 32)) = element(from[own], w);
      }
    };
#pragma unroll
    for (int ahead = 0; ahead < AHEAD; ahead++) load(pieces[ahead], ahead);
    uint32_t before = 1;  // parity of the round before
#pragma unroll 1
    for (int first = 0; first < blocks; first += PLACES, before ^= 1)
#pragma unroll
      for (int place = 0; place < PLACES; place++) {
        if (first > 0) phase_wait(emptied + place * 8, before);
        store(pieces[place % AHEAD], places + place * BYTES);
        load(pieces[place % AHEAD], first + place + AHEAD);
        proxy_fence();
        __syncwarp();
        if (lane == 0) phase_arrive(filled + place * 8);
      }
  }
};

// PREFETCH, GATED, bias and residual: as in wide_linear.cuh.  `shared` holds places of x and the stages of all warps, and
// after them, in the same place, their sums; behind these the barriers (fed.py computes its size).
template <int TOKENS, int STAGES, int PREFETCH, bool PACKED, bool GATED>
__device__ __forceinline__ void fed_linear(const __nv_bfloat16* x, const void* weight,
                                           const void* bias_or_null,
                                           const void* residual_or_null, __nv_bfloat16* y,
                                           int tokens, int N, int K, void* shared) {
  constexpr int V = BLOCK_VECTORS<PACKED>;
  constexpr int TILES = 16, ROWS = 16 * TILES, THREADS = 32 * TILES + 128;  // a tile of 16 rows a warp
  static_assert(STAGES % 2 == 0, "two sets of fragments take turns");
  using X = FedVectors<TOKENS, STAGES>;
  constexpr int COPIES = STAGES * (X::BYTES + TILES * V * 512), SUMS = TOKENS * (ROWS + 4) * 4;

  const int token0 = blockIdx.y * TOKENS;  // more tokens than TOKENS: each part reads the weight again
  const __nv_bfloat16* residual = static_cast<const __nv_bfloat16*>(residual_or_null);
  tokens -= token0;
  x += (size_t)token0 * K;
  y += (size_t)token0 * (GATED ? N / 2 : N);
  if (residual) residual += (size_t)token0 * N;

  const int lane = threadIdx.x % 32, tile = threadIdx.x / 32, blocks = K / 64;
  const bool multiplies = tile < TILES;
  const int rows_before = blockIdx.x * ROWS;
  // Gated: tiles of gates and of ups alternate.
  const int first_row = GATED ? rows_before / 2 + tile / 2 * 16 + tile % 2 * (N / 2) : rows_before + tile * 16;
  char* const places = static_cast<char*>(shared);

  X vectors;
  vectors.start(shared_address(shared) + (COPIES > SUMS ? COPIES : SUMS), TILES);
  launch_dependents();
  float sums[TOKENS / 8][4] = {};
  float scale = 1.f;
  if (!multiplies) {
    wait_for_kernels_before();
    vectors.bring(x, tokens, K, places, tile - TILES);
  } else {
    uint4* const ring = reinterpret_cast<uint4*>(places + STAGES * X::BYTES) + tile * (STAGES * V * 32) + lane;
    const uint32_t ring_address = shared_address(ring);
    const char* const source = lane_source<PACKED>(weight, first_row, K, lane);
    auto load = [&](int stage, int block) {
      if (block < blocks)
#pragma unroll
        for (int v = 0; v < V; v++)
          copy_async(ring_address + (stage * V + v) * 512, source + vector_offset<PACKED>(block, v, K));
      commit_copies();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) load(stage, stage);
    if constexpr (PREFETCH > 0)
      prefetch_blocks<PACKED>(weight, first_row, K, STAGES, min(STAGES + PREFETCH, blocks), lane);
    Side side;
    if constexpr (PACKED) {
      side.start(side_list(weight, N, K), row_table(weight, N, K) + first_row + lane, lane < 16, 0);
      scale = side.scale;
    }
    wait_for_kernels_before();

    const uint64_t descriptor = matrix_descriptor(shared_address(places), TOKENS * 16, 128);
    auto multiply = [&](uint32_t (&a)[4][4], int stage, int block, uint32_t parity) {
      uint4 v[V];
      wait_copies<STAGES - 1>();
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = ring[(stage * V + i) * 32];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        fragment<PACKED>(a[i], v, i);
        if constexpr (PACKED)
#pragma unroll
          for (int n = 0; n < 4; n++) a[i][n] = raised(a[i][n]);
      }
      load(stage, block + STAGES);
      if constexpr (PACKED) side.put(a, (block + 1) * 64, lane);
      phase_wait(vectors.filled + stage * 8, parity);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; i++) wgmma<TOKENS>(sums, a[i], descriptor + (stage * X::BYTES + i * (TOKENS * 32)) / 16);
      wgmma_commit();
      wgmma_wait<1>();  // those of the block before are done
      if (block > 0 && lane == 0) phase_arrive(vectors.emptied + (stage + STAGES - 1) % STAGES * 8);
    };
    uint32_t a[2][4][4], parity = 0;
#pragma unroll 1
    for (int first = 0; first < blocks; first += STAGES, parity ^= 1)
#pragma unroll
      for (int stage = 0; stage < STAGES; stage++)
        multiply(a[stage % 2], stage, first + stage, parity);
    wgmma_wait<0>();
    wgmma_results(sums);
  }
  write_results<TOKENS, ROWS, 1, 1, THREADS, GATED>(sums, scale, multiplies, 0, tile, rows_before, tokens, N, bias_or_null,
                                                    residual, y, shared, DenseRows{});
}

}  // namespace vllm_compile

#endif
