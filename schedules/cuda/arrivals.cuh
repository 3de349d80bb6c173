// Thread blocks that count on one another: those that have parts of one result leave them in memory, and the last to come
// adds them up, in their order; those that are done take over work that is left.
#ifndef VLLM_COMPILE_ARRIVALS
#define VLLM_COMPILE_ARRIVALS

#include "ptx.cuh"

namespace vllm_compile {

// Called by all threads of a thread block once they have stored its part: whether it is the last of `count` that come to
// `counter`, and then may read, past L1, what the others have stored.  The counter is zero before the first and after the
// last.
__device__ __forceinline__ bool last_to_arrive(int* counter, int count) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = arrive(counter) == count - 1;
    if (last) *counter = 0;
  }
  return __syncthreads_or(last);
}

// Called by all threads of a thread block that asks for more work: how many have asked before.  `count` are told a number
// in all, each of the thread blocks one at last for which nothing is left.  The counter is zero before the first and after
// the last; `shared` is an int of shared memory that nobody needs.
__device__ __forceinline__ int next_taken(int* counter, int count, int* shared) {
  if (threadIdx.x == 0) {
    *shared = arrive(counter);
    if (*shared == count - 1) *counter = 0;
  }
  __syncthreads();
  const int taken = *shared;
  __syncthreads();
  return taken;
}

}  // namespace vllm_compile

#endif
