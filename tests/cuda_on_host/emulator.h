// What device code on a CPU is built on: threads that wait for each other, and memory that is watched.
//
// Every CUDA thread is a fiber with a stack of its own; all run on one thread of the host, so nothing but a seed
// decides their order.  A fiber runs until it waits: for lanes of its warp, at a barrier, or for others to have a turn.
#ifndef CUDA_ON_HOST_EMULATOR
#define CUDA_ON_HOST_EMULATOR

#include <stddef.h>
#include <stdint.h>

#include <source_location>

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;

// Of the running thread.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

using Site = std::source_location;  // of a call in the kernel, for messages

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffff;

// Ends the launch with a message about the running thread.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);

int lane();

// What the running thread does together with others of its warp: once every lane of `mask` has come with the same
// `name`, `mask` and, if `aligned`, from the same line of the kernel, `together` is called, with what each brought.
using Together = void (*)(void* const (&own)[WARP], uint32_t mask);
void collective(const char* name, uint32_t mask, bool aligned, void* own, Together together, Site site);

// Barrier `id` of the block, complete when `threads` threads have come; 0: all that have not returned.
void barrier(int id, int threads, Site site);
bool barrier_or(bool predicate, Site site);  // barrier 0; true for all if it is for one
void cluster_barrier(Site site);
uint32_t rank_in_cluster();

// An mbarrier at an address of shared memory, complete when `count` threads have arrived, again and again.
void phase_init(uint32_t address, uint32_t count, Site site);
void phase_arrive(uint32_t address, Site site);
void phase_wait(uint32_t address, uint32_t parity, Site site);  // for the phase of this parity

// Lets other threads run.
void take_turns(Site site);

// Shared memory: addresses as instructions take them, and what they are on the host, checked.
uint32_t address_of_shared(const void* memory);
char* shared_at(uint32_t address, unsigned bytes, const char* instruction, Site site);
char* shared_of_cluster_at(uint32_t address, uint32_t rank, unsigned bytes, const char* instruction, Site site);

// An access that the compiler does not see, to be checked like the others.
void access(const void* memory, unsigned bytes, bool writes, Site site);
// The same, of wgmma, which sees what threads have written before a fence of theirs.
void access_by_products(const void* memory, unsigned bytes, Site site);
void fence_for_products();
// The lanes of this warp have met at __syncwarp, the one instruction that orders their accesses.
void order_warp();

// Programmatic dependent launch, counted by thread.
void count_launch_of_dependents();
void count_wait_for_kernels_before();

// What belongs to instructions (ptx_on_host.cpp) and is kept for each thread.
struct Asynchronous;
Asynchronous& asynchronous();
Asynchronous& asynchronous(int lane);  // of another lane of the warp
Asynchronous* new_asynchronous();
void forget(Asynchronous& asynchronous);

// One launch; runner.py has the same structures.
// What may be done with a tensor before wait_for_kernels_before.
enum Early : uint32_t { NOTHING, READS, ANYTHING };

struct Argument {
  const char* name;
  uint64_t value;      // of a tensor: its address
  uint64_t bytes;      // of a tensor
  uint32_t is_tensor;  // else a number, or null
  uint32_t early;      // an Early
};

struct Launch {
  uint32_t grid[3], threads[3];
  uint32_t cluster, together, shared_bytes, count;
  uint64_t seed;
  const Argument* arguments;
  uint32_t launched[2], waited[2];  // least and most calls of a thread
  uint64_t code;                    // where it failed, from the start of the library; 0 if unknown
  char message[4096];
};

using Body = void (*)(const uint64_t* values, void* shared);
int launch(Launch& launch, Body body);  // nonzero if it failed

}  // namespace cuda_on_host

#endif
