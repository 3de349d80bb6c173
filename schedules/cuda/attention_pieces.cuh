// How a launch's cached tokens are shared out among thread blocks: pieces, of one request each.
//
// Requests differ in length: were each one block's, all would wait for the longest.  So where one holds much more than an
// equal share of the tiles, requests are cut into parts of about that; where all are alike, each is one piece, or as many
// as there are blocks for it.  Block i begins with piece i; if there are more pieces than blocks, who is done takes the
// next.  Parts come first, so that what is taken last is usually short.  Pieces, and so results, do not depend on who takes them.
//
// Lengths are known on the GPU alone, so that each warp finds this out by itself: three loads for each lane's requests,
// all at once, and if requests are cut a count of their parts, and a scan for each piece.
#ifndef VLLM_COMPILE_ATTENTION_PIECES
#define VLLM_COMPILE_ATTENTION_PIECES

#include "scores.cuh"

namespace vllm_compile {

constexpr int TILE = 16;  // cached tokens of a tile: no block of the cache is smaller

// Tiles are shared out among so many blocks at most, four for each multiprocessor of an H200.  A request of less than one
// and a half shares is not cut, so that others have no more than 4 / 3 parts for each share that they hold.
constexpr int SHARES = 528, PARTS = SHARES * 4 / 3;

// Part `part` of `parts` of a request, whose result is the `slot`th of a KV head's in the workspace if there are others.
// Request -1: there is no such piece.
struct Piece {
  int request, part, parts, slot;

  // The first tile of the part, of a request that sees so many, and that of the next part.
  __device__ __forceinline__ int2 tiles(int seen) const {
    const int each = seen / parts, longer = seen - each * parts;  // the first ones have one more
    const int begin = part * each + min(part, longer);
    return make_int2(begin, begin + each + (part < longer));
  }
};

// Of KV_HEADS heads, for each of which there are gridDim.x * gridDim.z blocks, gridDim.z being the number of requests; a
// share has SHORT_TILES at least.
template <class Seen, int KV_HEADS, int SHORT_TILES>
class Pieces {
 public:
  __device__ __forceinline__ Pieces(const int* query_start_loc, const int* seq_lens)
      : query_start_loc(query_start_loc), seq_lens(seq_lens), requests(gridDim.z), blocks(gridDim.x * gridDim.z) {
    int total = 0, most = 0;
    for (int first = threadIdx.x % 32; first < requests; first += 4 * 32) {
#pragma unroll  // loads for four requests are under way at once
      for (int i = 0; i < 4; i++) {
        const int own = tiles(first + i * 32);
        total += own, most = max(most, own);
      }
    }
    total = __reduce_add_sync(0xffffffff, total), most = __reduce_max_sync(0xffffffff, most);
    const int shares = min(blocks, max(SHARES / KV_HEADS, 1));
    share = max((total + shares - 1) / shares, SHORT_TILES);
    // Where each request has one block, parts have to wait until one is done with its own.
    cut = blocks > requests ? most + share / 2 >= 2 * share : most >= 2 * share;
    parts_of_cut = 0, count = requests;
    if (!cut) return;
    int whole = 0;
    for (int request = threadIdx.x % 32; request < requests; request += 32) {
      const int own = parts(tiles(request));
      if (own > 1) parts_of_cut += own;
      else whole++;
    }
    parts_of_cut = __reduce_add_sync(0xffffffff, parts_of_cut);
    count = parts_of_cut + __reduce_add_sync(0xffffffff, whole);
  }

  // How many there are.
  __device__ __forceinline__ int size() const { return count; }

  __device__ __forceinline__ Piece operator[](int index) const {
    if (!cut) return {index < requests ? index : -1, 0, 1, 0};
    const bool of_cut = index < parts_of_cut;
    const int wanted = of_cut ? index : index - parts_of_cut;  // among parts, or among requests that are whole
    int before = 0;
    for (int first = 0; first < requests; first += 32) {
      const int request = first + threadIdx.x % 32, own = request < requests ? parts(tiles(request)) : 0;
      const int counted = (own > 1) == of_cut ? own : 0;
      int through = counted;  // of this request and those before it
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int others = __shfl_up_sync(0xffffffff, through, lanes);
        if (request - first >= lanes) through += others;
      }
      through += before;
      const uint32_t past = __ballot_sync(0xffffffff, through > wanted);
      if (past != 0) {
        const int from = __ffs(past) - 1, parts_of = __shfl_sync(0xffffffff, own, from);
        return {first + from, wanted - __shfl_sync(0xffffffff, through, from) + parts_of, parts_of, index};
      }
      before = __shfl_sync(0xffffffff, through, 31);
    }
    return {-1, 0, 1, 0};
  }

 private:
  // That a decode step's token sees of a request; a prompt, which is not cut, does not count.
  __device__ __forceinline__ int tiles(int request) const {
    const int known = min(request, requests - 1), visible = seq_lens[known];
    const bool decodes = query_start_loc[known + 1] - query_start_loc[known] == 1 && request < requests;
    return decodes ? (visible + TILE - 1) / TILE - Seen::first(visible) / TILE : 0;
  }

  // Of a request of so many tiles: one for each share, the nearest whole number of them.
  __device__ __forceinline__ int parts(int seen) const { return max((seen + share / 2) / share, 1); }

  const int *query_start_loc, *seq_lens;
  int requests, blocks, share, parts_of_cut, count;
  bool cut;
};

}  // namespace vllm_compile

#endif
