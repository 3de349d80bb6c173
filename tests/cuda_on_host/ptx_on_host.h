// The functions of ptx.cuh and wgmma.cuh with the meaning of the PTX instructions that they stand for.
//
// Asynchronous ones take effect as late as they may: copies when they are waited for, and until then their destination
// holds nan; products of a warpgroup likewise, and until then the sums are nan.
#ifndef CUDA_ON_HOST_PTX_ON_HOST
#define CUDA_ON_HOST_PTX_ON_HOST

#include "cuda_bf16.h"

namespace cuda_on_host {

void copy_async(uint32_t shared, const void* global, bool copied, Site site);
void prefetch(const void* global, uint32_t bytes, Site site);
void commit_copies();
void wait_copies(int pending, Site site);
void load_matrices(uint32_t (&to)[4], uint32_t shared, bool transposed, Site site);
uint32_t transposed_matrix(uint32_t word, Site site);
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void wgmma_fence();
void wgmma(float (*sum)[4], int columns, const uint32_t (&a)[4], uint64_t b_descriptor, Site site);
void wgmma_commit();
void wgmma_wait(int pending, Site site);

}  // namespace cuda_on_host

namespace vllm_compile {

using cuda_on_host::Site;

inline uint32_t shared_address(const void* shared) { return cuda_on_host::address_of_shared(shared); }

inline void copy_async(uint32_t shared, const void* global, Site site = Site::current()) {
  cuda_on_host::copy_async(shared, global, true, site);
}
inline void copy_async_or_zero(uint32_t shared, const void* global, bool copied, Site site = Site::current()) {
  cuda_on_host::copy_async(shared, global, copied, site);
}
inline void prefetch(const void* global, uint32_t bytes, Site site = Site::current()) {
  cuda_on_host::prefetch(global, bytes, site);
}
inline void commit_copies() { cuda_on_host::commit_copies(); }
template <int PENDING>
inline void wait_copies(Site site = Site::current()) {
  cuda_on_host::wait_copies(PENDING, site);
}

inline void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current()) {
  cuda_on_host::mma(sum, a, b0, b1, site);
}
inline void load_matrices(uint32_t (&to)[4], uint32_t shared, Site site = Site::current()) {
  cuda_on_host::load_matrices(to, shared, false, site);
}
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t shared, Site site = Site::current()) {
  cuda_on_host::load_matrices(to, shared, true, site);
}

inline uint32_t transposed_matrix(uint32_t word, Site site = Site::current()) {
  return cuda_on_host::transposed_matrix(word, site);
}

inline uint32_t raised(uint32_t word) {
  using namespace cuda_on_host;
  const uint32_t low = bf16_of(float_of(word & 0xffff) * 0x1p64f), high = bf16_of(float_of(word >> 16) * 0x1p64f);
  return high << 16 | low;
}

inline float power_of_two(float exponent) {
  const float result = exp2f(exponent);
  return result < 0x1p-126f ? 0 : result;
}

inline int block_again() { return blockIdx.x; }

inline int arrive(int* counter, Site site = Site::current()) {
  const int before = (*counter)++;
  cuda_on_host::take_turns(site);
  return before;
}

inline void launch_dependents() { cuda_on_host::count_launch_of_dependents(); }
inline void wait_for_kernels_before() { cuda_on_host::count_wait_for_kernels_before(); }

// wgmma.cuh
inline void wgmma_fence() { cuda_on_host::wgmma_fence(); }
inline void wgmma_commit() { cuda_on_host::wgmma_commit(); }
template <int PENDING>
inline void wgmma_wait(Site site = Site::current()) {
  cuda_on_host::wgmma_wait(PENDING, site);
}
template <int TILES>
inline void wgmma_results(float (&)[TILES][4]) {}
template <int TOKENS>
inline void wgmma(float (&sum)[TOKENS / 8][4], const uint32_t (&a)[4], uint64_t b_descriptor,
                  Site site = Site::current()) {
  static_assert(TOKENS % 8 == 0 && TOKENS >= 8 && TOKENS <= 256);
  cuda_on_host::wgmma(sum, TOKENS, a, b_descriptor, site);
}
inline void proxy_fence() { cuda_on_host::fence_for_products(); }
template <int COUNT>
inline void sync_threads(int id, Site site = Site::current()) {
  cuda_on_host::barrier(id, COUNT, site);
}

// mbarriers.
inline void phase_init(uint32_t barrier, uint32_t count, Site site = Site::current()) {
  cuda_on_host::phase_init(barrier, count, site);
}
inline void phase_arrive(uint32_t barrier, Site site = Site::current()) { cuda_on_host::phase_arrive(barrier, site); }
inline void phase_wait(uint32_t barrier, uint32_t parity, Site site = Site::current()) {
  cuda_on_host::phase_wait(barrier, parity, site);
}

// Clusters.
inline uint32_t cluster_rank() { return cuda_on_host::rank_in_cluster(); }
inline void cluster_arrive_and_wait(Site site = Site::current()) { cuda_on_host::cluster_barrier(site); }
inline float4 load_cluster(uint32_t shared_address, uint32_t rank, Site site = Site::current()) {
  const void* from = cuda_on_host::shared_of_cluster_at(shared_address, rank, 16, "load_cluster", site);
  return *static_cast<const float4*>(from);
}
inline void store_cluster(uint32_t shared_address, uint32_t rank, float4 value, Site site = Site::current()) {
  *reinterpret_cast<float4*>(cuda_on_host::shared_of_cluster_at(shared_address, rank, 16, "store_cluster", site)) =
      value;
}

}  // namespace vllm_compile

#endif
