// Memory that is watched.
//
// Tensors and shared memory lie in one reservation of address space, unreadable pages around each and known bytes on
// their own pages beside them, so that what touches others is found out.
//
// Device code is compiled with -fsanitize=thread, whose calls before each load and store end here (the sanitizer's own
// library is not linked).  Two accesses to shared memory, one of them a store, by threads that no barrier orders are a
// race, whatever the order in which they happened to run.  Each warp has a vector clock; barriers join those of the
// warps that wait, and lanes of one warp are ordered by __syncwarp alone.
#include <string.h>
#include <sys/mman.h>

#include "state.h"

namespace cuda_on_host {
namespace {

constexpr size_t PAGE = 4096, ARENA = size_t{2} << 30;
constexpr uint32_t FIRST_ADDRESS = 1024;  // of shared memory: no valid address is 0
constexpr unsigned char SURROUNDING = 0xa5;

struct Region {
  char *begin, *end;           // what a kernel may use
  char *first_page, *no_page;  // whole pages around it
  const char* name;
  uint32_t early;
};

char* arena;
size_t used;
std::vector<Region> regions;  // shared memory of the blocks comes first

[[noreturn]] void blame(const std::string& what, uint64_t code, const Site* site) {
  finish(name_of(*running) + " " + what + (site ? " " + name_of(*site) : ""), code);
}

// Two bytes of shared memory are touched.
void touch(Touched& t, size_t at, bool writes, uint64_t code, const Site* site) {
  const unsigned threads = blocks[0].threads.size(), warps = blocks[0].warps.size();
  const unsigned me = running->block->number * threads + running->index + 1;
  const Clock& clock = running_warp->clock;
  auto unordered = [&](unsigned other, uint32_t then) {
    if (other == 0 || other == me) return false;
    return then >= clock[(other - 1) / threads * warps + (other - 1) % threads / WARP];
  };
  const bool after_write = unordered(t.writer, t.written), after_read = unordered(t.reader, t.read);
  if (after_write || (writes && after_read)) {
    const unsigned other = (after_write ? t.writer : t.reader) - 1;
    blame(formatted("%s byte %zu of shared memory, which %s %s: a race, no barrier is between",
                    writes ? "writes" : "reads", at, name_of(blocks[other / threads].threads[other % threads]).c_str(),
                    after_write ? "wrote" : "read"),
          code, site);
  }
  const uint32_t now = clock[running_warp->number];
  if (writes) {
    t.writer = me, t.written = now, t.fences = running->fences;
  } else if (!after_read) {  // else the first of several readers is kept
    t.reader = me, t.read = now;
  }
}

void check(const void* address, unsigned bytes, unsigned alignment, bool writes, uint64_t code, const Site* site) {
  const char* memory = static_cast<const char*>(address);
  if (memory < arena || memory >= arena + used || !running) return;
  for (size_t i = 0; i < regions.size(); i++) {
    const Region& r = regions[i];
    if (memory < r.begin || memory >= r.end) continue;
    if ((uint64_t)memory % alignment)
      blame(formatted("%s %u bytes, misaligned: ", writes ? "writes" : "reads", bytes) + place_of(memory), code, site);
    if (memory + bytes > r.end) break;
    if (i < blocks.size()) {
      const size_t offset = memory - r.begin;
      for (size_t at = offset / 2; at <= (offset + bytes - 1) / 2; at++)
        touch(blocks[i].touched[at], 2 * at, writes, code, site);
    } else if (!running->waits && r.early < (writes ? ANYTHING : READS)) {
      blame(formatted("%s %s before it waits for the kernels before", writes ? "writes" : "reads", r.name), code, site);
    }
    return;
  }
  blame((writes ? "writes " : "reads ") + place_of(memory), code, site);
}

}  // namespace

bool reserve_memory() {
  void* memory = mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  arena = static_cast<char*>(memory);
  return memory != MAP_FAILED;
}

void release_memory() {
  munmap(arena, ARENA);
  regions.clear();
  used = 0;
}

// The end is as close to the last page's as the alignment allows.
char* allocate(size_t bytes, size_t alignment, const char* name, uint32_t early) {
  const size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
  used += PAGE;
  if (used + whole + PAGE > ARENA) finish("the tensors are too large to be emulated");
  char* first_page = arena + used;
  used += whole + PAGE;
  if (whole && mprotect(first_page, whole, PROT_READ | PROT_WRITE)) finish("no memory for tensors");
  memset(first_page, SURROUNDING, whole);
  char* begin = first_page + whole - (bytes + alignment - 1) / alignment * alignment;
  regions.push_back({begin, begin + bytes, first_page, first_page + whole, name, early});
  return begin;
}

void check_surroundings() {
  for (const Region& r : regions) {
    for (const char* at = r.first_page; at < r.no_page; at++) {
      if (at == r.begin) at = r.end;
      if (at < r.no_page && (unsigned char)*at != SURROUNDING) finish("something was written " + place_of(at));
    }
  }
}

std::string place_of(const void* address) {
  const char* at = static_cast<const char*>(address);
  const Region* nearest = nullptr;
  size_t least = ~size_t{0};
  for (const Region& r : regions) {
    const size_t distance = at < r.begin ? r.begin - at : at >= r.end ? at - r.end + 1 : 0;
    if (distance < least) nearest = &r, least = distance;
  }
  if (!nearest || at < arena || at >= arena + used) return formatted("address %p, which no tensor has", address);
  if (at < nearest->begin) return formatted("%zu bytes before %s", nearest->begin - at, nearest->name);
  if (at >= nearest->end) return formatted("%zu bytes past the end of %s", at - nearest->end, nearest->name);
  return formatted("byte %zu of %s", at - nearest->begin, nearest->name);
}

void access(const void* memory, unsigned bytes, bool writes, Site site) {
  check(memory, bytes, bytes, writes, 0, &site);
}

void access_by_products(const void* memory, unsigned bytes, Site site) {
  access(memory, bytes, false, site);
  const Touched& t = running->block->touched[(static_cast<const char*>(memory) - running->block->shared) / 2];
  if (!t.writer) return;
  const unsigned threads = blocks[0].threads.size(), writer = t.writer - 1;
  const Thread& thread = blocks[writer / threads].threads[writer % threads];
  if (thread.fences == t.fences) blame("reads what has no fence: " + name_of(thread) + " wrote it", 0, &site);
}

void fence_for_products() { running->fences++; }

uint32_t address_of_shared(const void* memory) {
  const char* at = static_cast<const char*>(memory);
  const char* shared = running->block->shared;
  if (at < shared || at > shared + current->shared_bytes)
    blame("takes an address outside of its shared memory: " + place_of(memory), 0, nullptr);
  return at - shared + FIRST_ADDRESS;
}

static char* checked(const Block& block, uint32_t address, unsigned bytes, const char* instruction, Site site) {
  const int64_t offset = (int64_t)address - FIRST_ADDRESS;
  if (offset < 0 || offset + bytes > current->shared_bytes)
    fail(site, "%s of %u bytes at byte %lld of shared memory, which has %u", instruction, bytes, (long long)offset,
         current->shared_bytes);
  if (address % bytes)
    fail(site, "%s of %u bytes at byte %lld of shared memory, misaligned", instruction, bytes, (long long)offset);
  return block.shared + offset;
}

char* shared_at(uint32_t address, unsigned bytes, const char* instruction, Site site) {
  return checked(*running->block, address, bytes, instruction, site);
}

char* shared_of_cluster_at(uint32_t address, uint32_t rank, unsigned bytes, const char* instruction, Site site) {
  if (rank >= current->cluster) fail(site, "%s in block %u of a cluster of %u", instruction, rank, current->cluster);
  const Block& other = *(running->block - rank_in_cluster() + rank);
  if (other.returned == other.threads.size())
    fail(site, "%s in block %u of the cluster, whose threads have returned: its shared memory is another's", instruction,
         rank);
  return checked(other, address, bytes, instruction, site);
}

}  // namespace cuda_on_host

// What -fsanitize=thread calls.
#define CUDA_ON_HOST_HOOKS(bytes)                                                                               \
  extern "C" void __tsan_read##bytes(void* at) {                                                                \
    cuda_on_host::check(at, bytes, bytes, false, (uint64_t)__builtin_return_address(0), nullptr);               \
  }                                                                                                             \
  extern "C" void __tsan_write##bytes(void* at) {                                                               \
    cuda_on_host::check(at, bytes, bytes, true, (uint64_t)__builtin_return_address(0), nullptr);                \
  }
CUDA_ON_HOST_HOOKS(1)
CUDA_ON_HOST_HOOKS(2)
CUDA_ON_HOST_HOOKS(4)
CUDA_ON_HOST_HOOKS(8)
CUDA_ON_HOST_HOOKS(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) {
  if (bytes) cuda_on_host::check(at, bytes, 1, false, (uint64_t)__builtin_return_address(0), nullptr);
}
extern "C" void __tsan_write_range(void* at, size_t bytes) {
  if (bytes) cuda_on_host::check(at, bytes, 1, true, (uint64_t)__builtin_return_address(0), nullptr);
}
extern "C" void __tsan_init() {}
