"""How the tiles of a launch's requests are shared out among thread blocks (attention_pieces.cuh), on the CPU."""

from itertools import pairwise

import pytest
import torch

from tests.cuda_on_host.runner import AVAILABLE, run

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")

TILE, SHARES, PARTS = 16, 528, 704  # as in the header
SOURCE = """using namespace vllm_compile;
static void list(const int* query_start_loc, const int* seq_lens, const int* seen, int* out, int most, void*) {
  const Pieces<Scores<WINDOW, 0>, KV_HEADS, SHORT_TILES> pieces(query_start_loc, seq_lens);
  for (int index = blockIdx.z * gridDim.x + blockIdx.x; index < most; index += gridDim.x * gridDim.z) {
    const Piece piece = pieces[index];
    const int2 tiles = piece.tiles(seen[piece.request < 0 ? 0 : piece.request]);
    const int fields[7] = {piece.request, piece.part, piece.parts, piece.slot, tiles.x, tiles.y, pieces.size()};
    for (int i = 0; i < 7; i++) out[(index * WARPS + threadIdx.x / 32) * 7 + i] = fields[i];
  }
}
"""


def pieces_of(queries, lengths, splits=1, kv_heads=8, warps=4, short_tiles=8, window=0):
    """(request, part, parts, slot, first tile, the next part's) of each piece, as all warps of all blocks find them."""
    requests = len(lengths)
    most = 2 * splits * requests + 1
    out = torch.full((most, warps, 7), -7, dtype=torch.int32)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    source = SOURCE
    for name, value in {"WINDOW": window, "KV_HEADS": kv_heads, "WARPS": warps, "SHORT_TILES": short_tiles}.items():
        source = source.replace(name, str(value))
    run(
        "attention_pieces.cuh",
        "list(query_start_loc, seq_lens, seen, out, most, shared)",
        grid=(splits, 1, requests),
        block=32 * warps,
        arguments={
            "query_start_loc": starts,
            "seq_lens": torch.tensor(lengths, dtype=torch.int32),
            "seen": torch.tensor([tiles_of(*given, window) for given in zip(queries, lengths, strict=True)]).int(),
            "out": out,
            "most": most,
        },
        shared_bytes=16,
        source=source,
    )
    assert (out == out[:, :1]).all(), "warps disagree"
    found = [tuple(piece) for piece in out[:, 0].tolist()]
    count = next(i for i, piece in enumerate(found) if piece[0] < 0)
    assert all(piece[0] == -1 for piece in found[count:])
    assert {size for *_, size in found} == {count}
    return [piece[:-1] for piece in found[:count]]


def tiles_of(queries, length, window):
    """That a decode step's token sees; no others are shared out."""
    return -(-length // TILE) - (max(length - window, 0) // TILE if window else 0) if queries == 1 else 0


def check(pieces, queries, lengths, splits=1, kv_heads=8, warps=4, short_tiles=8, window=0):
    """Every tile is in one piece, no piece is much longer than an equal share, and results have places of their own."""
    tiles = [tiles_of(*request, window) for request in zip(queries, lengths, strict=True)]
    blocks = splits * len(lengths)
    share = max(-(-sum(tiles) // min(blocks, max(SHARES // kv_heads, 1))), short_tiles)
    uncut = 1.5 * share if splits > 1 else 2 * share
    assert len(pieces) <= 2 * blocks
    assert (len(pieces) > len(lengths)) == (max(tiles) >= uncut)
    of_cut = [parts > 1 for _, _, parts, *_ in pieces]
    assert of_cut == sorted(of_cut, reverse=True), "parts come first"
    slots = []
    for request, seen in enumerate(tiles):
        own = [piece for piece in pieces if piece[0] == request]
        assert [part for _, part, *_ in own] == list(range(len(own)))
        assert {parts for _, _, parts, *_ in own} == {len(own)}
        ends = [0, *(end for *_, end in own)]
        assert [begin for *_, begin, _ in own] == ends[:-1]
        assert ends[-1] == seen
        lengths_of = [end - begin for begin, end in pairwise(ends)]
        assert max(lengths_of) <= (-(-3 * share // 2) if len(pieces) > len(lengths) else uncut)
        assert max(lengths_of) - min(lengths_of) <= 1
        if len(own) > 1:
            first = own[0][3]
            assert [slot for _, _, _, slot, *_ in own] == list(range(first, first + len(own)))
            slots += range(first, first + len(own))
    assert slots == list(range(len(slots))), "places are taken in order, from the first on"
    assert len(slots) * kv_heads <= PARTS


BATCHES = {  # queries and cached tokens of each request
    "one": [(1, 32000)],
    "alike": [(1, 1100)] * 16,
    "alike but for some tokens": [(1, 1000 + 30 * i) for i in range(16)],
    "of two lengths": [(1, 1200), (1, 4800)] * 8,  # the longer are 1.6 shares
    "one long": [(1, 200)] * 20 + [(1, 32000)] + [(1, 200)] * 43,
    "long ones at the ends": [(1, 9000), *[(1, 16)] * 70, (1, 9000)],
    "prompts": [(1, 5000), (300, 300), (0, 0), (1, 1), (40, 4000), (1, 17)],
    "nobody": [(0, 0)] * 3,
}


OPTIONS = [{}, {"window": 1000}, {"kv_heads": 1, "warps": 3, "splits": 4}]
OPTIONS += [{"kv_heads": kv_heads, "splits": 2} for kv_heads in (3, 66, 264, 265, 300)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_tile_is_in_one_piece(batch, options):
    queries, lengths = zip(*BATCHES[batch], strict=True)
    check(pieces_of(queries, lengths, **options), queries, lengths, **options)


def test_random_lengths(generator):
    for _ in range(10):
        count = int(torch.randint(1, 100, [1], generator=generator))
        lengths = (torch.randn(count, generator=generator).mul(2).exp() * 300).int().clamp(max=100_000).tolist()
        queries = torch.randint(0, 8, [count], generator=generator).clamp(max=1).tolist()
        lengths = [length if query else 0 for query, length in zip(queries, lengths, strict=True)]
        check(pieces_of(queries, lengths), queries, lengths)


def test_requests_that_are_alike_are_not_cut():
    assert pieces_of([1] * 16, [1100] * 16) == [(request, 0, 1, 0, 0, 69) for request in range(16)]
    pieces = pieces_of([1] * 2, [4096] * 2, splits=8)
    assert [(request, part, parts) for request, part, parts, *_ in pieces] == [
        (request, part, 8) for request in range(2) for part in range(8)
    ]


@pytest.mark.parametrize("wrong", ["missing", "twice", "slot", "order"])
def test_wrong_pieces_are_found(wrong):
    queries, lengths = zip(*BATCHES["one long"], strict=True)
    pieces = pieces_of(queries, lengths)
    at = next(i for i, piece in enumerate(pieces) if piece[1] == 1)
    changed = {
        "missing": pieces[:at] + pieces[at + 1 :],
        "twice": pieces[:at] + pieces[at - 1 : at] + pieces[at:],
        "slot": [*pieces[:at], (*pieces[at][:3], pieces[at][3] - 1, *pieces[at][4:]), *pieces[at + 1 :]],
        "order": [pieces[-1], *pieces[:-1]],  # a whole request first
    }
    with pytest.raises(AssertionError):
        check(changed[wrong], queries, lengths)
