// Attention of prompts over a paged KV cache, on the tensor cores: what paged_attention.cuh does for single queries.
//
// A thread block takes consecutive queries of one request, for one KV head: each of them with each of the GROUP query
// heads is a row, WARP_ROWS to a warp.  All rows go through the cached tokens together, a tile of KEYS at a time; sums
// stay in registers (FlashAttention-2, Dao 2023).  Tiles are copied to shared memory (cp.async) in halves, keys and
// values in turn, SLOTS - 1 halves ahead; threads meet once a half: then it is there, and the slot of the one before
// is free.
//
// Within a window (scores.cuh) the block starts where its first query's begins.  Tokens that none of its queries sees
// are not read: zeros stand for them.  A warp leaves out tiles that its rows see nothing of, and compares positions in
// those that they do not see whole: where the window starts and where the queries are.  Blocks with the last queries,
// which see most, start first.
#ifndef VLLM_COMPILE_PREFILL_ATTENTION
#define VLLM_COMPILE_PREFILL_ATTENTION

#include "scores.cuh"
#include "vectors.cuh"

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

// What probabilities are relative to follows a row's largest score only when that has risen by more, as an exponent of
// 2: sums are seldom multiplied then, and stay far from overflow (FlashAttention-4).
constexpr float RISE = 8.f;

// q, out [tokens, KV_HEADS * GROUP, HEAD_DIM]; the cache holds all tokens.  Blocks: KV heads, then stretches, the last
// first.  scale is that of the scores times log2(e), above 0.  HELD: queries are in registers.
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int WARP_ROWS, int KEYS, int SLOTS, bool HELD,
          int WINDOW = 0, uint32_t SOFT_CAP = 0>
__device__ __forceinline__ void prefill_attention(const void* q, const void* kv,
                                                  const int* block_table, const int* seq_lens,
                                                  const int* query_start_loc, void* out,
                                                  float scale, int requests, int block_size, int table_width,
                                                  int64_t block_stride, int64_t head_stride, int64_t token_stride,
                                                  void* shared) {
  constexpr int HEADS = KV_HEADS * GROUP, THREADS = 32 * WARPS, ROWS = WARP_ROWS * WARPS, TOKENS = ROWS / GROUP;
  constexpr int CHUNKS = HEAD_DIM / 8, ROW = CHUNKS + 1;  // of 16 bytes; odd: eight rows are in eight groups of banks
  constexpr int SLOT = KEYS * ROW * 16;                   // bytes
  constexpr int COLUMNS = CHUNKS % 8 ? 4 : 8, PASS = THREADS / COLUMNS;  // threads that copy a token; tokens at once
  constexpr int TALL = WARP_ROWS / 16, STEPS = HEAD_DIM / 16, SLICES = HEAD_DIM / 8, PAIRS = KEYS / 16;
  using Seen = Scores<WINDOW, SOFT_CAP>;
  static_assert(HEAD_DIM % 32 == 0 && TOKENS > 0 && PAIRS <= 32, "beyond this kernel");
  static_assert(WARP_ROWS % 16 == 0 && SLOTS >= 2, "a half is copied while another is read");
  static_assert(PASS % 16 == 0 && KEYS % PASS == 0 && ROWS % PASS == 0, "threads copy the same number of tokens");

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.x % KV_HEADS, number = (gridDim.x - 1 - blockIdx.x) / KV_HEADS;
  const uint32_t queries_address = shared_address(shared);

  launch_dependents();
  // Arguments of the whole program: no kernel before writes them.
  const QueryTile found = find_queries<TOKENS>(query_start_loc, requests, number);
  wait_for_kernels_before();
  if (found.request < 0) return;
  const int first_row = query_start_loc[found.request] + found.tile * TOKENS;
  const int left = query_start_loc[found.request + 1] - first_row, count = min(left, TOKENS);
  const int first_visible = seq_lens[found.request] - left + 1, visible = first_visible + count - 1;  // to first, last
  const int begin = Seen::first(first_visible), first_tile = begin / KEYS, tiles = (visible + KEYS - 1) / KEYS;
  const int* const table = block_table + (size_t)found.request * table_width;

  const int copied = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;  // this thread's row of a pass
  const uint32_t copied_address = queries_address + (copied * ROW + column) * 16;
  auto copy = [&](uint32_t to, const __nv_bfloat16* from, bool there) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += COLUMNS)
      copy_async_or_zero(copied_address + to + chunk * 16, from + chunk * 8, there);
  };
#pragma unroll
  for (int pass = 0; pass < ROWS; pass += PASS) {
    const int row = pass + copied, token = row / GROUP;
    const size_t at = ((size_t)(first_row + token) * HEADS + head * GROUP + row % GROUP) * HEAD_DIM + column * 8;
    copy(pass * ROW * 16, static_cast<const __nv_bfloat16*>(q) + (token < count ? at : 0), token < count);
  }

  // Lane i knows where the i-th 16 tokens lie of the tile that is copied next; it looks them up half a tile before.
  int block, block_row;
  auto look_up = [&](int tile) {
    const int first = tile * KEYS + lane * 16;
    block = block_row = 0;
    if (lane < PAIRS && first < visible && first + 15 >= begin)
      block = table[(unsigned)first / block_size], block_row = (unsigned)first % block_size;
  };
  const __nv_bfloat16* const cache =
      static_cast<const __nv_bfloat16*>(kv) + (head * head_stride + copied % 16 * token_stride + column * 8);
  auto load = [&](int half) {
    const int tile = half / 2, second = half % 2;  // the second are values
    if (tile < tiles) {
      const int64_t lies = block * block_stride + block_row * token_stride + second * HEAD_DIM;
      const uint32_t slot = ROWS * ROW * 16 + (unsigned)half % SLOTS * SLOT;
      const int before = begin - tile * KEYS - copied, end = visible - tile * KEYS - copied;
#pragma unroll
      for (int pass = 0; pass < KEYS; pass += PASS)
        copy(slot + pass * ROW * 16, cache + __shfl_sync(0xffffffff, lies, pass / 16 + (PASS > 16 ? copied / 16 : 0)),
             pass >= before && pass < end);
      if (second) look_up(tile + 1);
    }
    commit_copies();
  };
  // Returns where the half lies.
  auto arrive = [&](int half) {
    wait_copies<SLOTS - 2>();
    __syncthreads();
    load(half + SLOTS - 1);
    return queries_address + ROWS * ROW * 16 + (unsigned)half % SLOTS * SLOT;
  };
  look_up(first_tile);
#pragma unroll
  for (int ahead = 0; ahead < SLOTS - 1; ahead++) load(first_tile * 2 + ahead);

  // This lane's part of load_matrices: of 16 rows of queries or values, and of 16 keys.
  const uint32_t plain = (lane % 16 * ROW + lane / 16) * 16;
  const uint32_t paired = ((lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2) * 16;
  const uint32_t warp_address = queries_address + warp * WARP_ROWS * ROW * 16 + plain;
  auto load_queries = [&](uint32_t (&to)[TALL][4], int step) {
#pragma unroll
    for (int high = 0; high < TALL; high++)
      load_matrices(to[high], warp_address + (high * 16 * ROW + step * 2) * 16);
  };
  uint32_t queries[HELD ? STEPS : 1][TALL][4];
  if constexpr (HELD) {
    wait_copies<SLOTS - 2>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < STEPS; step++) load_queries(queries[step], step);
  }

  // Cached tokens up to the queries of the warp's first and last row.
  const bool works = warp * WARP_ROWS < count * GROUP;
  const int least = first_visible + warp * WARP_ROWS / GROUP;
  const int most = first_visible + (warp * WARP_ROWS + WARP_ROWS - 1) / GROUP;
  const float unit = SOFT_CAP == 0 ? scale : 1.f;  // of scores, in exponents of 2
  float base_of[TALL][2], sum[TALL][2] = {}, values[TALL][SLICES][4] = {};  // base: a score that it saw, see RISE
  // function(high, half) of this lane's rows, function(score, its token's place in the tile) of a row's scores.
  auto each_row = [](auto function) {
#pragma unroll
    for (int high = 0; high < TALL; high++)
#pragma unroll
      for (int half = 0; half < 2; half++) function(high, half);
  };
  each_row([&](int high, int half) { base_of[high][half] = -INFINITY; });
  float scores[TALL][KEYS / 8][4];
  auto each_score = [&](int high, int half, auto function) {
#pragma unroll
    for (int eight = 0; eight < KEYS / 8; eight++)
#pragma unroll
      for (int i = 0; i < 2; i++) function(scores[high][eight][half * 2 + i], eight * 8 + 2 * t + i);
  };

  for (int tile = first_tile; tile < tiles; tile++) {
    const int from = tile * KEYS, to = from + KEYS;
    const bool seen = works && from < most && Seen::reaches(to - 1, least);
    uint32_t p[TALL][PAIRS][4];
    const uint32_t keys_address = arrive(tile * 2) + paired;
    if (seen) {
      // Scores: queries are A, 16 tokens are B, twice 8.
      each_row([&](int high, int half) { each_score(high, half, [](float& score, int) { score = 0.f; }); });
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        uint32_t(&rows)[TALL][4] = queries[HELD ? step : 0];
        if constexpr (!HELD) load_queries(rows, step);
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
          uint32_t k[4];
          load_matrices(k, keys_address + (pair * 16 * ROW + step * 2) * 16);
#pragma unroll
          for (int high = 0; high < TALL; high++) {
            mma(scores[high][pair * 2], rows[high], k[0], k[1]);
            mma(scores[high][pair * 2 + 1], rows[high], k[2], k[3]);
          }
        }
      }
      if constexpr (SOFT_CAP != 0)
        each_row([&](int high, int half) {
          each_score(high, half, [&](float& score, int) { score = Seen::of(score, scale); });
        });
      if (to > least || !Seen::reaches(from, most))
        each_row([&](int high, int half) {
          const int own = first_visible + (warp * WARP_ROWS + high * 16 + g + half * 8) / GROUP;
          each_score(high, half, [&](float& score, int at) {
            if (from + at >= own || !Seen::reaches(from + at, own)) score = -INFINITY;
          });
        });
      float tops[TALL][2];
      bool rises = false;
      each_row([&](int high, int half) {
        float top = base_of[high][half];
        each_score(high, half, [&](float& score, int) { top = fmaxf(top, score); });
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        tops[high][half] = top;
        rises |= (base_of[high][half] - top) * unit < -RISE;
      });
      if (__any_sync(0xffffffff, rises))
        each_row([&](int high, int half) {
          const float by = (base_of[high][half] - tops[high][half]) * unit;
          if (!(by < -RISE)) return;
          const float shrink = power_of_two(by);
          base_of[high][half] = tops[high][half];
          sum[high][half] *= shrink;
#pragma unroll
          for (int slice = 0; slice < SLICES; slice++) {
            values[high][slice][half * 2] *= shrink;
            values[high][slice][half * 2 + 1] *= shrink;
          }
        });
      each_row([&](int high, int half) {
        const float chosen = base_of[high][half];
        const float base = chosen == -INFINITY ? 0.f : chosen * unit;  // of a row that has seen nothing yet
        float added = 0.f;
        each_score(high, half, [&](float& score, int) { added += score = power_of_two(score * unit - base); });
        sum[high][half] += added;
#pragma unroll
        for (int eight = 0; eight < KEYS / 8; eight++)
          p[high][eight / 2][eight % 2 * 2 + half] =
              word_of(scores[high][eight][half * 2], scores[high][eight][half * 2 + 1]);
      });
    }
    const uint32_t values_address = arrive(tile * 2 + 1) + plain;
    if (seen) {
      // Probabilities are A as they lie; V, transposed on its way, is B.
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
        for (int slices = 0; slices < SLICES / 2; slices++) {
          uint32_t v[4];
          load_matrices_transposed(v, values_address + (pair * 16 * ROW + slices * 2) * 16);
#pragma unroll
          for (int high = 0; high < TALL; high++) {
            mma(values[high][slices * 2], p[high][pair], v[0], v[1]);
            mma(values[high][slices * 2 + 1], p[high][pair], v[2], v[3]);
          }
        }
    }
  }

  each_row([&](int high, int half) {
    float total = sum[high][half];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    const int row = warp * WARP_ROWS + high * 16 + g + half * 8, token = row / GROUP;
    if (token >= count) return;
    const float share = __fdividef(1.f, total);
    uint32_t* const to = static_cast<uint32_t*>(out) +
                         ((size_t)(first_row + token) * HEADS + head * GROUP + row % GROUP) * (HEAD_DIM / 2);
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++)
      to[slice * 4 + t] =
          word_of(values[high][slice][half * 2] * share, values[high][slice][half * 2 + 1] * share);
  });
}

}  // namespace vllm_compile

#endif
