// What emulator.cpp and memory.cpp share: the blocks that run together, and what is known of their threads.
#ifndef CUDA_ON_HOST_STATE
#define CUDA_ON_HOST_STATE

#include <map>
#include <string>
#include <vector>

#include "emulator.h"

namespace cuda_on_host {

struct Block;

struct Thread {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  unsigned index = 0;
  uint3 place{};
  bool returned = false;
  const char* waits_at = nullptr;
  uint32_t mask = 0;  // of the lanes it waits for
  Site site;
  unsigned launches = 0, waits = 0, fences = 0;
  unsigned votes = 0;  // at barriers, that have been counted
  Asynchronous* asynchronous = nullptr;
};

// Lanes that have come to one instruction.
struct Meeting {
  const char* name;
  uint32_t mask, come;
  Site site;
  void* own[WARP];
};

using Clock = std::vector<uint32_t>;  // by warp

struct Warp {
  Block* block = nullptr;
  unsigned number = 0;            // among all that run together
  uint32_t lanes = 0, ready = 0;  // that exist, that can go on
  uint32_t priority = 0;
  std::vector<Meeting> meetings;
  Clock clock;
};

struct Barrier {
  unsigned come = 0, wanted = 0;  // 0: all threads
  std::vector<Thread*> waiting;
};

// An mbarrier.
struct Phases {
  uint32_t count = 0, come = 0, over = 0;  // threads of a phase, that have arrived in this one; phases that are over
  Clock arrived, known;                    // of those in this phase; of all in those that are over
  std::vector<Thread*> waiting;
};

// Who touched two bytes of shared memory last (thread number + 1), and when by its warp's clock.
struct Touched {
  uint16_t writer, reader;
  uint32_t written, read;
  uint32_t fences;  // of the writer, before it wrote
};

struct Block {
  uint3 place{};
  unsigned number = 0;  // among those that run together
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::map<uint32_t, Phases> phases;  // by address
  bool any[3];  // of the last vote, of this one, of the next: nobody is further ahead
  unsigned returned = 0;
  char* shared = nullptr;
  std::vector<Touched> touched;
};

extern Launch* current;
extern std::vector<Block> blocks;
extern Thread* running;
extern Warp* running_warp;

std::string formatted(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(const Thread& thread);
std::string name_of(Site site);
[[noreturn]] void finish(const std::string& message, uint64_t code = 0);

// Memory that kernels may use, unreadable pages around it.
bool reserve_memory();
void release_memory();
char* allocate(size_t bytes, size_t alignment, const char* name, uint32_t early);
std::string place_of(const void* address);
void check_surroundings();

}  // namespace cuda_on_host

#endif
