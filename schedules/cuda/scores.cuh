// Which cached tokens a query sees, and what becomes of its products with their keys: Mistral's windows, Gemma's caps.
#ifndef VLLM_COMPILE_SCORES
#define VLLM_COMPILE_SCORES

#include "ptx.cuh"

namespace vllm_compile {

// A query sees the last WINDOW positions up to its own, or all if that is 0.  Scores are squeezed into (-cap, cap),
// SOFT_CAP being the bits of that float, or 0: not squeezed.
template <int WINDOW, uint32_t SOFT_CAP>
struct Scores {
  // The first position that a query at `visible` - 1 sees.
  static __device__ __forceinline__ int first(int visible) { return WINDOW == 0 ? 0 : max(visible - WINDOW, 0); }

  // True if its window reaches back to a position.
  static __device__ __forceinline__ bool reaches(int position, int visible) {
    return WINDOW == 0 || position >= visible - WINDOW;
  }

  // Of a product; `scale` is that of the scores times log2(e), and so is what is returned.
  // cap * tanh(s / cap) = cap - 2 * cap / (exp(2 * s / cap) + 1): exact to some 2^-22 of the cap, where tanh.approx is
  // to 2^-11.
  static __device__ __forceinline__ float of(float product, float scale) {
    if constexpr (SOFT_CAP == 0) {
      return product * scale;
    } else {
      const float cap = __uint_as_float(SOFT_CAP), most = cap * 1.44269504f;
      return most - __fdividef(2.f * most, power_of_two(product * (scale * 2.f / cap)) + 1.f);
    }
  }
};

}  // namespace vllm_compile

#endif
