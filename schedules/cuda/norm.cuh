// RMSNorm of one row by one thread block, with or without a residual add before it.
//
// Roundings are those of Hugging Face: the sum (if any) and the normalised value are rounded to bf16, then scaled and
// rounded again; a float weight scales what is not rounded before.  A row stays in registers between its two passes.
#ifndef VLLM_COMPILE_NORM
#define VLLM_COMPILE_NORM

#include "vectors.cuh"

namespace vllm_compile {

// x, residual, total, y [rows, WIDTH], weight [WIDTH]; block r does row r.  ADD: total = residual + x is normalised.
template <int WIDTH, int THREADS, bool ADD, typename Weight>
__device__ __forceinline__ void rms_norm(const void* x, const void* residual,
                                         const void* weight, void* total,
                                         void* y, float epsilon, void* shared) {
  constexpr int VECTORS = WIDTH / VECTOR, OWN = (VECTORS + THREADS - 1) / THREADS;
  static_assert(WIDTH % VECTOR == 0, "rows are read 16 bytes at a time");
  const size_t row = (size_t)blockIdx.x * VECTORS;
  launch_dependents();
  Packed<Weight> scale[OWN];
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    const int i = own * THREADS + threadIdx.x;
    if (i < VECTORS) scale[own] = load_packed<Weight>(weight, i);
  }
  wait_for_kernels_before();
  float values[OWN][VECTOR];
  float squares = 0.f;
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    const int i = own * THREADS + threadIdx.x;
    if (i < VECTORS) {
      unpack_vector(values[own], load_vector(x, row + i));
      if constexpr (ADD) {
        float add[VECTOR];
        unpack_vector(add, load_vector(residual, row + i));
#pragma unroll
        for (int j = 0; j < VECTOR; j++) values[own][j] = rounded(add[j] + values[own][j]);
        store_vector(total, row + i, pack_vector(values[own]));
      }
#pragma unroll
      for (int j = 0; j < VECTOR; j++) squares += values[own][j] * values[own][j];
    }
  }
  const float factor = rsqrtf(block_sum<THREADS>(squares, static_cast<float*>(shared)) / WIDTH + epsilon);
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    const int i = own * THREADS + threadIdx.x;
    if (i < VECTORS) {
      float by[VECTOR];
      unpack(by, scale[own]);
#pragma unroll
      for (int j = 0; j < VECTOR; j++) {
        const float normed = values[own][j] * factor;
        by[j] *= sizeof(Weight) == sizeof(float) ? normed : rounded(normed);
      }
      store_vector(y, row + i, pack_vector(by));
    }
  }
}

}  // namespace vllm_compile

#endif
