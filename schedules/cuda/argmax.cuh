// The largest element of each row, one row a thread block.
#ifndef VLLM_COMPILE_ARGMAX
#define VLLM_COMPILE_ARGMAX

#include "vectors.cuh"

namespace vllm_compile {

// An element, and the unit of elements that it is in.
struct Most {
  float value;
  int unit;

  // Of equal ones the first.
  __device__ __forceinline__ void meet(float other, int other_unit) {
    if (other > value || (other == value && other_unit < unit)) value = other, unit = other_unit;
  }
};

// Elements of a unit as floats.
template <int UNIT, typename Element>
__device__ __forceinline__ void load_unit(float (&to)[UNIT], const Element* row, int unit) {
  if constexpr (UNIT == VECTOR)
    load_row(to, row + unit * UNIT);
  else
    to[0] = static_cast<float>(row[unit]);
}

// tokens [rows]: where a row of logits [rows, WIDTH] is largest, of equal ones the first.  NaN is passed over; of a row
// that has no number above -inf it is 0.
template <int WIDTH, int THREADS, typename Element>
__device__ __forceinline__ void argmax(const void* logits, int64_t* tokens, void* shared) {
  constexpr int UNIT = WIDTH % VECTOR == 0 ? VECTOR : 1;  // rows of other widths begin anywhere
  constexpr int UNITS = WIDTH / UNIT, WARPS = THREADS / 32;
  const Element* const row = static_cast<const Element*>(logits) + (size_t)blockIdx.x * WIDTH;
  launch_dependents();
  wait_for_kernels_before();

  Most most = {-INFINITY, 0};
#pragma unroll 4
  for (int unit = threadIdx.x; unit < UNITS; unit += THREADS) {
    float values[UNIT];
    load_unit<UNIT>(values, row, unit);
    float here = values[0];
#pragma unroll
    for (int i = 1; i < UNIT; i++) here = fmaxf(here, values[i]);
    if (here > most.value) most = {here, unit};
  }

  Most* const of_warps = static_cast<Most*>(shared);
  auto meet_lanes = [&] {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      most.meet(__shfl_xor_sync(0xffffffff, most.value, step), __shfl_xor_sync(0xffffffff, most.unit, step));
  };
  meet_lanes();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  most = of_warps[min((int)threadIdx.x, WARPS - 1)];
  meet_lanes();
  if (threadIdx.x > 0) return;
  float values[UNIT];
  load_unit<UNIT>(values, row, most.unit);
  int place = 0;
#pragma unroll
  for (int i = UNIT - 1; i >= 0; i--)
    if (values[i] == most.value) place = i;
  tokens[blockIdx.x] = most.unit * UNIT + place;
}

}  // namespace vllm_compile

#endif
