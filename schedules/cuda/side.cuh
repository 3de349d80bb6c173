// Entries of a lossless weight's side list (vllm_compile/lossless.py), put among its codes, which were multiplied by 2^64.
#ifndef VLLM_COMPILE_SIDE
#define VLLM_COMPILE_SIDE

#include "vectors.cuh"
#include "weights.cuh"

namespace vllm_compile {

// The side list of a tile of 16 rows, from column `begin` on: lane r < 16 is at the next entry of row r.
struct Side {
  const Entry* entries;
  uint32_t next, last;   // of the row
  Entry now, ahead;      // now: its value over the scale; ahead: loaded long before it is needed
  float scale, inverse;  // powers of two
  uint32_t nearest;      // column of the next entry of all rows: one comparison says that a block has none

  __device__ __forceinline__ Entry entry(uint32_t at) const {
    return at < last ? entries[at] : Entry{0xffffffffu, 0.f};
  }

  __device__ __forceinline__ void start(const Entry* list, const Row* row, bool mine, uint32_t begin) {
    entries = list;
    next = last = 0, scale = 1.f;
    if (mine) next = row[0].first, last = row[1].first, scale = row[0].scale;
    inverse = 1.f / scale;
    if (begin > 0) {
      uint32_t before = 0;
#pragma unroll 1
      for (uint32_t at = next; at < last; at += 4)
#pragma unroll
        for (int i = 0; i < 4; i++) before += entry(at + i).k < begin;
      next += before;
    }
    ahead = entry(next++);
    advance();
    nearest = __reduce_min_sync(0xffffffff, now.k);
  }

  __device__ __forceinline__ void advance() {
    now = Entry{ahead.k, ahead.value * inverse};
    ahead = entry(next++);
  }

  // Puts the entries of columns up to `end` into the fragments of the block before it.
  __device__ __forceinline__ void put(uint32_t (&a)[4][4], uint32_t end, int lane) {
#pragma unroll 1
    while (nearest < end) {
      const int row = __ffs(__ballot_sync(0xffffffff, now.k == nearest)) - 1;
      const float value = __shfl_sync(0xffffffff, now.value, row);
      if (lane == row % 8 * 4 + nearest / 8 % 4) {
        const int place = nearest / 2 % 4 * 4 + nearest / 32 % 2 * 2 + row / 8;
        const uint32_t bits = word_of(nearest % 2 ? 0.f : value, nearest % 2 ? value : 0.f);
#pragma unroll
        for (int i = 0; i < 16; i++) a[i / 4][i % 4] |= i == place ? bits : 0;  // the code is a zero of the same sign
      }
      if (lane == row) advance();
      nearest = __reduce_min_sync(0xffffffff, now.k);
    }
  }
};

}  // namespace vllm_compile

#endif
