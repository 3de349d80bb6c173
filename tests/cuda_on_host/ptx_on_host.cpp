// See ptx_on_host.h.  Fragments are those of the PTX ISA: lane (g, t) = (lane / 4, lane % 4).
#include "ptx_on_host.h"

#include <deque>
#include <map>
#include <vector>

namespace cuda_on_host {
namespace {

struct Copy {
  char* to;
  const void* from;
  bool copied;
};

struct Product {
  float (*sum)[4];
  int columns;
  const uint32_t* registers_of_a;
  uint32_t a[4];
  uint64_t b_descriptor;
};

using Sums = std::vector<float>;  // [columns / 8][4], as in a thread's registers

// One row of A and one column of B, added to a sum: exact, then rounded once.
float dot(const uint16_t* a, const uint16_t* b, float sum) {
  double total = sum;
  for (int k = 0; k < 16; k++) total += (double)float_of(a[k]) * float_of(b[k]);
  return (float)total;
}

// Rows of A [16, 16] from the fragments of all lanes.
void gather_a(uint16_t (&rows)[16][16], int lane, const uint32_t (&a)[4]) {
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; i++) {
    uint16_t* to = &rows[g + i % 2 * 8][t * 2 + i / 2 * 8];
    to[0] = a[i] & 0xffff, to[1] = a[i] >> 16;
  }
}

}  // namespace

// A thread's copies and products that are under way, in groups, the oldest first; those not committed yet apart.
struct Asynchronous {
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::map<void*, Sums> sums;  // by their place: what they really are while the place holds nan
  bool fenced = false;
};

Asynchronous* new_asynchronous() { return new Asynchronous; }
void forget(Asynchronous& asynchronous) { asynchronous = {}; }

// ---- cp.async

void copy_async(uint32_t shared, const void* global, bool copied, Site site) {
  char* to = shared_at(shared, 16, "cp.async", site);
  access(to, 16, true, site);
  memset(to, 0xff, 16);
  if (copied) {
    if ((uint64_t)global % 16) fail(site, "cp.async from a misaligned address");
    access(global, 16, false, site);
    volatile char first = *static_cast<const char*>(global);  // is there such an address?
    (void)first;
  }
  asynchronous().copies.push_back({to, global, copied});
}

// It changes nothing that a kernel sees; but what it names must be there.
void prefetch(const void* global, uint32_t bytes, Site site) {
  if ((uint64_t)global % 16 || bytes % 16 || bytes == 0) fail(site, "prefetch of misaligned or of no bytes");
  volatile char first = *static_cast<const char*>(global), last = static_cast<const char*>(global)[bytes - 1];
  (void)first, (void)last;
}

void commit_copies() {
  Asynchronous& own = asynchronous();
  own.copy_groups.push_back(std::move(own.copies));
  own.copies.clear();
}

void wait_copies(int pending, Site site) {
  std::deque<std::vector<Copy>>& groups = asynchronous().copy_groups;
  for (; (int)groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      access(copy.to, 16, true, site);
      if (copy.copied)
        memcpy(copy.to, copy.from, 16);
      else
        memset(copy.to, 0, 16);
    }
  }
}

// ---- ldmatrix, movmatrix, mma

namespace {

struct Matrices {
  const char* row;
  uint32_t (*to)[4];
  bool transposed;
};

void load_all(void* const (&own)[WARP], uint32_t) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < WARP; lane++)
    memcpy(matrix[lane / 8][lane % 8], static_cast<Matrices*>(own[lane])->row, 16);
  for (int lane = 0; lane < WARP; lane++) {
    const Matrices& m = *static_cast<Matrices*>(own[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      const uint32_t low = m.transposed ? matrix[i][2 * t][g] : matrix[i][g][2 * t];
      const uint32_t high = m.transposed ? matrix[i][2 * t + 1][g] : matrix[i][g][2 * t + 1];
      (*m.to)[i] = high << 16 | low;
    }
  }
}

void transpose_all(void* const (&own)[WARP], uint32_t) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < WARP; lane++) memcpy(&matrix[lane / 4][lane % 4 * 2], own[lane], 4);
  for (int lane = 0; lane < WARP; lane++) {
    const int g = lane / 4, t = lane % 4;
    *static_cast<uint32_t*>(own[lane]) = static_cast<uint32_t>(matrix[2 * t + 1][g]) << 16 | matrix[2 * t][g];
  }
}

struct Mma {
  float (*sum)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];
};

void multiply_all(void* const (&own)[WARP], uint32_t) {
  uint16_t a[16][16], b[8][16];
  for (int lane = 0; lane < WARP; lane++) {
    const Mma& m = *static_cast<Mma*>(own[lane]);
    gather_a(a, lane, *m.a);
    for (int i = 0; i < 2; i++) {
      uint16_t* to = &b[lane / 4][lane % 4 * 2 + i * 8];
      to[0] = m.b[i] & 0xffff, to[1] = m.b[i] >> 16;
    }
  }
  for (int lane = 0; lane < WARP; lane++) {
    float(&sum)[4] = *static_cast<Mma*>(own[lane])->sum;
    for (int i = 0; i < 4; i++) sum[i] = dot(a[lane / 4 + i / 2 * 8], b[lane % 4 * 2 + i % 2], sum[i]);
  }
}

}  // namespace

void load_matrices(uint32_t (&to)[4], uint32_t shared, bool transposed, Site site) {
  Matrices own = {shared_at(shared, 16, "ldmatrix", site), &to, transposed};
  access(own.row, 16, false, site);
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", ALL_LANES, true, &own, load_all, site);
}

uint32_t transposed_matrix(uint32_t word, Site site) {
  collective("movmatrix", ALL_LANES, true, &word, transpose_all, site);
  return word;
}

void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Mma own = {&sum, &a, {b0, b1}};
  collective("mma", ALL_LANES, true, &own, multiply_all, site);
}

// ---- wgmma
//
// With A in registers, no warp needs another's: each has its own 16 rows of A and of the sums.

namespace {

// Value of B, which is K-major (a column's values of k lie together), by its descriptor.
const char* address_in_b(uint64_t descriptor, int column, int k, Site site) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address;
  switch (descriptor >> 62) {
    case 0:  // 8 x 8 matrices, each contiguous
      address = start + k / 8 * leading + column / 8 * stride + column % 8 * 16 + k % 8 * 2;
      break;
    case 1:  // columns of 128 bytes, whose parts of 16 are exchanged
      address = start + column / 8 * stride + column % 8 * 128 + k * 2;
      address ^= (address >> 7 & 7) << 4;
      break;
    default:
      fail(site, "wgmma with a swizzle that is not emulated");
  }
  return shared_at(address, 2, "wgmma", site);
}

struct Waiting {
  int pending;
  Site site;
};

void multiply_group(const std::vector<Product>& products, size_t group, Site site) {
  for (size_t p = 0; p < products.size(); p++) {
    const Product& own = products[p];
    uint16_t a[16][16], b[256][16];
    for (int lane = 0; lane < WARP; lane++) {
      const std::vector<Product>& theirs = asynchronous(lane).product_groups[group];
      if (theirs.size() <= p || theirs[p].b_descriptor != own.b_descriptor || theirs[p].columns != own.columns)
        fail(site, "wgmma, but lane %d of its warp has another or none", lane);
      if (memcmp(theirs[p].a, theirs[p].registers_of_a, sizeof own.a))
        fail(site, "A of a wgmma was changed before it was waited for");
      gather_a(a, lane, theirs[p].a);
    }
    for (int column = 0; column < own.columns; column++) {
      for (int k = 0; k < 16; k++) {
        const char* from = address_in_b(own.b_descriptor, column, k, site);
        access_by_products(from, 2, site);
        memcpy(&b[column][k], from, 2);
      }
    }
    for (int lane = 0; lane < WARP; lane++) {
      Asynchronous& theirs = asynchronous(lane);
      Sums& sums = theirs.sums[theirs.product_groups[group][p].sum];
      for (size_t i = 0; i < sums.size(); i++)
        sums[i] = dot(a[lane / 4 + i / 2 % 2 * 8], b[i / 4 * 8 + lane % 4 * 2 + i % 2], sums[i]);
    }
  }
}

void settle(Asynchronous& own) {
  for (auto it = own.sums.begin(); it != own.sums.end();) {
    bool under_way = false;
    for (const auto& group : own.product_groups)
      for (const Product& product : group) under_way |= product.sum == it->first;
    for (const Product& product : own.products) under_way |= product.sum == it->first;
    if (under_way) {
      ++it;
      continue;
    }
    memcpy(it->first, it->second.data(), it->second.size() * sizeof(float));
    it = own.sums.erase(it);
  }
}

void wait_all(void* const (&own)[WARP], uint32_t) {
  const Waiting& waiting = *static_cast<Waiting*>(own[0]);
  const size_t all = asynchronous().product_groups.size();
  for (int lane = 0; lane < WARP; lane++)
    if (asynchronous(lane).product_groups.size() != all) fail(waiting.site, "lanes have committed wgmma unequally");
  const size_t done = all > (size_t)waiting.pending ? all - waiting.pending : 0;
  for (size_t group = 0; group < done; group++)
    multiply_group(asynchronous().product_groups[group], group, waiting.site);
  for (int lane = 0; lane < WARP; lane++) {
    Asynchronous& theirs = asynchronous(lane);
    theirs.product_groups.erase(theirs.product_groups.begin(), theirs.product_groups.begin() + done);
    settle(theirs);
  }
}

}  // namespace

void wgmma_fence() { asynchronous().fenced = true; }

void wgmma(float (*sum)[4], int columns, const uint32_t (&a)[4], uint64_t b_descriptor, Site site) {
  Asynchronous& own = asynchronous();
  if (!own.fenced) fail(site, "wgmma without wgmma_fence since the last wait");
  for (int k = 0; k < 16; k += 8) {  // both ends are within shared memory
    address_in_b(b_descriptor, 0, k, site);
    address_in_b(b_descriptor, columns - 1, k, site);
  }
  if (!own.sums.contains(sum)) {
    own.sums[sum] = Sums(&sum[0][0], &sum[0][0] + columns / 2);
    memset(sum, 0xff, columns / 2 * sizeof(float));
  }
  own.products.push_back({sum, columns, a, {a[0], a[1], a[2], a[3]}, b_descriptor});
}

void wgmma_commit() {
  Asynchronous& own = asynchronous();
  own.product_groups.push_back(std::move(own.products));
  own.products.clear();
}

void wgmma_wait(int pending, Site site) {
  Waiting own = {pending, site};
  collective("wgmma_wait", ALL_LANES, true, &own, wait_all, site);
  asynchronous().fenced = false;
}

}  // namespace cuda_on_host
