// The PTX that kernels use beyond CUDA C++, one small function an instruction.
//
// Kernels hold no inline assembly themselves, so that a test can run them on a CPU: with VLLM_COMPILE_ON_HOST defined,
// the same functions come from the emulation in tests/cuda_on_host.
#ifndef VLLM_COMPILE_PTX
#define VLLM_COMPILE_PTX

#include <cuda_bf16.h>

#include <cstdint>

#ifdef VLLM_COMPILE_ON_HOST
#include "ptx_on_host.h"
#else

namespace vllm_compile {

// Address of shared memory as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, both aligned to 16, past L1.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same, or 16 zero bytes; `global` must be a valid address either way.
__device__ __forceinline__ void copy_async_or_zero(uint32_t shared, const void* global, bool copied) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(copied ? 16 : 0)
               : "memory");
}

// `bytes` bytes of global memory to the L2 cache; both they and the address are multiples of 16.
__device__ __forceinline__ void prefetch(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// The copies since the last commit become one group of this thread.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// sum [16, 8] += a [16, 16] @ b [16, 8], of a warp, in the fragments of mma.m16n8k16.
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 * i + r gives the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared)
               : "memory");
}

// An 8 x 8 matrix of 16-bit elements, two neighbours of row lane / 4 in each lane's word, transposed.
__device__ __forceinline__ uint32_t transposed_matrix(uint32_t word) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// Both bf16 numbers of a word times 2^64.
__device__ __forceinline__ uint32_t raised(uint32_t word) {
  uint32_t result;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(0x5f805f80));
  return result;
}

// 2^exponent to some 2^-22 of it, zero below 2^-126: one instruction, where exp2f is four.
__device__ __forceinline__ float power_of_two(float exponent) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
}

// blockIdx.x, read again here: no register keeps it until now.
__device__ __forceinline__ int block_again() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// One more at `counter`, and how many there were.  Who comes later sees what this thread has written or seen before.
__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
}

// Lets the next kernel of the stream start (programmatic dependent launch); it waits before it reads our results.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the kernels before this one are done and their results visible.
__device__ __forceinline__ void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace vllm_compile

#endif
#endif
