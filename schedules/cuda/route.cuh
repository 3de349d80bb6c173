// The router of a mixture of experts: scores and the best k of each token, then a stable sort of all by expert.
//
// A warp takes a token, its lanes the experts; of many tokens several thread blocks choose.  The last of them to be done
// sorts the entries of all, by counting: each warp the experts of its own stretch of entries, then where each of them
// begins, then each entry finds its place.  So results depend on the logits alone.
#ifndef VLLM_COMPILE_ROUTE
#define VLLM_COMPILE_ROUTE

#include "arrivals.cuh"
#include "vectors.cuh"

namespace vllm_compile {

__device__ int route_arrived;  // thread blocks of a launch that have chosen; zero between launches, which take turns

__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ float number(__nv_bfloat16 value) { return __bfloat162float(value); }

// Ascending with the number (nan is the largest), of equal ones the first expert's is larger; 0 is below all.
__device__ __forceinline__ unsigned long long rank_of(float value, int expert) {
  const uint32_t bits = __float_as_uint(value + 0.f);  // no negative zero
  const uint32_t ascending = value != value ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return (unsigned long long)ascending << 32 | (0xffffffffu - expert);
}

// Lanes whose expert, of EXPERTS, is this lane's; -1 is no entry's.
template <int EXPERTS>
__device__ __forceinline__ uint32_t peers_of(int expert) {
  uint32_t peers = __ballot_sync(0xffffffff, expert >= 0);
#pragma unroll
  for (int bit = 1; bit < EXPERTS; bit *= 2) {
    const uint32_t set = __ballot_sync(0xffffffff, expert & bit);
    peers &= expert & bit ? set : ~set;
  }
  return peers;
}

// logits [tokens, EXPERTS]; experts, scores, order, ends [tokens, TOP_K].  `shared` holds (WARPS + 2) * EXPERTS integers.
template <int EXPERTS, int TOP_K, bool NORMALISE, int WARPS, typename Logit>
__device__ __forceinline__ void route(const Logit* logits, int* experts, float* scores,
                                      int* order, int* ends, int tokens, void* shared) {
  constexpr int OWN = (EXPERTS + 31) / 32, THREADS = 32 * WARPS;
  static_assert(TOP_K <= 32 && TOP_K <= EXPERTS, "a lane has one of the chosen");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* const begins = static_cast<int*>(shared);  // of an expert's entries
  int* const after = begins + EXPERTS;
  int* const counts = after + EXPERTS + warp * EXPERTS;  // this warp's entries; then those of warps before
  launch_dependents();
  for (int e = lane; e < EXPERTS; e += 32) counts[e] = 0;
  wait_for_kernels_before();

  for (int token = blockIdx.x * WARPS + warp; token < tokens; token += gridDim.x * WARPS) {
    float value[OWN];
    unsigned long long rank[OWN];
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      const int e = own * 32 + lane;
      value[own] = -INFINITY, rank[own] = 0;
      if (e < EXPERTS) value[own] = number(logits[(size_t)token * EXPERTS + e]), rank[own] = rank_of(value[own], e);
    }
    float largest = 0.f, chosen = 0.f, all = 0.f, of_chosen = 0.f;
    int expert = 0;
#pragma unroll 1
    for (int j = 0; j < TOP_K; j++) {
      unsigned long long best = rank[0];
#pragma unroll
      for (int own = 1; own < OWN; own++) best = max(best, rank[own]);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(0xffffffff, best, step));
      const int e = 0xffffffffu - (uint32_t)best;
      float own_value = value[0];
#pragma unroll
      for (int own = 0; own < OWN; own++)
        if (own == e / 32) own_value = value[own], rank[own] = e % 32 == lane ? 0 : rank[own];
      own_value = __shfl_sync(0xffffffff, own_value, e % 32);
      if (j == 0) largest = own_value;
      if (j == lane) expert = e, chosen = own_value;
    }
    chosen = expf(chosen - largest);
    of_chosen = lane < TOP_K ? chosen : 0.f;
#pragma unroll
    for (int own = 0; own < OWN; own++)
      if (own * 32 + lane < EXPERTS) all += expf(value[own] - largest);
    if (NORMALISE) all = of_chosen;  // over the sum of the chosen, that of all cancels out
#pragma unroll
    for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(0xffffffff, all, step);
    if (lane < TOP_K) {
      experts[(size_t)token * TOP_K + lane] = expert;
      scores[(size_t)token * TOP_K + lane] = chosen / all;
    }
  }
  // What this thread block has written is wanted below, by itself or by the last of all.
  if (gridDim.x > 1) {
    if (!last_to_arrive(&route_arrived, gridDim.x)) return;
  } else {
    __syncthreads();
  }

  const int entries = tokens * TOP_K, stretch = (entries + THREADS - 1) / THREADS * 32;
  const int first = warp * stretch, last = min(first + stretch, entries);
  for (int from = first; from < last; from += 32) {
    const int expert = from + lane < last ? __ldcg(experts + from + lane) : -1;
    const uint32_t peers = peers_of<EXPERTS>(expert);
    if (expert >= 0 && lane == __ffs(peers) - 1) counts[expert] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;  // entries of experts before
    for (int from = 0; from < EXPERTS; from += 32) {
      const int e = from + lane;
      int sum = 0;
      for (int w = 0; w < WARPS && e < EXPERTS; w++) {
        int& count = after[EXPERTS + w * EXPERTS + e];
        const int own = count;
        count = sum, sum += own;
      }
      int through = sum;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffff, through, step);
        if (lane >= step) through += other;
      }
      if (e < EXPERTS) begins[e] = before + through - sum, after[e] = before + through;
      before += __shfl_sync(0xffffffff, through, 31);
    }
  }
  __syncthreads();
  for (int from = first; from < last; from += 32) {
    const int expert = from + lane < last ? __ldcg(experts + from + lane) : -1;
    const uint32_t peers = peers_of<EXPERTS>(expert);
    int place = 0;
    if (expert >= 0) place = begins[expert] + counts[expert] + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (expert >= 0) {
      order[place] = from + lane, ends[place] = after[expert];
      if (lane == __ffs(peers) - 1) counts[expert] += __popc(peers);
    }
    __syncwarp();
  }
}

}  // namespace vllm_compile

#endif
