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

// Of the groups that `route` has made (experts, order, ends [slots]): number `number`, or that of the expert of this
// number, where there are no fewer slots than experts.  None: count is 0.  Called by a whole warp.
template <int EXPERTS>
__device__ __forceinline__ Group find_group(const int* __restrict__ experts, const int* __restrict__ order,
                                            const int* __restrict__ ends, int slots, int number) {
  const int lane = threadIdx.x % 32;
  int begin = slots;
  if (slots < EXPERTS) {  // a group begins where another ends
    for (int from = 0; from < slots; from += 32) {
      const int place = from + lane;
      uint32_t begins = __ballot_sync(0xffffffff, place < slots && (place == 0 || ends[max(place - 1, 0)] == place));
      for (; begins != 0 && number > 0; number--) begins &= begins - 1;
      if (begins != 0) {
        begin = from + __ffs(begins) - 1;
        break;
      }
    }
  } else {  // the first place of this expert, or of one behind it: 32 places are looked at at a time
    int low = 0, high = slots;
    while (low < high) {
      const int step = (high - low + 31) / 32, place = low + lane * step;
      const bool before = place < high && experts[order[min(place, slots - 1)]] < number;
      const int all = __popc(__ballot_sync(0xffffffff, before));
      high = all == 32 ? high : min(high, low + all * step);
      low = all == 0 ? low : low + (all - 1) * step + 1;
    }
    begin = low;
  }
  if (begin >= slots) return {0, 0, 0};
  const int expert = experts[order[begin]];
  if (slots >= EXPERTS && expert != number) return {0, 0, 0};
  return {expert, begin, ends[begin] - begin};
}

}  // namespace vllm_compile

#endif
