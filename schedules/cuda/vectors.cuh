// Eight bf16 numbers in 16 bytes: how kernels that only move and scale activations read and write them.
#ifndef VLLM_COMPILE_VECTORS
#define VLLM_COMPILE_VECTORS

#include "ptx.cuh"

namespace vllm_compile {

constexpr int VECTOR = 8;  // elements of 16 bytes

__device__ __forceinline__ float rounded(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

__device__ __forceinline__ uint32_t word_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Bits of a bf16 number are the upper half of a float's.
__device__ __forceinline__ void unpack_vector(float (&to)[VECTOR], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// Rounds to nearest even.
__device__ __forceinline__ uint4 pack_vector(const float (&from)[VECTOR]) {
  return make_uint4(word_of(from[0], from[1]), word_of(from[2], from[3]), word_of(from[4], from[5]),
                    word_of(from[6], from[7]));
}

__device__ __forceinline__ uint4 load_vector(const void* base, size_t vector) {
  return static_cast<const uint4*>(base)[vector];
}

__device__ __forceinline__ void store_vector(void* base, size_t vector, const uint4& value) {
  static_cast<uint4*>(base)[vector] = value;
}

}  // namespace vllm_compile

#endif
