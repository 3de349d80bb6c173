// k and v into the paged KV cache, where no rotation goes with it: one thread block a token.
#ifndef VLLM_COMPILE_KV_CACHE_WRITE
#define VLLM_COMPILE_KV_CACHE_WRITE

#include "vectors.cuh"

namespace vllm_compile {

// k [tokens, KV_HEADS, KEY], v [tokens, KV_HEADS, VALUE]; kv [blocks, KV_HEADS, block_size, KEY + VALUE] with strides in
// elements; slots [tokens], -1: not cached.  VALUE may be 0, where the keys hold the values too.
template <int KV_HEADS, int KEY, int VALUE, int THREADS>
__device__ __forceinline__ void kv_cache_write(const void* k, const void* v,
                                               void* kv, const int64_t* slots,
                                               int64_t block_size, int64_t block_stride, int64_t head_stride,
                                               int64_t token_stride) {
  constexpr int KEYS = KEY / VECTOR, VALUES = VALUE / VECTOR, ALL = KEYS + VALUES;
  static_assert(KEY % VECTOR == 0 && VALUE % VECTOR == 0, "rows are copied 16 bytes at a time");
  const size_t token = blockIdx.x;
  launch_dependents();
  const int64_t slot = slots[token];  // an argument of the whole program: no kernel before writes it
  wait_for_kernels_before();
  if (slot < 0) return;
  __nv_bfloat16* row =
      static_cast<__nv_bfloat16*>(kv) + slot / block_size * block_stride + slot % block_size * token_stride;
  for (int item = threadIdx.x; item < KV_HEADS * ALL; item += THREADS) {
    const int head = item / ALL, part = item % ALL;
    const size_t of_token = token * KV_HEADS + head;
    const uint4 from = part < KEYS ? load_vector(k, of_token * KEYS + part)
                                   : load_vector(v, of_token * VALUES + part - KEYS);
    store_vector(row + head * head_stride, part, from);
  }
}

}  // namespace vllm_compile

#endif
