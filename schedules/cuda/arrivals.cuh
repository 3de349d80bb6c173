// Thread blocks that have parts of one result leave them in memory, and the last to come adds them up, in their order.
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

}  // namespace vllm_compile

#endif
