// LayerNorm of one row by one thread block, all of it in float, rounded once.
#ifndef VLLM_COMPILE_LAYER_NORM
#define VLLM_COMPILE_LAYER_NORM

#include "vectors.cuh"

namespace vllm_compile {

// x, y [rows, WIDTH], weight, bias [WIDTH], either null for none; block r does row r.
template <int WIDTH, int THREADS, typename Weight>
__device__ __forceinline__ void layer_norm(const void* x, const void* weight,
                                           const void* bias, void* y, float epsilon,
                                           void* shared) {
  constexpr int VECTORS = WIDTH / VECTOR, OWN = (VECTORS + THREADS - 1) / THREADS;
  static_assert(WIDTH % VECTOR == 0, "rows are read 16 bytes at a time");
  const size_t row = (size_t)blockIdx.x * VECTORS;
  float* sums = static_cast<float*>(shared);  // 32 for each of the two
  launch_dependents();
  wait_for_kernels_before();
  float values[OWN][VECTOR];
  float total = 0.f, squares = 0.f;
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    const int i = own * THREADS + threadIdx.x;
    if (i < VECTORS) {
      unpack_vector(values[own], load_vector(x, row + i));
#pragma unroll
      for (int j = 0; j < VECTOR; j++) total += values[own][j];
    }
  }
  const float mean = block_sum<THREADS>(total, sums) / WIDTH;
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    if (own * THREADS + threadIdx.x < VECTORS) {
#pragma unroll
      for (int j = 0; j < VECTOR; j++) {
        values[own][j] -= mean;
        squares += values[own][j] * values[own][j];
      }
    }
  }
  const float factor = rsqrtf(block_sum<THREADS>(squares, sums + 32) / WIDTH + epsilon);
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    const int i = own * THREADS + threadIdx.x;
    if (i < VECTORS) {
      float by[VECTOR];
#pragma unroll
      for (int j = 0; j < VECTOR; j++) values[own][j] *= factor;
      if (weight != nullptr) {
        unpack(by, load_packed<Weight>(weight, i));
#pragma unroll
        for (int j = 0; j < VECTOR; j++) values[own][j] *= by[j];
      }
      if (bias != nullptr) {
        unpack(by, load_packed<Weight>(bias, i));
#pragma unroll
        for (int j = 0; j < VECTOR; j++) values[own][j] += by[j];
      }
      store_vector(y, row + i, pack_vector(values[own]));
    }
  }
}

}  // namespace vllm_compile

#endif
