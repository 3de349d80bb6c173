// Products of up to 64 tokens with a weight matrix that is read once, x brought by warps of its own:
// y[tokens, N] = x[tokens, K] @ weight[N, K].T
//
// A thread block makes TILES * 16 rows of the weight for TOKENS tokens, in one of SPLITS parts of K, and that in
// K_GROUPS * CLUSTER parts: one of its warpgroups multiplies 64 rows in one of these, as in wide_linear.cuh, which see for
// the order of k, for raised codes and for the side list.  ROW_GROUPS warpgroups have room for the tiles; warps of the last
// that have none multiply zeros.  As many more warps as there are warpgroups load x, block of 64 columns by block, and store
// it to where products look for it, in STAGES places for each part that take turns.
// Nothing but these places holds warps together: of each, one barrier says that x is there, another that all products with
// it are done.  So warps that meet with entries of the side list delay no others, and none spends instructions on x.
//
// A part of K has a multiple of STAGES blocks: with rounds that may end early, products behind branches, the assembler
// serialises them.  Of SPLITS parts some have a round more than others.
//
// Sums: float32, blocks in order, then parts in order, then those of SPLITS; a token's result has the same bits in every batch.  Weights are
// copied before griddepcontrol.wait: while the kernel before still runs.
#ifndef VLLM_COMPILE_FED_LINEAR
#define VLLM_COMPILE_FED_LINEAR

#include "rows.cuh"
#include "side.cuh"
#include "wgmma.cuh"
#include "wide_results.cuh"

namespace vllm_compile {

// x of one part of K, as WARPS warps bring it: [places][fragment][half][8 tokens][token][t], words.
template <int TOKENS, int WARPS, int PLACES>
struct FedVectors {
  static constexpr int BYTES = TOKENS * 128;       // of a place
  static constexpr int BARRIERS = PLACES * 2 * 8;  // bytes: of each place, that it is filled and that it is emptied
  static constexpr int PIECES = TOKENS / 4;        // of a block: 8 tokens x 32 columns, one load of a warp each
  static constexpr int OWN = (PIECES + WARPS - 1) / WARPS;
  static constexpr int AHEAD = OWN > 4 ? 1 : 2;    // blocks that are loaded before they are stored: what registers hold
  static_assert(PLACES % AHEAD == 0, "places and blocks ahead keep step");

  uint32_t filled, emptied;  // barriers of the first place

  __device__ __forceinline__ explicit FedVectors(uint32_t barriers) : filled(barriers), emptied(barriers + PLACES * 8) {}

  __device__ __forceinline__ void start(int multiplying_warps) const {
#pragma unroll
    for (int place = 0; place < PLACES; place++)
      phase_init(filled + place * 8, WARPS), phase_init(emptied + place * 8, multiplying_warps);
  }

  // So many blocks of x [tokens, K], by one of the WARPS warps.
  __device__ __forceinline__ void bring(const __nv_bfloat16* x, int tokens, int K, int blocks, char* places,
                                        int warp) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Lane (g, t) of piece i: token i / 2 * 8 + g, columns i % 2 * 32 + 8 * t to + 7.  Of pieces own * WARPS + warp only the
    // warp's part is in registers.
    const int first_token = warp / 2 * 8 + g;
    const __nv_bfloat16* columns = x + (size_t)first_token * K + warp % 2 * 32 + t * 8;  // of the block that is loaded next
    auto mine = [&](int own) { return PIECES % WARPS == 0 || own * WARPS + warp < PIECES; };
    uint4 pieces[AHEAD][OWN];
    auto load = [&](uint4 (&to)[OWN], int block) {
#pragma unroll
      for (int own = 0; own < OWN; own++) {
        const int token = own * WARPS / 2 * 8;
        to[own] = make_uint4(0, 0, 0, 0);
        if (mine(own) && first_token + token < tokens && block < blocks)
          to[own] = *reinterpret_cast<const uint4*>(columns + (ptrdiff_t)token * K + own * WARPS % 2 * 32);
      }
      columns += 64;
    };
    // Word w of a piece belongs to fragment w of lane t.
    char* const first_place = places + warp % 2 * (TOKENS * 16) + warp / 2 * 128 + lane * 4;
    auto store = [&](const uint4 (&from)[OWN], int place) {
#pragma unroll
      for (int own = 0; own < OWN; own++) {
        char* const to = first_place + place * BYTES + own * WARPS % 2 * (TOKENS * 16) + own * WARPS / 2 * 128;
        if (mine(own))
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
        store(pieces[place % AHEAD], place);
        load(pieces[place % AHEAD], first + place + AHEAD);
        proxy_fence();
        __syncwarp();
        if (lane == 0) phase_arrive(filled + place * 8);
      }
  }
};

// PREFETCH, GATED, bias and residual: as in wide_linear.cuh.  `shared` holds places of x, the stages of all warps and the
// barriers, and after them, in the same place, the sums (fed.py computes its size).  With SPLITS no more tokens than TOKENS.
template <int TOKENS, int ROW_GROUPS, int TILES, int K_GROUPS, int CLUSTER, int SPLITS, int STAGES, int PREFETCH, bool PACKED,
          bool GATED>
__device__ __forceinline__ void fed_linear(const __nv_bfloat16* x, const void* weight,
                                           const void* bias_or_null,
                                           const void* residual_or_null, __nv_bfloat16* y,
                                           int tokens, int N, int K, void* shared) {
  constexpr int V = BLOCK_VECTORS<PACKED>;
  constexpr int PART_WARPS = 4 * ROW_GROUPS, ROWS = 16 * TILES;  // of a part of K: each has a tile of 16 rows, or none
  static_assert(PART_WARPS - 4 < TILES && TILES <= PART_WARPS, "tiles for each warpgroup");
  static_assert(!GATED || TILES % 2 == 0, "as many gates as ups");
  constexpr int WARPS = PART_WARPS * K_GROUPS, FEEDERS = ROW_GROUPS * K_GROUPS, THREADS = 32 * (WARPS + FEEDERS);
  static_assert(STAGES % 2 == 0, "two sets of fragments take turns");
  using X = FedVectors<TOKENS, FEEDERS / K_GROUPS, STAGES>;
  constexpr int PLACES_OF_PART = STAGES * X::BYTES;
  constexpr int COPIES = K_GROUPS * PLACES_OF_PART + STAGES * WARPS * V * 512;

  const int token0 = blockIdx.y * TOKENS;  // more tokens than TOKENS: each part reads the weight again
  const __nv_bfloat16* residual = static_cast<const __nv_bfloat16*>(residual_or_null);
  tokens -= token0;
  x += (size_t)token0 * K;
  y += (size_t)token0 * (GATED ? N / 2 : N);
  if (residual) residual += (size_t)token0 * N;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool multiplies = warp < WARPS;
  const int tile = warp % PART_WARPS, feeder = warp - WARPS;
  const bool has_tile = TILES == PART_WARPS || tile < TILES;
  const int k_group = K_GROUPS == 1 ? 0 : multiplies ? warp / PART_WARPS : feeder % K_GROUPS;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int split = blockIdx.x / CLUSTER % SPLITS, rows_before = blockIdx.x / (CLUSTER * SPLITS) * ROWS;
  // Gated: tiles of gates and of ups alternate.
  const int first_row = GATED ? rows_before / 2 + tile / 2 * 16 + tile % 2 * (N / 2) : rows_before + tile * 16;

  // This part of K.
  constexpr int PARTS = K_GROUPS * CLUSTER;
  const int rounds = K / 64 / (STAGES * PARTS), before = rounds * split / SPLITS;
  const int blocks = (rounds * (split + 1) / SPLITS - before) * STAGES;
  const int begin = before * STAGES * PARTS + (rank * K_GROUPS + k_group) * blocks;
  char* const places = static_cast<char*>(shared) + k_group * PLACES_OF_PART;

  const X vectors(shared_address(shared) + COPIES + k_group * X::BARRIERS);
  if (lane == 0 && multiplies && tile == 0) vectors.start(PART_WARPS);
  __syncthreads();
  launch_dependents();
  float sums[TOKENS / 8][4] = {};
  float scale = 1.f;
  if (!multiplies) {
    wait_for_kernels_before();
    vectors.bring(x + begin * 64, tokens, K, blocks, places, feeder / K_GROUPS);
  } else {
    uint4* const ring = reinterpret_cast<uint4*>(static_cast<char*>(shared) + K_GROUPS * PLACES_OF_PART) +
                        warp * (STAGES * V * 32) + lane;
    const uint32_t ring_address = shared_address(ring);
    // Those of a warp without a tile begin at null: at 64 tokens no register is left that would say that it has none.
    const char* const source =
        has_tile ? lane_source<PACKED>(weight, first_row, K, lane) + vector_offset<PACKED>(begin, 0, K) : nullptr;
    auto load = [&](int stage, int block) {
      const char* const from = source + vector_offset<PACKED>(block, 0, K);
      if (block < blocks && (TILES == PART_WARPS || reinterpret_cast<uint64_t>(from) >> 32))
#pragma unroll
        for (int v = 0; v < V; v++)
          copy_async(ring_address + (stage * V + v) * 512, source + vector_offset<PACKED>(block, v, K));
      commit_copies();
    };
    if (!has_tile)
#pragma unroll
      for (int i = 0; i < STAGES * V; i++) ring[i * 32] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) load(stage, stage);
    if (PREFETCH > 0 && has_tile)
      prefetch_blocks<PACKED>(weight, first_row, K, begin + STAGES, begin + min(STAGES + PREFETCH, blocks), lane);
    Side side;
    if constexpr (PACKED)
      side.start(side_list(weight, N, K), row_table(weight, N, K) + first_row + lane, lane < 16 && has_tile, begin * 64);
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
      if constexpr (PACKED) side.put(a, (begin + block + 1) * 64, lane);
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
    // Exact, of powers of two; with splits no register is left that would keep it.
    if constexpr (PACKED) scale = SPLITS > 1 ? 1.f / side.inverse : side.scale;
  }
  const int block = block_again() / CLUSTER;
  write_results<TOKENS, ROWS, K_GROUPS, CLUSTER, THREADS, GATED, SPLITS>(
      sums, scale, multiplies && has_tile, k_group, tile, block / SPLITS * ROWS, tokens, N, bias_or_null, residual, y, shared,
      DenseRows{}, block % SPLITS);
}

}  // namespace vllm_compile

#endif
