// Eight neighbours of a row, bf16 in 16 bytes or float in 32: how kernels that only move and scale activations, and add
// them up, read and write them.
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

// Eight elements as they lie in memory.
template <typename Element>
struct Packed;
template <>
struct Packed<__nv_bfloat16> {
  uint4 all;
};
template <>
struct Packed<float> {
  float4 low, high;
};

template <typename Element>
__device__ __forceinline__ Packed<Element> load_packed(const void* base, size_t vector) {
  return static_cast<const Packed<Element>*>(base)[vector];
}

__device__ __forceinline__ void unpack(float (&to)[VECTOR], const Packed<__nv_bfloat16>& from) {
  unpack_vector(to, from.all);
}

__device__ __forceinline__ void unpack(float (&to)[VECTOR], const Packed<float>& from) {
  to[0] = from.low.x, to[1] = from.low.y, to[2] = from.low.z, to[3] = from.low.w;
  to[4] = from.high.x, to[5] = from.high.y, to[6] = from.high.z, to[7] = from.high.w;
}

// The first element is at a multiple of eight of them.
template <typename Element>
__device__ __forceinline__ void load_row(float (&to)[VECTOR], const Element* from) {
  unpack(to, load_packed<Element>(from, 0));
}

__device__ __forceinline__ void store_row(__nv_bfloat16* to, const float (&from)[VECTOR]) {
  store_vector(to, 0, pack_vector(from));
}

__device__ __forceinline__ void store_row(float* to, const float (&from)[VECTOR]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

// The sum of `value` over the thread block, in each of its threads; `shared` holds 32 floats.
template <int THREADS>
__device__ __forceinline__ float block_sum(float value, float* shared) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) total += shared[warp];
  return total;
}

}  // namespace vllm_compile

#endif
