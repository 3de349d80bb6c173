// How kernels read a weight matrix: 16 rows x 64 columns at a time, plain or lossless (vllm_compile/lossless.py).
#ifndef VLLM_COMPILE_WEIGHTS
#define VLLM_COMPILE_WEIGHTS

#include "ptx.cuh"

namespace vllm_compile {

// 16-byte vectors that a lane has of a block of 16 x 64 weights.
template <bool PACKED>
constexpr int BLOCK_VECTORS = PACKED ? 3 : 4;
constexpr int PACKED_BLOCK = 1536;  // bytes of a lossless block

struct Row {
  uint32_t first;  // of its entries in the side list
  float scale;
};

struct Entry {
  uint32_t k;
  float value;
};

__device__ __forceinline__ const Row* row_table(const void* weight, int N, int K) {
  return reinterpret_cast<const Row*>(static_cast<const char*>(weight) + (size_t)N * K / 2 * 3);
}

__device__ __forceinline__ const Entry* side_list(const void* weight, int N, int K) {
  return reinterpret_cast<const Entry*>(row_table(weight, N, K) + N + 2 - N % 2);
}

// Bytes of `rows`, whole tiles.
template <bool PACKED>
__device__ __forceinline__ size_t rows_offset(int rows, int K) {
  return PACKED ? (size_t)(rows / 16) * (K / 64) * PACKED_BLOCK : (size_t)rows * K * 2;
}

// Where a lane's first vector of a tile of 16 rows is; the others follow at `vector_offset`.
template <bool PACKED>
__device__ __forceinline__ const char* lane_source(const void* weight, int first_row, int K, int lane) {
  return static_cast<const char*>(weight) + rows_offset<PACKED>(first_row, K) +
         (PACKED ? lane * 16 : ((size_t)(lane / 4) * K + lane % 4 * 8) * 2);
}

template <bool PACKED>
__device__ __forceinline__ size_t vector_offset(int block, int v, int K) {
  return PACKED ? (size_t)block * PACKED_BLOCK + v * 512 : ((size_t)(v % 2 * 8) * K + block * 64 + v / 2 * 32) * 2;
}

// Blocks `from` to `to` of a tile to the L2 cache, where they are one piece (lossless) or sixteen (rows); called by a warp.
template <bool PACKED>
__device__ __forceinline__ void prefetch_blocks(const void* weight, int first_row, int K, int from, int to, int lane) {
  const char* tile = static_cast<const char*>(weight);
  if (from >= to || lane >= (PACKED ? 1 : 16)) return;
  if constexpr (PACKED) {
    prefetch(tile + ((size_t)(first_row / 16) * (K / 64) + from) * PACKED_BLOCK, (to - from) * PACKED_BLOCK);
  } else {
    prefetch(tile + ((size_t)(first_row + lane) * K + from * 64) * 2, (to - from) * 128);
  }
}

__device__ __forceinline__ uint32_t element(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Fragment A of rows g and g + 8 and of columns 8 * t + 2 * i, 8 * t + 2 * i + 1 of both halves of the block.
template <bool PACKED>
__device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint4* v, int i) {
  a[0] = element(v[0], i);
  a[1] = element(v[1], i);
  a[2] = element(v[2], i);
  if constexpr (PACKED) {
    a[3] = ((a[0] >> 4) & 0x07800780) | ((a[1] >> 8) & 0x00780078);
    a[3] |= __funnelshift_r(a[2], a[2], 12) & 0x80078007;
    a[0] &= 0x87ff87ff;
    a[1] &= 0x87ff87ff;
    a[2] &= 0x87ff87ff;
  } else {
    a[3] = element(v[3], i);
  }
}

}  // namespace vllm_compile

#endif
