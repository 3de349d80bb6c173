// Rotary embedding of q and k, and k and v into the paged KV cache: one thread block a token.
//
// A thread takes 8 elements of the first half of a head and their partners in the second half.
#ifndef VLLM_COMPILE_ROPE_CACHE
#define VLLM_COMPILE_ROPE_CACHE

#include "rope.cuh"

namespace vllm_compile {

// qkv [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM], cos, sin [tokens, HEAD_DIM], q [tokens, HEADS, HEAD_DIM];
// kv [blocks, KV_HEADS, block_size, 2 * HEAD_DIM] with strides in elements; slots [tokens], -1: not cached.
template <int HEADS, int KV_HEADS, int HEAD_DIM, int THREADS>
__device__ __forceinline__ void rope_cache(const void* qkv, const void* cos,
                                           const void* sin, void* kv,
                                           const int64_t* slots, void* q, int64_t block_size,
                                           int64_t block_stride, int64_t head_stride, int64_t token_stride) {
  constexpr int HALF = HEAD_DIM / 2 / VECTOR;  // vectors of half a head
  constexpr int ALL = HEADS + 2 * KV_HEADS;
  const size_t token = blockIdx.x;
  launch_dependents();
  const int64_t slot = slots[token];  // an argument of the whole program: no kernel before writes it
  const int64_t cached = slot < 0 ? 0 : slot / block_size * block_stride + slot % block_size * token_stride;
  wait_for_kernels_before();
  for (int item = threadIdx.x; item < ALL * HALF; item += THREADS) {
    const int head = item / HALF, part = item % HALF;
    uint4 low, high;
    load_halves<HEADS, KV_HEADS, HEAD_DIM>(low, high, qkv, cos, sin, token, head, part);
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
