// Products of tokens with a weight of a few rows, a router's: a thread block a token, a warp a row.
#ifndef VLLM_COMPILE_ROW_LINEAR
#define VLLM_COMPILE_ROW_LINEAR

#include "vectors.cuh"

namespace vllm_compile {

// x [tokens, K], weight [N, K], bias [N] and residual [tokens, N], which may be null, y [tokens, N]: of eight K at a time.
template <int N, int K, int WARPS>
__device__ __forceinline__ void row_linear(const void* x, const void* weight,
                                           const void* bias_or_null,
                                           const void* residual_or_null, __nv_bfloat16* y) {
  const __nv_bfloat16* const bias = static_cast<const __nv_bfloat16*>(bias_or_null);
  const __nv_bfloat16* const residual = static_cast<const __nv_bfloat16*>(residual_or_null);
  constexpr int VECTORS = K / VECTOR;
  static_assert(K % VECTOR == 0, "rows are read 16 bytes at a time");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const size_t token = blockIdx.x;
  launch_dependents();
  if (token == 0 && lane == 0)  // to L2, while the kernels before still run
    for (int row = warp; row < N; row += WARPS)
      prefetch(static_cast<const char*>(weight) + (size_t)row * K * 2, K * 2);
  wait_for_kernels_before();
  for (int row = warp; row < N; row += WARPS) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = lane; i < VECTORS; i += 32) {
      float of_x[VECTOR], of_weight[VECTOR];
      unpack_vector(of_x, load_vector(x, token * VECTORS + i));
      unpack_vector(of_weight, load_vector(weight, (size_t)row * VECTORS + i));
#pragma unroll
      for (int j = 0; j < VECTOR; j++) sum += of_x[j] * of_weight[j];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) {
      if (bias) sum += __bfloat162float(bias[row]);
      if (residual) sum = __bfloat162float(residual[token * N + row]) + rounded(sum);
      y[token * N + row] = __float2bfloat16_rn(sum);
    }
  }
}

}  // namespace vllm_compile

#endif
