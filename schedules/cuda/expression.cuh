// What the code generated for a fused expression is made of (expression.py), beside vectors.
#ifndef VLLM_COMPILE_EXPRESSION
#define VLLM_COMPILE_EXPRESSION

#include "vectors.cuh"

namespace vllm_compile {

__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }
__device__ __forceinline__ int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

__device__ __forceinline__ void store_row(__nv_bfloat16* to, const float (&from)[1]) {
  *to = __float2bfloat16_rn(from[0]);
}

__device__ __forceinline__ void store_row(float* to, const float (&from)[1]) { *to = from[0]; }

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// x times the normal distribution function of x (Hendrycks & Gimpel 2016), and their approximation by tanh.
__device__ __forceinline__ float gelu(float x) { return x * 0.5f * (1.f + erff(x * 0.70710678f)); }

__device__ __forceinline__ float gelu_tanh(float x) {
  return x * 0.5f * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

}  // namespace vllm_compile

#endif
