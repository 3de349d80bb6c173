// Rotary embedding of q and k, and k and v into the paged KV cache: one thread block a token.
//
// A thread takes 8 elements of the first half of a head and their partners in the second half.  Each product is
// rounded to bf16 before the sum, as in Hugging Face.
#ifndef VLLM_COMPILE_ROPE_CACHE
#define VLLM_COMPILE_ROPE_CACHE

#include "vectors.cuh"

namespace vllm_compile {

// qkv [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM], cos, sin [tokens, HEAD_DIM], q [tokens, HEADS, HEAD_DIM];
// kv [blocks, KV_HEADS, block_size, 2 * HEAD_DIM] with strides in elements; slots [tokens], -1: not cached.
template <int HEADS, int KV_HEADS, int HEAD_DIM, int THREADS>
__device__ __forceinline__ void rope_cache(const void* __restrict__ qkv, const void* __restrict__ cos,
                                           const void* __restrict__ sin, void* __restrict__ kv,
                                           const int64_t* __restrict__ slots, void* __restrict__ q, int64_t block_size,
                                           int64_t block_stride, int64_t head_stride, int64_t token_stride) {
  constexpr int HALF = HEAD_DIM / 2 / VECTOR;  // vectors of half a head
  constexpr int ALL = HEADS + 2 * KV_HEADS;
  static_assert(HEAD_DIM % (2 * VECTOR) == 0, "half heads are read 16 bytes at a time");
  const size_t token = blockIdx.x;
  launch_dependents();
  const int64_t slot = slots[token];  // an argument of the whole program: no kernel before writes it
  const int64_t cached = slot < 0 ? 0 : slot / block_size * block_stride + slot % block_size * token_stride;
  wait_for_kernels_before();
  for (int item = threadIdx.x; item < ALL * HALF; item += THREADS) {
    const int head = item / HALF, part = item % HALF;
    const size_t at = (token * ALL + head) * 2 * HALF + part;
    uint4 low = load_vector(qkv, at), high = load_vector(qkv, at + HALF);
    if (head < HEADS + KV_HEADS) {
      float first[VECTOR], second[VECTOR], factor[VECTOR], turned[VECTOR];
      unpack_vector(first, low);
      unpack_vector(second, high);
      const size_t angle = token * 2 * HALF + part;
      auto rotate = [&](const float(&own)[VECTOR], const float(&other)[VECTOR], float sign, size_t angle_at) {
        unpack_vector(turned, load_vector(cos, angle_at));
        unpack_vector(factor, load_vector(sin, angle_at));
#pragma unroll
        for (int j = 0; j < VECTOR; j++) turned[j] = rounded(own[j] * turned[j]) + sign * rounded(other[j] * factor[j]);
        return pack_vector(turned);
      };
      low = rotate(first, second, -1.f, angle);
      high = rotate(second, first, 1.f, angle + HALF);
    }
    if (head < HEADS) {
      const size_t to = (token * HEADS + head) * 2 * HALF + part;
      store_vector(q, to, low);
      store_vector(q, to + HALF, high);
    } else if (slot >= 0) {
      const int values = head >= HEADS + KV_HEADS;
      const int64_t kv_head = head - HEADS - values * KV_HEADS;
      __nv_bfloat16* to = static_cast<__nv_bfloat16*>(kv) + cached + kv_head * head_stride + values * HEAD_DIM;
      store_vector(to, part, low);
      store_vector(to, part + HALF, high);
    }
  }
}

}  // namespace vllm_compile

#endif
