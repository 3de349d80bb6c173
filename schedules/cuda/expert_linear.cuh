// Products of tokens with the weights of the experts that they go to: one group of `route`, whose weight is read once for
// every TOKENS of its tokens.  Experts that nobody chose are not read.
#ifndef VLLM_COMPILE_EXPERT_LINEAR
#define VLLM_COMPILE_EXPERT_LINEAR

#include "stream_linear.cuh"
#include "wide_linear.cuh"

namespace vllm_compile {

// The tile of a group that this thread block, (tile of rows, number), multiplies; its count is 0 if there is none for it.
// Which weights are wanted is known when the router's kernel is done, so nothing is requested before.
template <int EXPERTS, int TOKENS>
__device__ __forceinline__ Group wait_for_tile(const int* experts, const int* order,
                                               const int* ends, int slots) {
  launch_dependents();
  wait_for_kernels_before();
  return find_tile<EXPERTS, TOKENS>(experts, order, ends, slots, blockIdx.y, gridDim.y);
}

__device__ __forceinline__ const void* weight_of(const void* weights, int expert, int N, int K) {
  return static_cast<const __nv_bfloat16*>(weights) + (size_t)expert * N * K;
}

// x [slots / SHARED, K], weights [EXPERTS, N, K], y [slots, N] (or [slots, N / 2], GATED); experts, order, ends [slots] are
// those of `route`.  The other parameters are those of stream_linear.
template <int TOKEN_TILES, int ROW_TILES, int WARPS, int STAGES, int PREFETCH, bool AHEAD, bool PACKED, bool GATED,
          int EXPERTS, int SHARED>
__device__ __forceinline__ void expert_stream_linear(const __nv_bfloat16* x,
                                                     const int* experts, const int* order,
                                                     const int* ends, const void* weights,
                                                     __nv_bfloat16* y, int slots, int N, int K,
                                                     void* shared) {
  const Group tile = wait_for_tile<EXPERTS, 8 * TOKEN_TILES>(experts, order, ends, slots);
  if (tile.count == 0) return;
  stream_linear<TOKEN_TILES, ROW_TILES, WARPS, STAGES, PREFETCH, AHEAD, PACKED, GATED>(
      x, weight_of(weights, tile.expert, N, K), nullptr, nullptr, y, tile.count, N, K, shared,
      RoutedRows<SHARED>{order + tile.begin});
}

// The same; its parameters are those of wide_linear.
template <int TOKENS, int ROW_GROUPS, int K_GROUPS, int CLUSTER, int BLOCKS, int STAGES, int PREFETCH, bool PACKED,
          bool GATED, int EXPERTS, int SHARED>
__device__ __forceinline__ void expert_wide_linear(const __nv_bfloat16* x,
                                                   const int* experts, const int* order,
                                                   const int* ends, const void* weights,
                                                   __nv_bfloat16* y, int slots, int N, int K,
                                                   void* shared) {
  const Group tile = wait_for_tile<EXPERTS, TOKENS>(experts, order, ends, slots);
  if (tile.count == 0) return;
  wide_linear<TOKENS, ROW_GROUPS, K_GROUPS, CLUSTER, BLOCKS, STAGES, PREFETCH, PACKED, GATED>(
      x, weight_of(weights, tile.expert, N, K), nullptr, nullptr, y, tile.count, N, K, shared,
      RoutedRows<SHARED>{order + tile.begin});
}

}  // namespace vllm_compile

#endif
