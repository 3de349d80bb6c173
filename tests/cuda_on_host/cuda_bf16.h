// CUDA C++ for a host compiler, as far as our device code uses it: keywords, vectors, bf16 and intrinsics.
//
// Stands in for CUDA's header of this name, which is what all device code includes first.
#ifndef CUDA_ON_HOST_CUDA_BF16
#define CUDA_ON_HOST_CUDA_BF16

// C's math.h: the one of libstdc++ takes several times as long to compile as all the rest.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "emulator.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// Vectors, aligned as on a GPU, so that a misaligned one is reported.
#define CUDA_ON_HOST_VECTOR(type, name)                                                            \
  struct alignas(2 * sizeof(type)) name##2 {                                                       \
    type x, y;                                                                                     \
  };                                                                                               \
  struct name##3 {                                                                                 \
    type x, y, z;                                                                                  \
  };                                                                                               \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 {                          \
    type x, y, z, w;                                                                               \
  };                                                                                               \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                 \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                      \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 uint3_of_vectors  // emulator.h has it
CUDA_ON_HOST_VECTOR(unsigned, uint)
#undef uint3
CUDA_ON_HOST_VECTOR(int, int)
CUDA_ON_HOST_VECTOR(float, float)
CUDA_ON_HOST_VECTOR(unsigned short, ushort)
CUDA_ON_HOST_VECTOR(long long, longlong)
CUDA_ON_HOST_VECTOR(unsigned long long, ulonglong)
#undef CUDA_ON_HOST_VECTOR

namespace cuda_on_host {

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

inline float float_of(uint32_t bf16) { return bits<float>(bf16 << 16); }

// To nearest even; nan as CUDA has it.
inline uint16_t bf16_of(float value) {
  const uint32_t word = bits<uint32_t>(value);
  if (value != value) return 0x7fff;
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

}  // namespace cuda_on_host

inline unsigned __float_as_uint(float value) { return cuda_on_host::bits<unsigned>(value); }
inline int __float_as_int(float value) { return cuda_on_host::bits<int>(value); }
inline float __uint_as_float(unsigned value) { return cuda_on_host::bits<float>(value); }
inline float __int_as_float(int value) { return cuda_on_host::bits<float>(value); }

struct __nv_bfloat16 {
  uint16_t bits_of_bf16;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits_of_bf16(cuda_on_host::bf16_of(value)) {}
  operator float() const { return cuda_on_host::float_of(bits_of_bf16); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {value.x, value.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
inline float __low2float(__nv_bfloat162 value) { return value.x; }
inline float __high2float(__nv_bfloat162 value) { return value.y; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits_of_bf16; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short value) { return cuda_on_host::bits<__nv_bfloat16>(value); }

// Numbers.  GPUs round some of these less well than a host does.
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <>
inline float min(float a, float b) {
  return fminf(a, b);
}
template <>
inline float max(float a, float b) {
  return fmaxf(a, b);
}
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float rsqrtf(float value) { return (float)(1 / sqrt((double)value)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1 / value; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float value) { return fminf(fmaxf(value, 0), 1); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return ((uint64_t)high << 32 | low) << (by & 31) >> 32;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return ((uint64_t)high << 32 | low) >> (by & 31);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = both >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline int __ffs(int value) { return __builtin_ffs(value); }

// Memory.
#define CUDA_ON_HOST_LOAD(name)  \
  template <typename T>          \
  inline T name(const T* from) { \
    return *from;                \
  }
CUDA_ON_HOST_LOAD(__ldg)
CUDA_ON_HOST_LOAD(__ldca)
CUDA_ON_HOST_LOAD(__ldcg)
CUDA_ON_HOST_LOAD(__ldcs)
#undef CUDA_ON_HOST_LOAD
template <typename T>
inline void __stcg(T* to, T value) {
  *to = value;
}
template <typename T>
inline void __stcs(T* to, T value) {
  *to = value;
}
inline size_t __cvta_generic_to_shared(const void* memory) { return cuda_on_host::address_of_shared(memory); }
inline void __threadfence(cuda_on_host::Site site = cuda_on_host::Site::current()) { cuda_on_host::take_turns(site); }
inline void __threadfence_block(cuda_on_host::Site site = cuda_on_host::Site::current()) { __threadfence(site); }
inline void __nanosleep(unsigned, cuda_on_host::Site site = cuda_on_host::Site::current()) { __threadfence(site); }

// Atomic, as threads change only where they wait; others may run before.
template <typename T>
inline T atomicAdd(T* to, std::type_identity_t<T> value, cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::take_turns(site);
  const T old = *to;
  *to = old + value;
  return old;
}
template <typename T>
inline T atomicMax(T* to, std::type_identity_t<T> value, cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::take_turns(site);
  const T old = *to;
  if (old < value) *to = value;
  return old;
}
template <typename T>
inline T atomicExch(T* to, std::type_identity_t<T> value, cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::take_turns(site);
  const T old = *to;
  *to = value;
  return old;
}
template <typename T>
inline T atomicCAS(T* to, std::type_identity_t<T> expected, std::type_identity_t<T> value,
                   cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::take_turns(site);
  const T old = *to;
  if (old == expected) *to = value;
  return old;
}

// Barriers.
inline void __syncthreads(cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::barrier(0, 0, site);
}
inline int __syncthreads_or(int predicate, cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::barrier_or(predicate != 0, site);
}
inline void __syncwarp(unsigned mask = cuda_on_host::ALL_LANES,
                       cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::collective(
      "__syncwarp", mask, false, nullptr, [](void* const (&)[32], uint32_t) { cuda_on_host::order_warp(); }, site);
}

// Exchange between the lanes of a warp.
namespace cuda_on_host {

struct Exchanged {
  uint64_t value;
  int from;  // the lane whose value is wanted
  uint64_t result;
};

inline void exchange_all(void* const (&of_lane)[WARP], uint32_t mask) {
  for (int i = 0; i < WARP; i++) {
    if (!(mask >> i & 1)) continue;
    Exchanged& own = *static_cast<Exchanged*>(of_lane[i]);
    // What a lane outside the mask would give is undefined.
    own.result = mask >> own.from & 1 ? static_cast<Exchanged*>(of_lane[own.from])->value : ~uint64_t{0};
  }
}

template <typename T>
inline T exchange(const char* name, unsigned mask, T value, int from, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Exchanged own{0, from, 0};
  memcpy(&own.value, &value, sizeof(T));
  collective(name, mask, false, &own, exchange_all, site);
  memcpy(&value, &own.result, sizeof(T));
  return value;
}

struct Least {
  static constexpr uint32_t NEUTRAL = ~0u;
  static uint32_t of(uint32_t a, uint32_t b) { return min(a, b); }
};
struct Largest {
  static constexpr uint32_t NEUTRAL = 0;
  static uint32_t of(uint32_t a, uint32_t b) { return max(a, b); }
};
struct Sum {
  static constexpr uint32_t NEUTRAL = 0;
  static uint32_t of(uint32_t a, uint32_t b) { return a + b; }
};

template <class Combine>
uint32_t reduced(const char* name, unsigned mask, uint32_t value, Site site) {
  Exchanged own{value, 0, 0};
  collective(
      name, mask, false, &own,
      [](void* const (&of_lane)[WARP], uint32_t mask) {
        uint32_t result = Combine::NEUTRAL;
        for (int i = 0; i < WARP; i++)
          if (mask >> i & 1) result = Combine::of(result, static_cast<Exchanged*>(of_lane[i])->value);
        for (int i = 0; i < WARP; i++)
          if (mask >> i & 1) static_cast<Exchanged*>(of_lane[i])->result = result;
      },
      site);
  return own.result;
}

inline uint32_t vote(const char* name, unsigned mask, int predicate, Site site) {
  Exchanged own{predicate != 0, 0, 0};
  collective(
      name, mask, false, &own,
      [](void* const (&of_lane)[WARP], uint32_t mask) {
        uint32_t votes = 0;
        for (int i = 0; i < WARP; i++)
          if (mask >> i & 1) votes |= (uint32_t)static_cast<Exchanged*>(of_lane[i])->value << i;
        for (int i = 0; i < WARP; i++)
          if (mask >> i & 1) static_cast<Exchanged*>(of_lane[i])->result = votes;
      },
      site);
  return own.result;
}

}  // namespace cuda_on_host

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32,
                     cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const int lane = cuda_on_host::lane();
  return cuda_on_host::exchange("__shfl_sync", mask, value, (lane & -width) + (from & (width - 1)), site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32,
                         cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const int lane = cuda_on_host::lane(), from = lane ^ with;
  return cuda_on_host::exchange("__shfl_xor_sync", mask, value, from < (lane & -width) + width ? from : lane, site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                          cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const int lane = cuda_on_host::lane(), from = lane + (int)by;
  return cuda_on_host::exchange("__shfl_down_sync", mask, value, from < (lane & -width) + width ? from : lane, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                        cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const int lane = cuda_on_host::lane(), from = lane - (int)by;
  return cuda_on_host::exchange("__shfl_up_sync", mask, value, from >= (lane & -width) ? from : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::vote("__ballot_sync", mask, predicate, site);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value,
                                  cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::reduced<cuda_on_host::Least>("__reduce_min_sync", mask, value, site);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                  cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::reduced<cuda_on_host::Largest>("__reduce_max_sync", mask, value, site);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value,
                                  cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::reduced<cuda_on_host::Sum>("__reduce_add_sync", mask, value, site);
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::vote("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::vote("__all_sync", mask, predicate, site) == mask;
}

#endif
