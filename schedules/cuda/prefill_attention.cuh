// Attention of prompts over a paged KV cache, on the tensor cores: what paged_attention.cuh does for single queries.
//
// A thread block takes consecutive queries of one request, for one KV head: each of them with each of the GROUP query
// heads is a row of a tile of 16 * WARPS rows, 16 to a warp.  All rows go through the cached tokens together, KEYS at a
// time, which are copied to shared memory a stage ahead (cp.async); sums stay in registers (FlashAttention-2, Dao 2023).
//
// Within a window (scores.cuh) the block starts where its first query's begins.  Tokens that none of its queries sees are
// not read: zeros stand for them.  Warps whose rows are nobody's only copy.
#ifndef VLLM_COMPILE_PREFILL_ATTENTION
#define VLLM_COMPILE_PREFILL_ATTENTION

#include "paged_attention.cuh"

namespace vllm_compile {

// The `tile`-th stretch of TOKENS queries of a request; request is -1 where there is none.
struct QueryTile {
  int request, tile;
};

// Stretch `number` of all requests'.  Called by whole warps.
template <int TOKENS>
__device__ __forceinline__ QueryTile find_queries(const int* query_start_loc, int requests, int number) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < requests; first += 32) {
    const int request = first + lane;
    int through = 0;  // stretches of this chunk's requests up to this one's
    if (request < requests) through = (query_start_loc[request + 1] - query_start_loc[request] + TOKENS - 1) / TOKENS;
    const int own = through;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(0xffffffff, through, step);
      if (lane >= step) through += left;
    }
    const uint32_t behind = __ballot_sync(0xffffffff, through > number);
    if (behind != 0) {
      const int at = __ffs(behind) - 1;
      return {first + at, number - __shfl_sync(0xffffffff, through - own, at)};
    }
    number -= __shfl_sync(0xffffffff, through, 31);
  }
  return {-1, 0};
}

// q, out [tokens, KV_HEADS * GROUP, HEAD_DIM]; the cache holds all tokens.  Block (stretch, KV head).  scale is that of
// the scores times log2(e).
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int KEYS, int WINDOW = 0, uint32_t SOFT_CAP = 0>
__device__ __forceinline__ void prefill_attention(const void* q, const void* kv,
                                                  const int* block_table, const int* seq_lens,
                                                  const int* query_start_loc, void* out,
                                                  float scale, int requests, int block_size, int table_width,
                                                  int64_t block_stride, int64_t head_stride, int64_t token_stride,
                                                  void* shared) {
  constexpr int HEADS = KV_HEADS * GROUP, THREADS = 32 * WARPS, ROWS = 16 * WARPS, TOKENS = ROWS / GROUP;
  constexpr int CHUNKS = HEAD_DIM / 4, STAGE = KEYS * CHUNKS;      // of 16 bytes: of a cached token, of a stage
  constexpr int Q_CHUNKS = HEAD_DIM / 8, Q_ROW = Q_CHUNKS + 1;     // odd: eight rows are in eight groups of banks
  constexpr int STEPS = HEAD_DIM / 16, SLICES = HEAD_DIM / 8, PAIRS = KEYS / 16;
  using Seen = Scores<WINDOW, SOFT_CAP>;
  static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= MOST_HEAD_DIM && TOKENS > 0 && PAIRS <= 32, "beyond this kernel");

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, head = blockIdx.y;
  uint4* const queries_at = static_cast<uint4*>(shared);
  const uint32_t queries_address = shared_address(queries_at), ring_address = queries_address + ROWS * Q_ROW * 16;

  launch_dependents();
  // Arguments of the whole program: no kernel before writes them.
  const QueryTile found = find_queries<TOKENS>(query_start_loc, requests, blockIdx.x);
  wait_for_kernels_before();
  if (found.request < 0) return;
  const int first_row = query_start_loc[found.request] + found.tile * TOKENS;
  const int left = query_start_loc[found.request + 1] - first_row, count = min(left, TOKENS);
  const int first_visible = seq_lens[found.request] - left + 1, visible = first_visible + count - 1;  // to first, last
  const int begin = Seen::first(first_visible), first_tile = begin / KEYS, tiles = (visible + KEYS - 1) / KEYS;
  const int* const table = block_table + (size_t)found.request * table_width;
  const __nv_bfloat16* const cache = static_cast<const __nv_bfloat16*>(kv) + head * head_stride;

  for (int i = threadIdx.x; i < ROWS * Q_CHUNKS; i += THREADS) {
    const int row = i / Q_CHUNKS, chunk = i % Q_CHUNKS, token = row / GROUP;
    const size_t at = ((size_t)(first_row + token) * HEADS + head * GROUP + row % GROUP) * Q_CHUNKS + chunk;
    queries_at[row * Q_ROW + chunk] = token < count ? load_vector(q, at) : make_uint4(0, 0, 0, 0);
  }

  const bool works = warp * 16 < count * GROUP;
  auto load = [&](int tile) {
    // Lane i knows where the tile's i-th 16 tokens lie.
    int block = 0, row = 0;
    const int own = tile * KEYS + lane * 16;
    if (lane < PAIRS && own < visible && own + 15 >= begin) block = table[own / block_size], row = own % block_size;
    const uint32_t to = ring_address + tile % 2 * (STAGE * 16);
#pragma unroll
    for (int i = 0; i < STAGE / THREADS; i++) {
      const int token = (i * THREADS + threadIdx.x) / CHUNKS, chunk = (i * THREADS + threadIdx.x) % CHUNKS;
      const int position = tile * KEYS + token;
      const int64_t at_block = __shfl_sync(0xffffffff, block, token / 16);
      const int at_row = __shfl_sync(0xffffffff, row, token / 16) + token % 16;
      copy_async_or_zero(to + (token * CHUNKS + (chunk ^ (token & 7))) * 16,
                         cache + at_block * block_stride + at_row * token_stride + chunk * 8,
                         position < visible && position >= begin);
    }
    commit_copies();
  };
  static_assert(STAGE % THREADS == 0, "threads copy the same number of chunks");

  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  float values[SLICES][4] = {};
  load(first_tile);
  for (int tile = first_tile; tile < tiles; tile++) {
    if (tile + 1 < tiles) {
      load(tile + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const uint32_t stage = ring_address + tile % 2 * (STAGE * 16);

    if (works) {
      // Scores: queries are A, 16 tokens are B, twice 8.
      float scores[KEYS / 8][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        uint32_t rows[4];
        load_matrices(rows, queries_address + ((warp * 16 + lane % 16) * Q_ROW + step * 2 + lane / 16) * 16);
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
          uint32_t k[4];
          load_matrices(k, stage + place<HEAD_DIM>(pair * 16 + lane / 16 * 8 + lane % 8, step * 2, lane / 8 % 2));
          mma(scores[pair * 2], rows, k[0], k[1]);
          mma(scores[pair * 2 + 1], rows, k[2], k[3]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int own = first_visible + (warp * 16 + g + half * 8) / GROUP;  // cached tokens up to the row's query
        const float before = largest[half];
        float most = before;
#pragma unroll
        for (int eight = 0; eight < KEYS / 8; eight++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int position = tile * KEYS + eight * 8 + 2 * t + i;
            float& score = scores[eight][half * 2 + i];
            score = position < own && Seen::reaches(position, own) ? Seen::of(score, scale) : -INFINITY;
            most = fmaxf(most, score);
          }
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
        largest[half] = most;
        const float base = most == -INFINITY ? 0.f : most;  // of a row that has seen nothing yet
        const float shrink = exp2f(before - base);
        float added = 0.f;
#pragma unroll
        for (int eight = 0; eight < KEYS / 8; eight++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float& score = scores[eight][half * 2 + i];
            score = exp2f(score - base);
            added += score;
          }
        sum[half] = sum[half] * shrink + added;
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
          values[slice][half * 2] *= shrink;
          values[slice][half * 2 + 1] *= shrink;
        }
      }
      // Probabilities are A as they lie; V, transposed on its way, is B.
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        const float(&low)[4] = scores[pair * 2];
        const float(&high)[4] = scores[pair * 2 + 1];
        const uint32_t p[4] = {word_of(low[0], low[1]), word_of(low[2], low[3]), word_of(high[0], high[1]),
                               word_of(high[2], high[3])};
#pragma unroll
        for (int slices = 0; slices < SLICES / 2; slices++) {
          uint32_t v[4];
          const int token = pair * 16 + lane / 8 % 2 * 8 + lane % 8;
          load_matrices_transposed(v, stage + place<HEAD_DIM>(token, CHUNKS / 2 + slices * 2, lane / 16));
          mma(values[slices * 2], p, v[0], v[1]);
          mma(values[slices * 2 + 1], p, v[2], v[3]);
        }
      }
    }
    __syncthreads();  // before the next tile but one takes this one's place
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 2);
    const int row = warp * 16 + g + half * 8, token = row / GROUP;
    if (token >= count) continue;
    uint32_t* const to = static_cast<uint32_t*>(out) +
                         ((size_t)(first_row + token) * HEADS + head * GROUP + row % GROUP) * (HEAD_DIM / 2);
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++)
      to[slice * 4 + t] = word_of(values[slice][half * 2] / sum[half], values[slice][half * 2 + 1] / sum[half]);
  }
}

}  // namespace vllm_compile

#endif
