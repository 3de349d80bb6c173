// Decode in one kernel between the projections: rotary embedding, the KV cache write, and attention over the cache.
//
// Queries are turned on their way into shared memory, once for all warps; beside them lie the newest token's key,
// turned, and its value: they go into the cache, and the warp that has their tile copies them there.  A row that another
// request of the launch fills, and that this one reads, is made from that one's token, in the same bits.
#ifndef VLLM_COMPILE_ROPE_ATTENTION
#define VLLM_COMPILE_ROPE_ATTENTION

#include "paged_attention.cuh"
#include "rope.cuh"

namespace vllm_compile {

// Tokens as the projection leaves them: qkv [tokens, (GROUP + 2) * KV_HEADS * HEAD_DIM], cos, sin [tokens, HEAD_DIM];
// slots [tokens] in kv, -1: not cached.
template <int HEAD_DIM, int GROUP, int KV_HEADS>
struct ProjectedTokens {
  static constexpr bool MAKES_ROWS = true;
  static constexpr int HALF = HEAD_DIM / 2 / VECTOR, HEADS = GROUP * KV_HEADS;
  static constexpr int ROW = 2 * HALF + 1, STRIDE = 4 * ROW;  // of a turned query in vectors and words: no bank twice
  const void *qkv, *cos, *sin;
  const int64_t* slots;
  void* kv;
  int block_size;
  int64_t block_stride, head_stride, token_stride;

  // A token's queries of a KV head to `to`, in shared memory; if `newest`, its key and value, too, and to the cache.
  template <int THREADS>
  __device__ __forceinline__ void turn(uint4* to, size_t token, int head, bool newest, int64_t row) const {
    __nv_bfloat16* const cached = static_cast<__nv_bfloat16*>(kv) + row;
    for (int i = threadIdx.x; i < (newest ? GROUP + 2 : GROUP) * HALF; i += THREADS) {
      const int at = i / HALF, part = i % HALF;
      uint4 low, high;
      load(low, high, token, at < GROUP ? head * GROUP + at : HEADS + (at - GROUP) * KV_HEADS + head, part);
      to[at * ROW + part] = low, to[at * ROW + HALF + part] = high;
      if (at >= GROUP) {
        store_vector(cached + (at - GROUP) * HEAD_DIM, part, low);
        store_vector(cached + (at - GROUP) * HEAD_DIM, part + HALF, high);
      }
    }
  }

  // 16 bytes of the newest token's key, then value.
  __device__ __forceinline__ uint4 made(const uint4* turned, int chunk) const {
    return turned[GROUP * ROW + chunk + (chunk >= 2 * HALF)];
  }

  // Two of the 16-byte pieces of a token's key, then value, to `to`, where piece i has place i ^ swizzle.
  __device__ __forceinline__ void make(uint4* to, size_t token, int head, int pair, int swizzle) const {
    const int value = pair / HALF, part = pair % HALF, at = value * 2 * HALF + part;
    uint4 low, high;
    load(low, high, token, HEADS + value * KV_HEADS + head, part);
    to[at ^ swizzle] = low, to[(at + HALF) ^ swizzle] = high;
  }

  // Keys and values of a KV head, of `count` tokens, to the cache.
  template <int THREADS>
  __device__ __forceinline__ void store(size_t token, int count, int head) const {
    for (int i = threadIdx.x; i < count * 2 * HALF; i += THREADS) {
      const size_t own = token + i / (2 * HALF);
      const int value = i / HALF % 2, part = i % HALF;
      const int64_t slot = slots[own];
      if (slot < 0) continue;
      uint4 low, high;
      load(low, high, own, HEADS + value * KV_HEADS + head, part);
      const int64_t at = slot / block_size * block_stride + slot % block_size * token_stride + head * head_stride;
      store_vector(static_cast<__nv_bfloat16*>(kv) + at + value * HEAD_DIM, part, low);
      store_vector(static_cast<__nv_bfloat16*>(kv) + at + value * HEAD_DIM, part + HALF, high);
    }
  }

  __device__ __forceinline__ void load(uint4& low, uint4& high, size_t token, int head, int part) const {
    load_halves<HEADS, KV_HEADS, HEAD_DIM>(low, high, qkv, cos, sin, token, head, part);
  }
};

// out [tokens, GROUP * KV_HEADS, HEAD_DIM]; a request's tokens have their slots where its block table says, or none.
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int STAGES, int SHORT_TILES, int WINDOW = 0,
          uint32_t SOFT_CAP = 0>
__device__ __forceinline__ void rope_attention(const void* qkv, const void* cos,
                                               const void* sin, void* kv,
                                               const int64_t* slots, const int* block_table,
                                               const int* seq_lens,
                                               const int* query_start_loc, void* out,
                                               float scale, int block_size, int table_width, int64_t block_stride,
                                               int64_t head_stride, int64_t token_stride, void* shared) {
  attend<HEAD_DIM, GROUP, KV_HEADS, WARPS, STAGES, SHORT_TILES, WINDOW, SOFT_CAP>(
      ProjectedTokens<HEAD_DIM, GROUP, KV_HEADS>{qkv, cos, sin, slots, kv, block_size, block_stride, head_stride,
                                                 token_stride},
      PagedCache{kv, block_table, seq_lens, block_size, table_width, block_stride, head_stride, token_stride},
      query_start_loc, out, scale, shared);
}

}  // namespace vllm_compile

#endif
