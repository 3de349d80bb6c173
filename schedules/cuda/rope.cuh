// Rotary embedding of the two halves of a head as Hugging Face rounds it: each product, then the sum.
#ifndef VLLM_COMPILE_ROPE
#define VLLM_COMPILE_ROPE

#include "vectors.cuh"

namespace vllm_compile {

// own * cos + sign * other * sin: sign is -1 in the first half of a head, 1 in the second.
__device__ __forceinline__ float turned(float own, float other, float cos, float sin, float sign) {
  return rounded(own * cos) + sign * rounded(other * sin);
}

// The same of the two numbers of a word.
__device__ __forceinline__ uint32_t turned_word(uint32_t own, uint32_t other, uint32_t cos, uint32_t sin, float sign) {
  auto low = [](uint32_t word) { return __uint_as_float(word << 16); };
  auto high = [](uint32_t word) { return __uint_as_float(word & 0xffff0000u); };
  return word_of(turned(low(own), low(other), low(cos), low(sin), sign),
                 turned(high(own), high(other), high(cos), high(sin), sign));
}

// The same of eight numbers.
__device__ __forceinline__ uint4 turned_vector(const uint4& own, const uint4& other, const uint4& cos, const uint4& sin,
                                               float sign) {
  return make_uint4(turned_word(own.x, other.x, cos.x, sin.x, sign), turned_word(own.y, other.y, cos.y, sin.y, sign),
                    turned_word(own.z, other.z, cos.z, sin.z, sign), turned_word(own.w, other.w, cos.w, sin.w, sign));
}

// Vectors `part` of both halves of head `head` of a token, of qkv [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM]: of
// queries and keys they are turned by cos, sin [tokens, HEAD_DIM], values are as they were.
template <int HEADS, int KV_HEADS, int HEAD_DIM>
__device__ __forceinline__ void load_halves(uint4& low, uint4& high, const void* qkv,
                                            const void* cos, const void* sin, size_t token,
                                            int head, int part) {
  constexpr int HALF = HEAD_DIM / 2 / VECTOR;  // vectors of half a head
  static_assert(HEAD_DIM % (2 * VECTOR) == 0, "half heads are read 16 bytes at a time");
  const size_t at = (token * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + part, angle = token * 2 * HALF + part;
  low = load_vector(qkv, at), high = load_vector(qkv, at + HALF);
  if (head < HEADS + KV_HEADS) {
    const uint4 first = low, second = high;
    low = turned_vector(first, second, load_vector(cos, angle), load_vector(sin, angle), -1.f);
    high = turned_vector(second, first, load_vector(cos, angle + HALF), load_vector(sin, angle + HALF), 1.f);
  }
}

}  // namespace vllm_compile

#endif
