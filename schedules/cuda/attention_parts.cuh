// From the sums of a thread block's warps to rows of attention's result, by way of memory where a request is cut into parts.
#ifndef VLLM_COMPILE_ATTENTION_PARTS
#define VLLM_COMPILE_ATTENTION_PARTS

#include "arrivals.cuh"
#include "attention_pieces.cuh"
#include "vectors.cuh"

namespace vllm_compile {

// Parts of requests that are cut, which takes two shares of a KV head at least.  Kernels of one stream take turns.
constexpr int MOST_GROUP = 16, MOST_HEAD_DIM = 256, MOST_CUT_HEADS = SHARES / 2;
__device__ float attention_parts[PARTS * MOST_GROUP * MOST_HEAD_DIM];
__device__ float2 attention_sums[PARTS * MOST_GROUP];  // {largest score, sum of exponentials} of a part
__device__ int attention_arrived[PARTS];              // blocks of a cut request that are done; zero between launches
__device__ int attention_taken[MOST_CUT_HEADS];       // how often blocks of a KV head have asked for more; zero between launches

// Called by all threads of the block that comes last: the parts of a request's KV head, in their order, to result
// [GROUP, HEAD_DIM].  Each warp takes a query; it loads the sums of 32 parts at once, then values of several parts before it
// waits for the first: of one request of 30,000 tokens beside 63 short ones there are 44.
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS>
__device__ __forceinline__ void add_parts(int first_part, int parts, __nv_bfloat16* result) {
  constexpr int COLUMNS = HEAD_DIM / 32;  // of a lane, 32 apart
  const int lane = threadIdx.x % 32;
  for (int at = threadIdx.x / 32; at < GROUP; at += WARPS) {
    float most = -INFINITY, total = 0.f, values[COLUMNS] = {};
    for (int begin = 0; begin < parts; begin += 32) {
      const int known = min(parts - begin, 32);
      const float2* const sums = attention_sums + (first_part + begin * KV_HEADS) * GROUP + at;
      const float* const from = attention_parts + ((first_part + begin * KV_HEADS) * GROUP + at) * HEAD_DIM + lane;
      const float2 own = lane < known ? __ldcg(sums + lane * (KV_HEADS * GROUP)) : make_float2(-INFINITY, 0.f);
      const float before = most;
      most = fmaxf(most, own.x);
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
      const float shrink = power_of_two(before - most), weight = power_of_two(own.x - most);
      total *= shrink;
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) values[i] *= shrink;
#pragma unroll 8
      for (int part = 0; part < known; part++) {
        const float share = __shfl_sync(0xffffffff, weight, part);
        total += share * __shfl_sync(0xffffffff, own.y, part);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) values[i] += share * __ldcg(from + part * (KV_HEADS * GROUP * HEAD_DIM) + i * 32);
      }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) result[at * HEAD_DIM + i * 32 + lane] = __float2bfloat16_rn(values[i] / total);
  }
}

// Called by all threads.  Lane (g, t) has for queries 2 * t and 2 * t + 1 of each eight of a group the largest score, the
// sum of its own tokens' exponentials, and columns g and g + 8 of each 16 of the values, added up.  result [GROUP, HEAD_DIM]
// is KV head blockIdx.y's.  `shared` holds OWN floats a warp, which that warp alone may still use when it calls.
template <int HEAD_DIM, int GROUP, int KV_HEADS, int WARPS, int OWN, int EIGHTS, int STEPS>
__device__ __forceinline__ void write_piece(const Piece& piece, const float (&largest)[EIGHTS][2],
                                            const float (&sum)[EIGHTS][2], const float (&values)[EIGHTS][STEPS][4],
                                            __nv_bfloat16* result, void* shared) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int ROW = HEAD_DIM + 4;  // floats from a query's sums to the next: no bank twice
  static_assert(GROUP <= MOST_GROUP && HEAD_DIM <= MOST_HEAD_DIM, "beyond the workspace");
  static_assert(OWN >= GROUP * ROW + 2 * GROUP, "sums of a warp fit where its stages were");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, head = blockIdx.y;

  // Warps meet: [GROUP][ROW] values, then {largest, sum} of each query.
  float* const all = static_cast<float*>(shared);
  __syncwarp();
#pragma unroll
  for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
    for (int column = 0; column < 2; column++) {
      float total = sum[eight][column];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffff, total, lanes);
      const int at = eight * 8 + 2 * t + column;
      if (at < GROUP) {
        float* const to = all + warp * OWN + at * ROW;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
          to[step * 16 + g] = values[eight][step][column];
          to[step * 16 + 8 + g] = values[eight][step][2 + column];
        }
        float* const ends = all + warp * OWN + GROUP * ROW + at * 2;
        if (g == 0) ends[0] = largest[eight][column], ends[1] = total;
      }
    }
  __syncthreads();
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
    const int at = i / HEAD_DIM;
    float most = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, all[w * OWN + GROUP * ROW + at * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float* const ends = all + w * OWN + GROUP * ROW + at * 2;
      const float weight = power_of_two(ends[0] - most);
      total += weight * ends[1];
      value += weight * all[w * OWN + at * ROW + i % HEAD_DIM];
    }
    if (piece.parts == 1) {
      result[i] = __float2bfloat16_rn(value / total);
    } else {
      const int part = piece.slot * KV_HEADS + head;
      attention_parts[part * (GROUP * HEAD_DIM) + i] = value;
      if (i % HEAD_DIM == 0) attention_sums[part * GROUP + at] = make_float2(most, total);
    }
  }
  const int first_part = (piece.slot - piece.part) * KV_HEADS + head;
  if (piece.parts > 1 && last_to_arrive(attention_arrived + first_part, piece.parts))
    add_parts<HEAD_DIM, GROUP, KV_HEADS, WARPS>(first_part, piece.parts, result);
}

}  // namespace vllm_compile

#endif
