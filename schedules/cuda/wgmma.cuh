// Hopper's products of a warpgroup, and what thread blocks of a cluster share: the PTX of wide kernels.
//
// Four warps multiply together, without waiting for the result: the fragments of A are in registers, B is in shared
// memory.  The registers of A and of the sums must not be touched until `wgmma_wait` says that the products are done.
#ifndef VLLM_COMPILE_WGMMA
#define VLLM_COMPILE_WGMMA

#include "ptx.cuh"

namespace vllm_compile {

// Describes B [K 16, N] in shared memory without swizzling, to `wgmma`: made of 8 x 8 matrices that are 128 contiguous
// bytes each, 16 (8 values of k) for each n.  Bytes from one matrix to the next, along k and along n.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t along_k, uint32_t along_n) {
  return (uint64_t)(along_n >> 4) << 32 | (along_k >> 4) << 16 | (shared & 0x3ffff) >> 4;
}

#ifndef VLLM_COMPILE_ON_HOST

// Before products: registers written so far (A, the sums) can be read by them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last commit become one group of this warp.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until no more than PENDING of this warp's groups are under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After the last wait: keeps the compiler from reading the sums before it.
template <int TILES>
__device__ __forceinline__ void wgmma_results(float (&sum)[TILES][4]) {
#pragma unroll
  for (int i = 0; i < TILES; i++)
    asm volatile("" : "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])::"memory");
}

#define VLLM_COMPILE_SUM(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])

// sum [64, TOKENS] += a [64, 16] @ b [16, TOKENS], of a warpgroup.  Warp w has rows 16 * w to + 15 of a and sum, in the
// fragments of mma.m16n8k16; b is K-major.
template <int TOKENS>
__device__ __forceinline__ void wgmma(float (&sum)[TOKENS / 8][4], const uint32_t (&a)[4], uint64_t b_descriptor) {
  static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32 || TOKENS == 64, "widths that kernels use");
  if constexpr (TOKENS == 8) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
        : VLLM_COMPILE_SUM(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor));
  } else if constexpr (TOKENS == 16) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
        "{%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
        : VLLM_COMPILE_SUM(0), VLLM_COMPILE_SUM(1)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor));
  } else if constexpr (TOKENS == 32) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
        : VLLM_COMPILE_SUM(0), VLLM_COMPILE_SUM(1), VLLM_COMPILE_SUM(2), VLLM_COMPILE_SUM(3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
        : VLLM_COMPILE_SUM(0), VLLM_COMPILE_SUM(1), VLLM_COMPILE_SUM(2), VLLM_COMPILE_SUM(3), VLLM_COMPILE_SUM(4),
          VLLM_COMPILE_SUM(5), VLLM_COMPILE_SUM(6), VLLM_COMPILE_SUM(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor));
  }
}

#undef VLLM_COMPILE_SUM

// What this thread has written to shared memory becomes visible to products that start after a barrier.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of COUNT threads, whole warps; id 0 is that of __syncthreads.
template <int COUNT>
__device__ __forceinline__ void sync_threads(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}

// A barrier in shared memory that is passed again and again: phase p ends when `count` threads have arrived in it.
__device__ __forceinline__ void phase_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Arrives; what this thread did before is seen by those who wait.
__device__ __forceinline__ void phase_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity is over.
__device__ __forceinline__ void phase_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// This thread block's number within its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of a cluster, after which they see each other's shared memory as it was before.
__device__ __forceinline__ void cluster_arrive_and_wait() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Four floats at this address in the shared memory of a thread block of the cluster.
__device__ __forceinline__ float4 load_cluster(uint32_t shared_address, uint32_t rank) {
  float4 to;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n"
      "}"
      : "=f"(to.x), "=f"(to.y), "=f"(to.z), "=f"(to.w)
      : "r"(shared_address), "r"(rank)
      : "memory");
  return to;
}

#endif

}  // namespace vllm_compile

#endif
