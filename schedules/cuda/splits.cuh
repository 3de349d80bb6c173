// Sums of thread blocks that have the same rows and tokens in different parts of K, wherever in the grid they are: each
// leaves its own in memory, where the L2 cache keeps them, and the last to come adds up all, in their order.
//
// In a cluster thread blocks do so in each other's shared memory, but then have to find places beside each other: of an
// H200's 132 multiprocessors 96 have room for clusters of four.  These need no others to run at the same time.
//
// The memory is a library's own.  Its kernels follow each other on one stream, and each is done before the next one
// writes there (wait_for_kernels_before).
#ifndef VLLM_COMPILE_SPLITS
#define VLLM_COMPILE_SPLITS

#include "ptx.cuh"

namespace vllm_compile {

constexpr int SPLIT_BYTES = 8 << 20, SPLIT_GROUPS = 1 << 14;  // of all thread blocks of a launch; as in fed.py

static __device__ float4 split_sums[SPLIT_BYTES / 16];
static __device__ int split_arrivals[SPLIT_GROUPS];  // of each group; zero before and after each launch

// Called by all threads of a thread block once they have stored its sums: whether it is the last of the SPLITS of its
// group, which then may read (past L1) what the others have stored.
template <int SPLITS>
__device__ __forceinline__ bool last_of_splits(int group) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = arrive(&split_arrivals[group]) == SPLITS - 1;
    if (last) split_arrivals[group] = 0;
  }
  return __syncthreads_or(last);
}

}  // namespace vllm_compile

#endif
