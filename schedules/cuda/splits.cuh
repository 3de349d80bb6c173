// Memory for the sums of thread blocks that have the same rows and tokens in different parts of K, wherever in the grid
// they are (arrivals.cuh).  The L2 cache keeps it.
//
// In a cluster thread blocks add up in each other's shared memory, but then have to find places beside each other: of an
// H200's 132 multiprocessors 96 have room for clusters of four.  These need no others to run at the same time.
//
// The memory is a library's own.  Its kernels follow each other on one stream, and each is done before the next one
// writes there (wait_for_kernels_before).
#ifndef VLLM_COMPILE_SPLITS
#define VLLM_COMPILE_SPLITS

namespace vllm_compile {

constexpr int SPLIT_BYTES = 8 << 20, SPLIT_GROUPS = 1 << 14;  // of all thread blocks of a launch; as in fed.py

// Templates, so that a library has none of it unless a kernel of its has SPLIT.
template <bool SPLIT>
__device__ float4 split_sums[SPLIT ? SPLIT_BYTES / 16 : 1];
template <bool SPLIT>
__device__ int split_arrivals[SPLIT ? SPLIT_GROUPS : 1];  // of each group; zero between launches

}  // namespace vllm_compile

#endif
