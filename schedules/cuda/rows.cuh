// Which rows of x a thread block multiplies with a weight, and where their results go: a dense layer's, or an expert's.
#ifndef VLLM_COMPILE_ROWS
#define VLLM_COMPILE_ROWS

#include "ptx.cuh"

namespace vllm_compile {

// A dense layer's: those of the tokens.
struct DenseRows {
  static constexpr bool ROUTED = false;

  static __device__ __forceinline__ int x(int token) { return token; }
  static __device__ __forceinline__ int y(int token) { return token; }

  // Rows of x that one thread loads, of tokens `token`(0) to `token`(COUNT - 1).
  template <int COUNT, class Token>
  struct Own {
    Token token;
    __device__ __forceinline__ int operator[](int i) const { return token(i); }
  };
  template <int COUNT, class Token>
  static __device__ __forceinline__ Own<COUNT, Token> own(Token token, int tokens) {
    return {token};
  }
};

// Tokens of a group of `route`, by their places: entry `order`[place] of [tokens, k] has its result there, and its x at
// entry / SHARED: the k experts of a token share its x, or each has its own.  Kernels before have been waited for.
template <int SHARED>
struct RoutedRows {
  static constexpr bool ROUTED = true;
  const int* order;

  __device__ __forceinline__ int x(int place) const { return order[place] / SHARED; }
  __device__ __forceinline__ int y(int place) const { return order[place]; }

  template <int COUNT>
  struct Own {
    int rows[COUNT];
    __device__ __forceinline__ int operator[](int i) const { return rows[i]; }
  };
  template <int COUNT, class Place>
  __device__ __forceinline__ Own<COUNT> own(Place place, int places) const {
    Own<COUNT> found;
#pragma unroll
    for (int i = 0; i < COUNT; i++) found.rows[i] = x(min(place(i), places - 1));
    return found;
  }
};

// Entries of one expert: those of `count` places from `begin` on.
struct Group {
  int expert, begin, count;
};

// The first of `count` places that is not `before`, as none behind it is; `count` if all are.  Called by a whole warp, which
// looks at 32 places at a time.
template <class Before>
__device__ __forceinline__ int first_place(int count, Before before) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = count;
  while (low < high) {
    const int step = (high - low + 31) / 32, place = low + lane * step;
    const int all = __popc(__ballot_sync(0xffffffff, place < high && before(place)));
    if (all < 32) high = min(high, low + all * step);
    if (all > 0) low += (all - 1) * step + 1;
  }
  return low;
}

// Of the groups that `route` has made (experts, order, ends [slots]): number `number`, or that of the expert of this
// number, where there are no fewer slots than experts.  None: count is 0.  Called by a whole warp.
template <int EXPERTS>
__device__ __forceinline__ Group find_group(const int* experts, const int* order,
                                            const int* ends, int slots, int number) {
  const int lane = threadIdx.x % 32;
  if (slots < EXPERTS) {  // a group begins where another ends
    for (int from = 0; from < slots; from += 32) {
      const int place = from + lane, known = min(place, slots - 1);  // all that may be wanted is loaded at once
      const int end = ends[known], before = ends[max(known - 1, 0)], expert = experts[order[known]];
      uint32_t begins = __ballot_sync(0xffffffff, place < slots && (place == 0 || before == place));
      for (; begins != 0 && number > 0; number--) begins &= begins - 1;
      if (begins != 0) {
        const int first = __ffs(begins) - 1;
        return {__shfl_sync(0xffffffff, expert, first), from + first, __shfl_sync(0xffffffff, end, first) - from - first};
      }
    }
    return {0, 0, 0};
  }
  const int begin = first_place(slots, [=](int place) { return experts[order[place]] < number; });
  if (begin == slots || experts[order[begin]] != number) return {0, 0, 0};
  return {number, begin, ends[begin] - begin};
}

// Groups are taken TOKENS places at a time: the first tile of one, or a further tile that begins within TOKENS places from
// a multiple of TOKENS on.  No more than one does, of the group that the multiple is within: another's second tile begins
// TOKENS behind its first.  So min(slots, EXPERTS) first tiles and (slots - 1) / TOKENS others are all that there may be.
// They take turns in such a way that tiles of one expert are near each other where experts have equal shares.
// Tile `number` of `numbers`: its count is 0 if there is none.  Called by a whole warp.
template <int EXPERTS, int TOKENS>
__device__ __forceinline__ Group find_tile(const int* experts, const int* order,
                                           const int* ends, int slots, int number, int numbers) {
  const int64_t groups = min(slots, EXPERTS);
  const int before = number * groups / numbers;  // groups whose first tiles have smaller numbers
  if (before < (number + 1) * groups / numbers) {
    Group tile = find_group<EXPERTS>(experts, order, ends, slots, before);
    tile.count = min(tile.count, TOKENS);
    return tile;
  }
  const int within = (number - before + 1) * TOKENS, end = ends[within];
  const int group = first_place(within, [=](int place) { return ends[place] < end; });
  const int begin = group + (within - group + TOKENS - 1) / TOKENS * TOKENS;
  if (begin == group || begin >= end) return {0, 0, 0};
  return {experts[order[within]], begin, min(end - begin, TOKENS)};
}

}  // namespace vllm_compile

#endif
