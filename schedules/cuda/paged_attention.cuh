// Attention over a paged KV cache, split along the cache ("flash decoding"), grouped queries on the tensor cores.
//
// A thread block takes one KV head of one request, or a part of its cached tokens, and then another if there are more of
// them than blocks (attention_pieces.cuh); its warps take tiles of 16 tokens in turn.  Each warp copies its own tiles to
// shared memory some stages ahead (cp.async) and has its own online softmax, so that warps meet only once, at the end.  A
// tile's tokens are the rows of the mma, the GROUP query heads that share a KV head its columns, eight a product: each
// cached byte is read once for all of them.  What warps and blocks have found is added up in attention_parts.cuh.
//
// Tiles that earlier steps have filled are requested before wait_for_kernels_before(), while q, k and v are computed.
// Where this step's keys and values are made here (rope_attention.cuh), a decode step requests all tiles so: the newest
// token goes from shared memory into its tile, and into the cache.
//
// Requests with equal prefixes share blocks, even a block that one of them only fills in this step: such tiles are
// requested again after the wait, or their rows made here, too.
//
// Within a window (scores.cuh) work starts at the tile that holds the first token that the query sees: what lies before
// is neither read nor looked up, and parts share what is left.
//
// Any batch is served: several queries of a request (prefill) are taken one after the other, which is right but slow
// (prefill_attention.cuh takes them together).
#ifndef VLLM_COMPILE_PAGED_ATTENTION
#define VLLM_COMPILE_PAGED_ATTENTION

#include "attention_parts.cuh"
#include "vectors.cuh"

namespace vllm_compile {

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

// A piece of a request's KV head, to out [tokens, KV_HEADS * GROUP, HEAD_DIM].  scale is that of the scores times
// log2(e); `waited` says whether this block has waited for the kernels before.
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int STAGES, class Seen, class Tokens>
__device__ __forceinline__ void attend_piece(const Piece& piece, const Tokens& tokens, const PagedCache& paged,
                                             const int* query_start_loc, void* out, float scale, void* shared,
                                             bool& waited) {
  constexpr int HEADS = KV_HEADS * GROUP, THREADS = 32 * WARPS;
  constexpr int CHUNKS = HEAD_DIM / 4;                     // 16 bytes each, of a token's K and V
  constexpr int STAGE = TILE * CHUNKS;                     // chunks of a tile
  constexpr int STEPS = HEAD_DIM / 16;                     // columns of keys, and of values, in pieces of an mma
  constexpr int EIGHTS = (GROUP + 7) / 8;                  // of queries
  static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= MOST_HEAD_DIM && GROUP <= MOST_GROUP, "beyond what this kernel does");

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, request = piece.request;
  // Arguments of the whole program: no kernel before writes them.
  const int first_row = query_start_loc[request], queries = query_start_loc[request + 1] - first_row;
  const int length = queries > 0 ? paged.seq_lens[request] : 0;
  const int* const table = paged.block_table + (size_t)request * paged.table_width;
  const __nv_bfloat16* const cache = static_cast<const __nv_bfloat16*>(paged.kv) + head * paged.head_stride;
  uint4* const ring = static_cast<uint4*>(shared) + warp * STAGES * STAGE;
  const uint32_t ring_address = shared_address(ring);
  uint4* const turned = static_cast<uint4*>(shared) + WARPS * STAGES * STAGE;  // queries, the newest key and value

  // Positions from `begin` on that another request fills in this step, that lie before this one's new tokens and that the
  // first of those sees; none if their blocks are not shared.  Its token of position p is `token` + p.
  struct Filled {
    int begin, end, token;
  };
  auto filled_by = [&](int other) {
    const int first = query_start_loc[other], count = other == request ? 0 : query_start_loc[other + 1] - first;
    const int end = count > 0 ? paged.seq_lens[other] : 0, begin = end - count;
    Filled filled{begin, min(end, length - queries), first - begin};
    filled.begin = max(begin, Seen::first(length - queries + 1));
    return filled;
  };
  auto shares_block = [&](int other, int index) {
    return table[index] == paged.block_table[(size_t)other * paged.table_width + index];
  };
  bool shares = false;  // rows that others fill

  bool newest_is_made = false;  // here: it is not read from the cache
  if constexpr (Tokens::MAKES_ROWS) {
    newest_is_made = queries == 1 && tokens.slots[first_row] >= 0;
    if (queries > 1) {
      if (!waited) wait_for_kernels_before(), waited = true;
      tokens.template store<THREADS>(first_row, queries, head);
      __syncthreads();
    }
  }
  for (int query = 0; query < queries && length > 0; query++) {
    const int visible = length - queries + 1 + query;  // cached tokens up to the query's own
    const int before = Seen::first(visible) / TILE;    // tiles that it sees nothing of
    const int tiles = (visible + TILE - 1) / TILE, parts = piece.parts;
    const int2 own = parts == 1 ? make_int2(0, tiles - before) : piece.tiles(tiles - before);
    const int begin = before + own.x + warp, end = before + own.y;
    const int fresh = (length - queries) / TILE;  // from this tile on, tokens are of this very step

    // Lane i knows where tile i of the coming 32 of this warp lies.
    int block = 0, row = 0;
    auto load = [&](int number) {
      const int tile = begin + number * WARPS;
      if (number % 32 == 0) {
        const int token = (tile + lane * WARPS) * TILE;
        if (token < visible) block = table[token / paged.block_size], row = token % paged.block_size;
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
    bool found = false;  // by this thread; who makes rows meets the others once they are made
    if (query == 0) {
      bool more = false;
      for (int first = threadIdx.x; first < gridDim.z; first += 2 * THREADS) {
#pragma unroll  // loads for two requests are under way at once
        for (int i = 0; i < 2; i++) {
          const int other = min(first + i * THREADS, (int)gridDim.z - 1);
          const Filled filled = filled_by(other);
          const int index = filled.begin / paged.block_size;
          if (filled.begin < filled.end) found |= shares_block(other, index);
          more |= filled.end > (index + 1) * paged.block_size;
        }
      }
      for (int other = threadIdx.x; more && other < gridDim.z; other += THREADS) {
        const Filled filled = filled_by(other);
        for (int index = filled.begin / paged.block_size + 1; index * paged.block_size < filled.end; index++)
          found |= shares_block(other, index);
      }
      if constexpr (!Tokens::MAKES_ROWS) shares = __syncthreads_or(found);
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
      found = __syncthreads_or(found);
      if (query == 0) shares = found;
      q_rows = reinterpret_cast<const uint32_t*>(turned);
    } else {
      q_rows = tokens.queries(first_row + query, head);
    }
    uint32_t q_words[EIGHTS][STEPS][2];
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
      for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          // Columns of the mma beyond the group's are nobody's.
          const int at = eight * 8 + g;
          q_words[eight][step][i] = at < GROUP ? q_rows[at * Tokens::STRIDE + step * 8 + i * 4 + t] : 0;
        }

    // Of queries 2 * t and 2 * t + 1 of each eight.
    float largest[EIGHTS][2], sum[EIGHTS][2] = {}, values[EIGHTS][STEPS][4] = {};
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++) largest[eight][0] = largest[eight][1] = -INFINITY;
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

      // Scores: 16 tokens are A, queries are B.
      float scores[EIGHTS][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        uint32_t k[4];
        load_matrices(k, stage + place<HEAD_DIM>(lane % 16, step * 2, lane / 16));
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++) mma(scores[eight], k, q_words[eight][step][0], q_words[eight][step][1]);
      }
      uint32_t p[EIGHTS][2];
#pragma unroll
      for (int eight = 0; eight < EIGHTS; eight++) {
#pragma unroll
        for (int column = 0; column < 2; column++) {
          float most = -INFINITY;
#pragma unroll
          for (int row = 0; row < 2; row++) {
            const int token = tile * TILE + row * 8 + g;
            float& score = scores[eight][row * 2 + column];
            score = token < visible && Seen::reaches(token, visible) ? Seen::of(score, scale) : -INFINITY;
            most = fmaxf(most, score);
          }
#pragma unroll
          for (int lanes = 4; lanes < 32; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
          const float before = largest[eight][column];
          largest[eight][column] = fmaxf(before, most);
          const float shrink = power_of_two(before - largest[eight][column]);
          float added = 0.f;
#pragma unroll
          for (int row = 0; row < 2; row++) {
            float& score = scores[eight][row * 2 + column];
            score = power_of_two(score - largest[eight][column]);
            added += score;
          }
          sum[eight][column] = sum[eight][column] * shrink + added;
#pragma unroll
          for (int step = 0; step < STEPS; step++) {
            values[eight][step][column] *= shrink;
            values[eight][step][2 + column] *= shrink;
          }
        }
        // Probabilities lie as results do, two queries a word; as B they have two tokens in one.
#pragma unroll
        for (int row = 0; row < 2; row++)
          p[eight][row] = transposed_matrix(word_of(scores[eight][row * 2], scores[eight][row * 2 + 1]));
      }
      // Values: V, transposed on its way, is A.
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        uint32_t v[4];
        load_matrices_transposed(v, stage + place<HEAD_DIM>(lane / 16 * 8 + lane % 8, CHUNKS / 2 + step * 2, lane / 8 % 2));
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++) mma(values[eight][step], v, p[eight][0], p[eight][1]);
      }
    }
    wait_copies<0>();

    __nv_bfloat16* const result = static_cast<__nv_bfloat16*>(out) +
                                  ((size_t)(first_row + query) * HEADS + head * GROUP) * HEAD_DIM;
    write_piece<HEAD_DIM, GROUP, KV_HEADS, WARPS, STAGES * STAGE * 4>(piece, largest, sum, values, result, shared);
    __syncthreads();  // before the next query's tiles take the place of the sums
  }
}

// All requests' pieces of KV head blockIdx.y, by the blocks of the other axes of the grid (attention_pieces.cuh).
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int STAGES, int SHORT_TILES, int WINDOW, uint32_t SOFT_CAP,
          class Tokens>
__device__ __forceinline__ void attend(const Tokens& tokens, const PagedCache& paged, const int* query_start_loc,
                                       void* out, float scale, void* shared) {
  using Seen = Scores<WINDOW, SOFT_CAP>;
  launch_dependents();
  bool waited = false;
  const Pieces<Seen, KV_HEADS, SHORT_TILES> pieces(query_start_loc, paged.seq_lens);
  const int blocks = gridDim.x * gridDim.z;
  int index = blockIdx.z * gridDim.x + blockIdx.x;
  while (index < pieces.size()) {
    attend_piece<HEAD_DIM, GROUP, KV_HEADS, WARPS, STAGES, Seen>(pieces[index], tokens, paged, query_start_loc, out,
                                                                 scale, shared, waited);
    if (pieces.size() <= blocks) break;
    if (!waited) wait_for_kernels_before(), waited = true;
    index = blocks + next_taken(attention_taken + blockIdx.y, pieces.size(), static_cast<int*>(shared));
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
