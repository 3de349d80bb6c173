// Threads that wait for each other; see emulator.h.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <utility>

#include "state.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

// Keeps what a called function has to keep on the stack, changes stacks, and goes on there.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");

namespace cuda_on_host {

Launch* current;
std::vector<Block> blocks;
Thread* running;
Warp* running_warp;

namespace {

constexpr size_t STACK = 128 << 10;
constexpr uint64_t STACK_END = 0x5ac4e4d05ac4e4d0;  // in a stack's last word
constexpr unsigned MOST_SHARED = 227 << 10, MOST_THREADS = 1024, MOST_CLUSTER = 16;
constexpr int SECONDS_WITHOUT_WAITING = 30;  // of one thread: it counts as hung
constexpr uint64_t MOST_TURNS = 3'000'000;   // taken while nobody gets anywhere: they count as hung

Body body;
const uint64_t* values;
char* stacks;  // of the threads that run together
size_t stack_bytes;
std::vector<Barrier> cluster_barriers;
void* scheduler;
sigjmp_buf home;
pthread_t host_thread;
uint64_t random_state, switches, turns;

uint32_t random_below(uint32_t bound) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1d >> 32) * bound >> 32;
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), host_thread)) {  // a timer's may come to any thread
    pthread_kill(host_thread, number);
    return;
  }
  static uint64_t seen;
  static int seconds;
  if (number == SIGVTALRM) {
    seconds = switches == seen ? seconds + 1 : 0;
    seen = switches;
    if (seconds < SECONDS_WITHOUT_WAITING) return;
    seconds = 0;
  }
  const uint64_t code = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  const std::string who = running ? name_of(*running) : "the emulator";
  const char* at = static_cast<const char*>(info->si_addr);
  if (number == SIGVTALRM) finish(who + " neither waits nor returns", code);
  if (number == SIGILL) finish(who + " leaves the bounds of an array of its own", code);
  if (number == SIGFPE) finish(who + " divides by zero", code);
  finish(who + " accesses " + place_of(at), code);
}

// ---- Waiting

void wait_at(const char* name, Site site, uint32_t mask = 0) {
  running->waits_at = name, running->site = site, running->mask = mask;
  running_warp->ready &= ~(1u << lane());
}

void wake(Thread& thread) {
  thread.waits_at = nullptr;
  thread.block->warps[thread.index / WARP].ready |= 1u << thread.index % WARP;
  turns = 0;
}

uint64_t& stack_end(const Thread& thread) {
  const size_t number = thread.block->number * thread.block->threads.size() + thread.index;
  return *reinterpret_cast<uint64_t*>(stacks + number * STACK);
}

void leave() {
  if (stack_end(*running) != STACK_END) finish(name_of(*running) + " needs more stack than it has");
  cuda_on_host_switch(&running->stack_pointer, scheduler);
}

bool is_complete(const Barrier& b, const Block& block) {
  return b.come && b.come >= (b.wanted ? b.wanted : block.threads.size() - block.returned);
}

// All go on, and each knows what the others have done before.
void complete(Barrier& b) {
  std::vector<Warp*> warps;
  for (Thread* thread : b.waiting) {
    wake(*thread);
    warps.push_back(&thread->block->warps[thread->index / WARP]);
  }
  std::sort(warps.begin(), warps.end());
  warps.erase(std::unique(warps.begin(), warps.end()), warps.end());
  Clock joined(warps[0]->clock.size());
  for (Warp* warp : warps) {
    warp->clock[warp->number]++;
    for (size_t i = 0; i < joined.size(); i++) joined[i] = std::max(joined[i], warp->clock[i]);
  }
  for (Warp* warp : warps) warp->clock = joined;
  b = {};
}

void come_to(Barrier& b, unsigned wanted, const char* name, Site site) {
  for (const Thread* other : b.waiting) {
    if (other->block == running->block && other->index / WARP == running->index / WARP &&
        other->site.line() != site.line())
      fail(site, "comes to a barrier, but lane %u of its warp to another %s", other->index % WARP,
           name_of(other->site).c_str());
  }
  wait_at(name, site);
  b.waiting.push_back(running);
  b.wanted = wanted;
  b.come++;
  if (is_complete(b, *running->block)) complete(b);
  leave();
}

// ---- Running

void run_thread() {
  body(values, running->block->shared);
  Block& block = *running->block;
  running->returned = true;
  running_warp->ready &= ~(1u << lane());
  turns = 0;
  block.returned++;
  if (is_complete(block.barriers[0], block)) complete(block.barriers[0]);
  leave();
  __builtin_unreachable();
}

void start(Thread& thread) {
  stack_end(thread) = STACK_END;
  uint64_t* top = &stack_end(thread) + STACK / sizeof(uint64_t);
  *--top = 0;  // where a caller's address would be: the stack is aligned as after a call
  *--top = reinterpret_cast<uint64_t>(&run_thread);
  for (int i = 0; i < 6; i++) *--top = 0;  // registers
  thread.stack_pointer = top;
}

[[noreturn]] void report_deadlock() {
  std::string text = "deadlock, no thread can go on:";
  for (const Block& block : blocks) {
    for (unsigned w = 0; w < block.warps.size(); w++) {
      std::map<std::string, uint32_t> lanes;  // by what they wait for
      for (unsigned i = w * WARP; i < std::min<size_t>((w + 1) * WARP, block.threads.size()); i++) {
        const Thread& t = block.threads[i];
        std::string where = "have returned";
        if (!t.returned) where = formatted("wait at %s ", t.waits_at) + name_of(t.site);
        if (!t.returned && t.mask) where += formatted(" for lanes %08x", t.mask);
        lanes[where] |= 1u << i % WARP;
      }
      if (lanes.size() == 1 && lanes.contains("have returned")) continue;
      text += formatted("\n  block (%u, %u, %u), warp %u:", block.place.x, block.place.y, block.place.z, w);
      for (const auto& [where, which] : lanes) text += formatted(" lanes %08x ", which) + where + ";";
    }
  }
  finish(text);
}

// In one of two kinds of order: warps advance alike, or some always before others, as far as barriers allow.
void run_together() {
  std::vector<Warp*> warps;
  for (Block& block : blocks)
    for (Warp& warp : block.warps) warps.push_back(&warp);
  for (Warp* warp : warps) warp->priority = random_below(~0u);
  const bool alike = random_below(2);
  Warp* chosen = nullptr;
  for (;;) {
    if (!chosen || !chosen->ready || random_below(32) == 0) {
      if (chosen && (alike || random_below(64) == 0)) chosen->priority = random_below(~0u);
      chosen = nullptr;
      for (Warp* warp : warps)
        if (warp->ready && (!chosen || warp->priority > chosen->priority)) chosen = warp;
      if (!chosen) break;
    }
    const unsigned turn = random_below(WARP);
    const uint32_t turned = chosen->ready >> turn | uint64_t{chosen->ready} << (WARP - turn);
    const unsigned lane = (__builtin_ctz(turned) + turn) % WARP;
    running_warp = chosen;
    running = &chosen->block->threads[(chosen - chosen->block->warps.data()) * WARP + lane];
    threadIdx = running->place;
    blockIdx = running->block->place;
    switches++;
    cuda_on_host_switch(&scheduler, running->stack_pointer);
    running = nullptr;
  }
  for (const Block& block : blocks)
    if (block.returned < block.threads.size()) report_deadlock();
}

void set_up(Block& block, unsigned number, unsigned linear, unsigned threads, char* shared) {
  const Launch& l = *current;
  const unsigned warps = (threads + WARP - 1) / WARP;
  block.place = {linear % l.grid[0], linear / l.grid[0] % l.grid[1], linear / l.grid[0] / l.grid[1]};
  block.number = number;
  block.returned = 0;
  for (Barrier& b : block.barriers) b = {};
  for (bool& any : block.any) any = false;
  block.phases.clear();
  block.warps.assign(warps, {});
  for (unsigned w = 0; w < warps; w++) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.number = number * warps + w;
    warp.lanes = warp.ready = ALL_LANES >> (WARP - std::min<unsigned>(WARP, threads - w * WARP));
    warp.clock.assign(blocks.size() * warps, 0);
    warp.clock[warp.number] = 1;
  }
  block.threads.resize(threads);
  for (unsigned i = 0; i < threads; i++) {
    Thread& t = block.threads[i];
    Asynchronous* const kept = t.asynchronous ? t.asynchronous : new_asynchronous();
    forget(*kept);
    t = {};
    t.asynchronous = kept;
    t.block = &block;
    t.index = i;
    t.place = {i % l.threads[0], i / l.threads[0] % l.threads[1], i / l.threads[0] / l.threads[1]};
    start(t);
  }
  block.shared = shared;
  memset(shared, 0xff, l.shared_bytes);  // nan
  block.touched.assign((l.shared_bytes + 1) / 2, {});
}

void count(const Block& block) {
  Launch& l = *current;
  for (const Thread& t : block.threads) {
    l.launched[0] = std::min(l.launched[0], t.launches), l.launched[1] = std::max(l.launched[1], t.launches);
    l.waited[0] = std::min(l.waited[0], t.waits), l.waited[1] = std::max(l.waited[1], t.waits);
  }
}

void run_grid() {
  Launch& l = *current;
  const unsigned total = l.grid[0] * l.grid[1] * l.grid[2], threads = l.threads[0] * l.threads[1] * l.threads[2];
  if (!threads || threads > MOST_THREADS) finish(formatted("a block of %u threads", threads));
  if (l.shared_bytes > MOST_SHARED) finish(formatted("a block with %u bytes of shared memory", l.shared_bytes));
  if (!l.cluster || l.cluster > MOST_CLUSTER || l.grid[0] % l.cluster || l.together % l.cluster)
    finish(formatted("clusters of %u blocks in a grid of %u, %u together", l.cluster, l.grid[0], l.together));
  if (!total) return;
  const unsigned together = std::min(total, l.together);
  if (together * threads > UINT16_MAX) finish(formatted("%u threads together", together * threads));

  // Aligned as products in shared memory with swizzled rows want it.
  std::vector<char*> shared;
  for (unsigned i = 0; i < together; i++) shared.push_back(allocate(l.shared_bytes, 1024, "shared memory", ANYTHING));
  std::vector<uint64_t> places;
  std::map<uint64_t, uint64_t> copies;  // tensors that are given twice are one
  for (unsigned i = 0; i < l.count; i++) {
    const Argument& a = l.arguments[i];
    places.push_back(a.value);
    if (!a.is_tensor) continue;
    if (!copies.contains(a.value)) {
      char* copy = allocate(a.bytes, 16, a.name, a.early);
      memcpy(copy, reinterpret_cast<const void*>(a.value), a.bytes);
      copies[a.value] = reinterpret_cast<uint64_t>(copy);
    }
    places[i] = copies[a.value];
  }
  values = places.data();
  stack_bytes = together * threads * STACK;
  void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) finish(formatted("no memory for %zu bytes of stacks", std::exchange(stack_bytes, 0)));
  stacks = static_cast<char*>(memory);

  blockDim = {l.threads[0], l.threads[1], l.threads[2]};
  gridDim = {l.grid[0], l.grid[1], l.grid[2]};
  l.launched[0] = l.waited[0] = ~0u;
  std::vector<unsigned> order;
  for (unsigned first = 0; first < total; first += together) order.push_back(first);
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
  for (unsigned first : order) {
    blocks.resize(std::min(together, total - first));
    cluster_barriers.assign(blocks.size() / l.cluster, {});
    for (unsigned i = 0; i < blocks.size(); i++) set_up(blocks[i], i, first + i, threads, shared[i]);
    run_together();
    for (const Block& block : blocks) count(block);
  }
  check_surroundings();
  for (unsigned i = 0; i < l.count; i++) {
    const Argument& a = l.arguments[i];
    if (a.is_tensor) memcpy(reinterpret_cast<void*>(a.value), reinterpret_cast<const void*>(places[i]), a.bytes);
  }
}

}  // namespace

std::string formatted(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

std::string name_of(const Thread& thread) {
  const uint3 b = thread.block->place;
  return formatted("thread %u (warp %u, lane %u) of block (%u, %u, %u)", thread.index, thread.index / WARP,
                   thread.index % WARP, b.x, b.y, b.z);
}

std::string name_of(Site site) {
  const char* slash = strrchr(site.file_name(), '/');
  return formatted("(%s:%u)", slash ? slash + 1 : site.file_name(), site.line());
}

void finish(const std::string& message, uint64_t code) {
  extern const char code_start[] asm("__ehdr_start");
  snprintf(current->message, sizeof current->message, "%s", message.c_str());
  current->code = code ? code - reinterpret_cast<uint64_t>(code_start) : 0;
  siglongjmp(home, 1);
}

void fail(Site site, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  finish(name_of(*running) + ": " + text + " " + name_of(site));
}

int lane() { return running->index % WARP; }

void collective(const char* name, uint32_t mask, bool aligned, void* own, Together together, Site site) {
  Warp& warp = *running_warp;
  const uint32_t me = 1u << lane();
  mask &= warp.lanes;
  if (!(mask & me)) fail(site, "is not among the lanes %08x of its own %s", mask, name);
  auto same = [&](const Meeting& m) {
    return m.mask == mask && !(m.come & me) && !strcmp(m.name, name) && (!aligned || m.site.line() == site.line());
  };
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(), same);
  if (meeting == warp.meetings.end()) meeting = warp.meetings.insert(meeting, {name, mask, 0, site, {}});
  meeting->come |= me;
  meeting->own[lane()] = own;
  wait_at(name, site, mask);
  if (meeting->come == mask) {
    const Meeting met = *meeting;
    warp.meetings.erase(meeting);
    together(met.own, mask);
    Thread* const lanes = running - lane();
    for (int i = 0; i < WARP; i++)
      if (mask >> i & 1) wake(lanes[i]);
    if (random_below(4)) return;  // else another lane may be the first to go on
  }
  leave();
}

void order_warp() { running_warp->clock[running_warp->number]++; }

void barrier(int id, int threads, Site site) {
  Block& block = *running->block;
  if (id < 0 || id >= (int)std::size(block.barriers)) fail(site, "there is no barrier %d", id);
  if (threads % WARP) fail(site, "a barrier of %d threads, which are no whole warps", threads);
  Barrier& b = block.barriers[id];
  if (b.come && b.wanted != (unsigned)threads)
    fail(site, "wants %d threads at barrier %d, others %u", threads, id, b.wanted);
  come_to(b, threads, threads ? "a named barrier" : "__syncthreads", site);
}

bool barrier_or(bool predicate, Site site) {
  Block& block = *running->block;
  const unsigned vote = running->votes++;
  block.any[vote % 3] |= predicate;
  block.any[(vote + 1) % 3] = false;
  barrier(0, 0, site);
  return block.any[vote % 3];
}

void cluster_barrier(Site site) {
  const unsigned wanted = current->cluster * blocks[0].threads.size();
  come_to(cluster_barriers[running->block->number / current->cluster], wanted, "cluster_arrive_and_wait", site);
}

uint32_t rank_in_cluster() { return running->block->number % current->cluster; }

void phase_init(uint32_t address, uint32_t count, Site site) {
  if (!count) fail(site, "a barrier of no threads");
  access(shared_at(address, 8, "mbarrier.init", site), 8, true, site);
  running->block->phases[address] = {count};
}

static Phases& phases_at(uint32_t address, const char* instruction, Site site) {
  access(shared_at(address, 8, instruction, site), 8, false, site);  // its initialisation is ordered before
  auto found = running->block->phases.find(address);
  if (found == running->block->phases.end()) fail(site, "%s where there is no barrier", instruction);
  return found->second;
}

static void join(Clock& to, const Clock& from) {
  to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

void phase_arrive(uint32_t address, Site site) {
  Phases& p = phases_at(address, "mbarrier.arrive", site);
  running_warp->clock[running_warp->number]++;
  join(p.arrived, running_warp->clock);
  if (++p.come < p.count) return;
  p.come = 0, p.over++;
  join(p.known, p.arrived);
  for (Thread* thread : p.waiting) wake(*thread);
  p.waiting.clear();
}

void phase_wait(uint32_t address, uint32_t parity, Site site) {
  Phases& p = phases_at(address, "mbarrier.try_wait", site);
  if (parity > 1) fail(site, "a parity of %u", parity);
  while (p.over % 2 == parity) {
    wait_at("phase_wait", site);
    p.waiting.push_back(running);
    leave();
  }
  if (!p.known.empty()) join(running_warp->clock, p.known);
}

void take_turns(Site site) {
  if (++turns > MOST_TURNS) fail(site, "waits in a loop for what does not happen");
  running_warp->priority = random_below(~0u);
  leave();
}

Asynchronous& asynchronous() { return *running->asynchronous; }
Asynchronous& asynchronous(int of_lane) { return *running[of_lane - lane()].asynchronous; }

void count_launch_of_dependents() { running->launches++; }
void count_wait_for_kernels_before() { running->waits++; }

int launch(Launch& l, Body what) {
  constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
  static char signal_stack[64 << 10];
  struct sigaction own = {}, before[std::size(SIGNALS)];
  own.sa_sigaction = on_signal;
  own.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const stack_t stack = {signal_stack, 0, sizeof signal_stack};
  stack_t stack_before;
  const itimerval second = {{1, 0}, {1, 0}};
  itimerval timer_before;

  if (!reserve_memory()) return 2;
  current = &l;
  body = what;
  random_state = l.seed * 2 + 1;
  host_thread = pthread_self();
  sigaltstack(&stack, &stack_before);
  for (size_t i = 0; i < std::size(SIGNALS); i++) sigaction(SIGNALS[i], &own, &before[i]);
  setitimer(ITIMER_VIRTUAL, &second, &timer_before);
  const int failed = sigsetjmp(home, 1);
  if (!failed) run_grid();
  setitimer(ITIMER_VIRTUAL, &timer_before, nullptr);
  for (size_t i = 0; i < std::size(SIGNALS); i++) sigaction(SIGNALS[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  running = nullptr;
  release_memory();
  if (stack_bytes) munmap(stacks, stack_bytes);
  stack_bytes = 0;
  return failed;
}

}  // namespace cuda_on_host
