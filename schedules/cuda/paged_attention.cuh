// Attention over a paged KV cache, split along the cache ("flash decoding"), grouped queries on the tensor cores.
//
// A thread block takes one KV head of one request and a stretch of its cached tokens; its warps take tiles of 16
// tokens in turn.  Each warp copies its own tiles to shared memory some stages ahead (cp.async) and has its own online
// softmax, so that warps meet only once, at the end.  The GROUP query heads that share a KV head are the rows of the
// mma: each cached byte is read once for all of them.  Where a request is split, each block leaves its part in the
// workspace below, and the one that comes last adds them up, in a fixed order.
//
// Tiles that earlier steps have filled are requested before wait_for_kernels_before(), while q, k and v are computed.
// Where this step's keys and values are made here (rope_attention.cuh), a decode step requests all tiles so: the newest
// token goes from shared memory into its tile, and into the cache.
//
// Requests with equal prefixes share blocks, even a block that one of them only fills in this step: such tiles are
// requested again after the wait, or their rows made here, too.
//
// Within a window (scores.cuh) work starts at the tile that holds the first token that the query sees: what lies before
// is neither read nor looked up, and splits share what is left.
//
// Any batch is served: several queries of a request (prefill) are taken one after the other, which is right but slow
// (prefill_attention.cuh takes them together).
#ifndef VLLM_COMPILE_PAGED_ATTENTION
#define VLLM_COMPILE_PAGED_ATTENTION

#include "arrivals.cuh"
#include "scores.cuh"
#include "vectors.cuh"

namespace vllm_compile {

constexpr int TILE = 16;  // cached tokens of a tile: no block of the cache is smaller

// Parts of split requests: a launch has no more than PARTS blocks if it splits.  Kernels of one stream take turns.
constexpr int PARTS = 264, MOST_ROWS = 16, MOST_HEAD_DIM = 256;
__device__ float attention_parts[PARTS * MOST_ROWS * MOST_HEAD_DIM];
__device__ float2 attention_sums[PARTS * MOST_ROWS];  // {largest score, sum of exponentials} of a part
__device__ int attention_arrived[PARTS];              // blocks of a split request that are done; zero between launches

// The KV cache: kv [blocks, KV_HEADS, block_size, 2 * HEAD_DIM], strides in elements, and where requests lie in it.
struct PagedCache {
  const void* kv;
  const int* block_table;  // [requests, table_width]
  const int* seq_lens;     // [requests]
  int block_size, table_width;
  int64_t block_stride, head_stride, token_stride;
};

// Where bytes of a cached token's keys and values lie in a tile of shared memory, rows HEAD_DIM / 4 chunks of 16 bytes
// long: from its begin to chunk `even` + `odd` of a token; odd is 0 or 1.  Rows are 8 chunks apart modulo the banks:
// swizzled, so that a column of them is read at once.
template <int HEAD_DIM>
__device__ __forceinline__ int place(int token, int even, int odd) {
  constexpr int CHUNKS = HEAD_DIM / 4;
  if constexpr (HEAD_DIM <= 192) return (token * CHUNKS + ((even + odd) ^ (token & 7))) * 16;
  // What is above eight chunks is known when compiled: instructions add it, so that registers hold four places, not all.
  return (token * CHUNKS + (even % 8 ^ odd ^ (token & 7))) * 16 + even / 8 * 128;
}

// Tokens whose queries are computed and whose keys and values are cached: q [tokens, KV_HEADS * GROUP, HEAD_DIM].
template <int HEAD_DIM, int GROUP, int KV_HEADS>
struct CachedTokens {
  static constexpr bool MAKES_ROWS = false;    // of the cache
  static constexpr int STRIDE = HEAD_DIM / 2;  // words from a query to the next
  const uint32_t* q;

  __device__ __forceinline__ const uint32_t* queries(size_t token, int head) const {
    return q + (token * KV_HEADS + head) * GROUP * STRIDE;
  }
};

// out [tokens, KV_HEADS * GROUP, HEAD_DIM].  Block (split, KV head, request); a split's stretch is not shorter than
// SHORT_TILES.  scale is that of the scores times log2(e).
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int STAGES, int SHORT_TILES, int WINDOW, uint32_t SOFT_CAP,
          class Tokens>
__device__ __forceinline__ void attend(const Tokens& tokens, const PagedCache& paged,
                                       const int* query_start_loc, void* out, float scale,
                                       void* shared) {
  constexpr int HEADS = KV_HEADS * GROUP, THREADS = 32 * WARPS;
  constexpr int CHUNKS = HEAD_DIM / 4;                     // 16 bytes each, of a token's K and V
  constexpr int STAGE = TILE * CHUNKS;                     // chunks of a tile
  constexpr int STEPS = HEAD_DIM / 16, SLICES = HEAD_DIM / 8;
  using Seen = Scores<WINDOW, SOFT_CAP>;
  constexpr bool TALL = GROUP > 8;                         // rows 8 to 15 of the mma hold queries
  static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= MOST_HEAD_DIM && GROUP <= MOST_ROWS, "beyond what this kernel does");
  static_assert(STAGES * STAGE * 16 >= (GROUP * HEAD_DIM + 2 * GROUP) * 4, "sums of a warp fit where its stages were");

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = blockIdx.x, splits = gridDim.x, head = blockIdx.y, request = blockIdx.z;
  // Arguments of the whole program: no kernel before writes them.
  const int first_row = query_start_loc[request], queries = query_start_loc[request + 1] - first_row;
  const int length = queries > 0 ? paged.seq_lens[request] : 0;
  const int* const table = paged.block_table + (size_t)request * paged.table_width;
  const __nv_bfloat16* const cache = static_cast<const __nv_bfloat16*>(paged.kv) + head * paged.head_stride;
  uint4* const ring = static_cast<uint4*>(shared) + warp * STAGES * STAGE;
  const uint32_t ring_address = shared_address(ring);
  uint4* const turned = static_cast<uint4*>(shared) + WARPS * STAGES * STAGE;  // queries, the newest key and value
  bool waited = false;

  // Positions from `begin` on that another request fills in this step, that lie before this one's new tokens and that the
  // first of those sees; none if their blocks are not shared.  Its token of position p is `token` + p.
  struct Filled {
    int begin, end, token;
  };
  auto filled_by = [&](int other) {
    const int first = query_start_loc[other], count = other == request ? 0 : query_start_loc[other + 1] - first;
    const int end = count > 0 ? paged.seq_lens[other] : 0, begin = end - count;
    Filled filled{begin, min(end, length - queries), first - begin};
    if constexpr (WINDOW > 0) filled.begin = max(begin, Seen::first(length - queries + 1));
    return filled;
  };
  auto shares_block = [&](int other, int index) {
    return table[index] == paged.block_table[(size_t)other * paged.table_width + index];
  };
  bool shares = false;  // rows that others fill

  launch_dependents();
  bool newest_is_made = false;  // here: it is not read from the cache
  if constexpr (Tokens::MAKES_ROWS) {
    newest_is_made = queries == 1 && tokens.slots[first_row] >= 0;
    if (queries > 1 && split == 0) {
      wait_for_kernels_before(), waited = true;
      tokens.template store<THREADS>(first_row, queries, head);
      __syncthreads();
    }
  }
  for (int query = 0; query < queries && length > 0; query++) {
    const int visible = length - queries + 1 + query;  // cached tokens up to the query's own
    const int before = Seen::first(visible) / TILE;    // tiles that it sees nothing of
    const int tiles = (visible + TILE - 1) / TILE, seen = tiles - before;
    int stretch = seen;
    if (queries == 1) stretch = max((seen + splits - 1) / splits, SHORT_TILES);
    stretch = (stretch + WARPS - 1) / WARPS * WARPS;
    const int parts = (seen + stretch - 1) / stretch;
    if (split >= parts) break;
    const int begin = split * stretch + before + warp, end = min(split * stretch + before + stretch, tiles);
    const int fresh = (length - queries) / TILE;  // from this tile on, tokens are of this very step

    // Lane i knows where tile i of the coming 32 of this warp lies.
    int block = 0, row = 0;
    auto load = [&](int number) {
      const int tile = begin + number * WARPS;
      if (number % 32 == 0) {
        const int own = (tile + lane * WARPS) * TILE;
        if (own < visible) block = table[own / paged.block_size], row = own % paged.block_size;
      }
      const int at_block = __shfl_sync(0xffffffff, block, number % 32);
      const int at_row = __shfl_sync(0xffffffff, row, number % 32);
      if (tile < end) {
        const __nv_bfloat16* const from = cache + at_block * paged.block_stride + at_row * paged.token_stride;
        const uint32_t to = ring_address + number % STAGES * (STAGE * 16);
#pragma unroll
        for (int i = 0; i < STAGE / 32; i++) {
          const int token = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
          copy_async_or_zero(to + (token * CHUNKS + (chunk ^ (token & 7))) * 16,
                             from + token * paged.token_stride + chunk * 8,
                             tile * TILE + token < visible - newest_is_made &&
                                 Seen::reaches(tile * TILE + token, visible));
        }
      }
      commit_copies();
    };
#pragma unroll
    for (int number = 0; number < STAGES - 1; number++) {
      const int tile = begin + number * WARPS;
      if (!waited && !newest_is_made && tile < end && tile >= fresh) wait_for_kernels_before(), waited = true;
      load(number);
    }
    if (query == 0) {
      bool found = false;
      for (int other = threadIdx.x; other < gridDim.z; other += THREADS) {
        const Filled filled = filled_by(other);
        for (int position = filled.begin; position < filled.end && !found; position += paged.block_size)
          found = shares_block(other, position / paged.block_size);
      }
      shares = __syncthreads_or(found);
    }
    if (!waited) wait_for_kernels_before(), waited = true;
    if constexpr (!Tokens::MAKES_ROWS) {
      if (shares && query == 0) {  // now they are filled
        wait_copies<0>();
        __syncwarp();
        for (int number = 0; number < STAGES - 1; number++) load(number);
      }
    }

    // The block that has the last tile makes the newest token's row; the warp that has it puts it in.
    const bool newest_is_ours = newest_is_made && end == tiles;
    const uint32_t* q_rows;
    if constexpr (Tokens::MAKES_ROWS) {
      const int64_t block = table[(visible - 1) / paged.block_size], at = (visible - 1) % paged.block_size;
      const int64_t row = head * paged.head_stride + block * paged.block_stride + at * paged.token_stride;
      tokens.template turn<THREADS>(turned, first_row + query, head, newest_is_ours, row);
      __syncthreads();
      q_rows = reinterpret_cast<const uint32_t*>(turned);
    } else {
      q_rows = tokens.queries(first_row + query, head);
    }
    uint32_t q_words[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        // Rows of the mma beyond the group's are nobody's: zero, or where all take registers, other queries again.
        const int at = TALL ? (g + i % 2 * 8) % GROUP : g + i % 2 * 8;
        q_words[step][i] = at < GROUP ? q_rows[at * Tokens::STRIDE + step * 8 + i / 2 * 4 + t] : 0;
      }

    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    float values[SLICES][4] = {};
    for (int number = 0; begin + number * WARPS < end; number++) {
      const int tile = begin + number * WARPS;
      wait_copies<STAGES - 2>();
      __syncwarp();
      load(number + STAGES - 1);
      if constexpr (Tokens::MAKES_ROWS) {
        for (int others = 0; shares && others < gridDim.z; others += 32) {
          const int other = others + lane, index = tile * TILE / paged.block_size;
          Filled filled{0, 0, 0};
          if (other < gridDim.z) filled = filled_by(other);
          filled.begin = max(filled.begin, tile * TILE), filled.end = min(filled.end, tile * TILE + TILE);
          const bool fills = filled.begin < filled.end && shares_block(other, index);
          for (uint32_t rest = __ballot_sync(0xffffffff, fills); rest != 0; rest &= rest - 1) {
            const int from = __ffs(rest) - 1, token = __shfl_sync(0xffffffff, filled.token, from);
            const int first = __shfl_sync(0xffffffff, filled.begin, from);
            const int last = __shfl_sync(0xffffffff, filled.end, from);
            for (int position = first; position < last; position++) {
              const int row = position - tile * TILE;
              uint4* const to = ring + number % STAGES * STAGE + row * CHUNKS;
              for (int half = lane; half < CHUNKS / 2; half += 32) tokens.make(to, token + position, head, half, row & 7);
            }
          }
        }
        if (newest_is_ours && tile == end - 1) {
          const int token = (visible - 1) % TILE;
          uint4* const to = ring + number % STAGES * STAGE + token * CHUNKS;
          for (int chunk = lane; chunk < CHUNKS; chunk += 32) to[chunk ^ (token & 7)] = tokens.made(turned, chunk);
        }
        if (shares || (newest_is_ours && tile == end - 1)) __syncwarp();
      }
      const uint32_t stage = ring_address + number % STAGES * (STAGE * 16);

      // Scores: queries are A, 16 tokens are B, twice 8.
      float scores[2][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        uint32_t k[4];
        load_matrices(k, stage + place<HEAD_DIM>(lane / 16 * 8 + lane % 8, step * 2, lane / 8 % 2));
        mma(scores[0], q_words[step], k[0], k[1]);
        mma(scores[1], q_words[step], k[2], k[3]);
      }
      float before[2];
#pragma unroll
      for (int half = 0; half < (TALL ? 2 : 1); half++) {
        before[half] = largest[half];
        float most = -INFINITY;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int token = tile * TILE + i / 2 * 8 + 2 * t + i % 2;
          float& score = scores[i / 2][half * 2 + i % 2];
          score = token < visible && Seen::reaches(token, visible) ? Seen::of(score, scale) : -INFINITY;
          most = fmaxf(most, score);
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
        largest[half] = fmaxf(largest[half], most);
        const float shrink = exp2f(before[half] - largest[half]);
        float added = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float& score = scores[i / 2][half * 2 + i % 2];
          score = exp2f(score - largest[half]);
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
      uint32_t p[4] = {word_of(scores[0][0], scores[0][1]), 0, word_of(scores[1][0], scores[1][1]), 0};
      if constexpr (TALL) p[1] = word_of(scores[0][2], scores[0][3]), p[3] = word_of(scores[1][2], scores[1][3]);
#pragma unroll
      for (int pair = 0; pair < SLICES / 2; pair++) {
        uint32_t v[4];
        load_matrices_transposed(v, stage + place<HEAD_DIM>(lane / 8 % 2 * 8 + lane % 8, CHUNKS / 2 + pair * 2, lane / 16));
        mma(values[pair * 2], p, v[0], v[1]);
        mma(values[pair * 2 + 1], p, v[2], v[3]);
      }
    }
    wait_copies<0>();

    // Warps meet: [GROUP][HEAD_DIM] values, then {largest, sum} of each row, where the warp's stages were.
    constexpr int OWN = STAGES * STAGE * 4;  // floats of a warp
    float* const all = static_cast<float*>(shared);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < (TALL ? 2 : 1); half++) {
      sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 2);
      const int at = g + half * 8;
      if (at < GROUP) {
        float* const to = all + warp * OWN + at * HEAD_DIM;
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
          to[slice * 8 + 2 * t] = values[slice][half * 2];
          to[slice * 8 + 2 * t + 1] = values[slice][half * 2 + 1];
        }
        float* const ends = all + warp * OWN + GROUP * HEAD_DIM + at * 2;
        if (t == 0) ends[0] = largest[half], ends[1] = sum[half];
      }
    }
    __syncthreads();
    const int item = request * KV_HEADS + head;  // of split requests there are few: it counts parts then
    __nv_bfloat16* const result = static_cast<__nv_bfloat16*>(out) +
                                  ((size_t)(first_row + query) * HEADS + head * GROUP) * HEAD_DIM;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
      const int at = i / HEAD_DIM;
      float most = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) most = fmaxf(most, all[w * OWN + GROUP * HEAD_DIM + at * 2]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float* const ends = all + w * OWN + GROUP * HEAD_DIM + at * 2;
        const float weight = exp2f(ends[0] - most);
        total += weight * ends[1];
        value += weight * all[w * OWN + i];
      }
      if (parts == 1) {
        result[i] = __float2bfloat16_rn(value / total);
      } else {
        const int part = item * splits + split;
        attention_parts[part * (GROUP * HEAD_DIM) + i] = value;
        if (i % HEAD_DIM == 0) attention_sums[part * GROUP + at] = make_float2(most, total);
      }
    }
    if (parts > 1 && last_to_arrive(attention_arrived + item, parts)) {
      for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const float2* const sums = attention_sums + item * splits * GROUP + i / HEAD_DIM;
        float most = -INFINITY, total = 0.f, value = 0.f;
        for (int part = 0; part < parts; part++) most = fmaxf(most, __ldcg(sums + part * GROUP).x);
        for (int part = 0; part < parts; part++) {
          const float2 ends = __ldcg(sums + part * GROUP);
          const float weight = exp2f(ends.x - most);
          total += weight * ends.y;
          value += weight * __ldcg(attention_parts + (item * splits + part) * (GROUP * HEAD_DIM) + i);
        }
        result[i] = __float2bfloat16_rn(value / total);
      }
    }
    __syncthreads();  // before the next query's tiles take the place of the sums
  }
  if (!waited) wait_for_kernels_before();
}

// q, out [tokens, KV_HEADS * GROUP, HEAD_DIM]; the cache holds all tokens.
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int STAGES, int SHORT_TILES, int WINDOW = 0,
          uint32_t SOFT_CAP = 0>
__device__ __forceinline__ void paged_attention(const void* q, const void* kv,
                                                const int* block_table, const int* seq_lens,
                                                const int* query_start_loc, void* out,
                                                float scale, int block_size, int table_width, int64_t block_stride,
                                                int64_t head_stride, int64_t token_stride, void* shared) {
  attend<HEAD_DIM, GROUP, KV_HEADS, WARPS, STAGES, SHORT_TILES, WINDOW, SOFT_CAP>(
      CachedTokens<HEAD_DIM, GROUP, KV_HEADS>{static_cast<const uint32_t*>(q)},
      PagedCache{kv, block_table, seq_lens, block_size, table_width, block_stride, head_stride, token_stride},
      query_start_loc, out, scale, shared);
}

}  // namespace vllm_compile

#endif
