// Kernels that move or scale rows, 16 bytes a thread: table lookup, and the gate of an MLP.
#ifndef VLLM_COMPILE_ELEMENTWISE
#define VLLM_COMPILE_ELEMENTWISE

#include "vectors.cuh"

namespace vllm_compile {

// y [tokens, 16 * VECTORS bytes] = rows `ids` of table; block t does row t.
template <int VECTORS, int THREADS, typename Id>
__device__ __forceinline__ void embedding(const Id* ids, const void* table,
                                          void* y) {
  launch_dependents();
  wait_for_kernels_before();
  const size_t from = (size_t)ids[blockIdx.x] * VECTORS, to = (size_t)blockIdx.x * VECTORS;
  for (int i = threadIdx.x; i < VECTORS; i += THREADS) store_vector(y, to + i, load_vector(table, from + i));
}

// y [tokens, WIDTH] = silu(x[:, :WIDTH]) * x[:, WIDTH:]; silu is rounded before it multiplies.  The blocks of a row are
// neighbours, so that those that run together read neighbouring memory.
template <int WIDTH, int THREADS>
__device__ __forceinline__ void silu_mul(const void* x, void* y) {
  constexpr int VECTORS = WIDTH / VECTOR, BLOCKS = (VECTORS + THREADS - 1) / THREADS;  // of a row
  static_assert(WIDTH % VECTOR == 0, "rows are read 16 bytes at a time");
  launch_dependents();
  wait_for_kernels_before();
  const size_t row = blockIdx.x / BLOCKS;
  const int i = blockIdx.x % BLOCKS * THREADS + threadIdx.x;
  if (i >= VECTORS) return;
  float gate[VECTOR], up[VECTOR];
  unpack_vector(gate, load_vector(x, row * 2 * VECTORS + i));
  unpack_vector(up, load_vector(x, row * 2 * VECTORS + VECTORS + i));
#pragma unroll
  for (int j = 0; j < VECTOR; j++) up[j] *= rounded(gate[j] / (1.f + __expf(-gate[j])));
  store_vector(y, row * VECTORS + i, pack_vector(up));
}

}  // namespace vllm_compile

#endif
