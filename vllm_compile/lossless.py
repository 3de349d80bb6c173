"""Lossless 12-bit weights: a bf16 matrix in three quarters of its bytes, every bit of it restored.

A trained weight matrix uses few exponents.  Each row gets a window of 15 neighbouring exponents; a weight whose
exponent lies in it is stored as sign, mantissa (7 bits) and exponent above the window's base (4 bits, 1 to 15);
code 0 is a zero, of either sign.  What lies outside (denormals, outliers, inf, nan) reads as zero there and stands
in a side list with all its bits.  Of Gaussian weights that is one in ten thousand.

The stored 12 bits are themselves a bf16 number, scaled by a power of two: exponent fields 0 to 15.  A kernel only has
to spread bits, and multiplies by the row's scale once, after summing.

The packed weight [N, K] is one uint8 tensor, in little-endian order (T = N / 16 tiles of rows, B = K / 64 blocks):

| part | type and shape | content |
|---|---|---|
| codes | uint32 [T, B, 3, 8, 16] | 16 x 64 weights a block, see `_regroup` |
| rows | {uint32 first, float32 scale} [N + 1] | its side entries: `first` to the next row's; 2 ** (base - 64) |
| side | {uint32 k, float32 value} [capacity] | the weight itself, ascending by row and k |

Blocks follow the fragments of mma.m16n8k16: lane (g, t) of a warp holds rows g and g + 8 of its tile, and of each
half block of 32 columns the 8 at 8 * t.  A warp reads a block as three times 32 x 16 bytes.

Size: 12 bits a weight, 8 bytes a row, 8 bytes for one weight in 1024 (two in a row, if
more) of side list.  A row needs no more than
`ROW_LIMIT` entries, the matrix no more than its capacity; `fits` says whether that holds, and where it does not
(exponents spread evenly, say) the weight stays plain bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

TILE, BLOCK = 16, 64  # rows and columns of a block
WORDS = 3 * TILE * BLOCK // 8  # 32-bit words of a block
EXPONENTS = 15  # exponents of a window
MAX_BASE = 191  # keeps a row's scale a normal float32
SCALE_BIAS = 64  # a kernel multiplies codes by 2 ** 64 while it sums: products stay far from denormals
ROW_LIMIT = 64  # side entries of one row: one thread adds them up
CHUNK_BYTES = 1 << 20  # packed at a time: a few such buffers fit a core's L2 cache

SIGN, MAGNITUDE, MANTISSA_BITS = -0x8000, 0x7FFF, 7


def capacity(N: int, K: int) -> int:
    """Entries of the side list: one weight in 1024, or two in each row."""
    return max(N * K // 1024, 2 * N)


def serves(N: int, K: int) -> bool:
    """True if [N, K] is made of whole blocks."""
    return N % TILE == 0 and K % BLOCK == 0 and min(N, K) > 0


def offsets(N: int, K: int) -> tuple[int, int, int]:
    """Bytes from the start of the packed weight to its rows, to its side list, to its end."""
    rows = N * K * 3 // 2
    side = rows + 8 * (N + 2 - N % 2)  # 16-byte aligned
    return rows, side, side + 8 * capacity(N, K)


def fits(weight: torch.Tensor) -> bool:
    """True if `pack` can store this weight [N, K]: whole blocks of bf16, and few enough weights outside the windows."""
    if weight.dtype != torch.bfloat16 or weight.dim() != 2 or not serves(*weight.shape):
        return False
    total = 0
    for rows in _chunks(weight):
        row = encode(rows)[2]
        total += len(row)
        if (len(row) and int(torch.bincount(row).max()) > ROW_LIMIT) or total > capacity(*weight.shape):
            return False
    return True


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The packed weight: uint8, on the device of `weight`.

    Raises:
        ValueError: the weight does not fit (see `fits`).
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2 or not serves(*weight.shape):
        raise ValueError(
            f"lossless packing wants bfloat16 [N, K] with N a multiple of {TILE} and K of {BLOCK}, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    N, K = weight.shape
    rows_at, side_at, end = offsets(N, K)
    packed = torch.empty(end, dtype=torch.uint8, device=weight.device)
    packed[rows_at:].zero_()
    codes = packed[:rows_at].view(torch.int32).view(N // TILE, K // BLOCK, WORDS)
    header = packed[rows_at:side_at].view(torch.int32).view(-1, 2)
    counts, entries = [], []
    done = 0
    for rows in _chunks(weight):
        end_row = done + len(rows)
        code, bases, row, k = encode(rows)
        _regroup(code.bitwise_or_(rows & SIGN), codes[done // TILE : end_row // TILE])
        header[done:end_row, 1] = (bases.int() + (127 - SCALE_BIAS)) << 23
        counts.append(torch.bincount(row, minlength=len(rows)))
        entries.append(torch.stack((k.int(), rows[row, k].int() << 16), dim=1))
        done = end_row
    count, side = torch.cat(counts), torch.cat(entries)
    if int(count.max()) > ROW_LIMIT or len(side) > capacity(N, K):
        raise ValueError(
            f"{len(side)} weights of {list(weight.shape)} lie outside the windows of {EXPONENTS} exponents, "
            f"{int(count.max())} in one row; at most {capacity(N, K)} and {ROW_LIMIT} can be listed"
        )
    header[1 : N + 1, 0] = count.cumsum(0)
    packed[side_at : side_at + 8 * len(side)] = side.view(-1).view(torch.uint8)
    return packed


def unpack(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The weight [N, K] that was packed, bit for bit."""
    rows_at, side_at, end = offsets(N, K)
    if packed.dtype != torch.uint8 or packed.shape != (end,):
        raise ValueError(f"a packed [{N}, {K}] is uint8 [{end}], got {packed.dtype} {list(packed.shape)}")
    codes = packed[:rows_at].view(torch.int32).view(N // TILE, K // BLOCK, WORDS)
    header = packed[rows_at:side_at].view(torch.int32).view(-1, 2)
    bases = ((header[:N, 1] >> 23) - (127 - SCALE_BIAS)).to(torch.int16) << MANTISSA_BITS
    weight = torch.empty(N, K, dtype=torch.int16, device=packed.device)
    step = _chunk_rows(K, packed.device)
    for start in range(0, N, step):
        rows = weight[start : start + step]
        rows.copy_(_ungroup(codes[start // TILE : (start + step) // TILE]))
        used = ((rows & MAGNITUDE) >> MANTISSA_BITS).clamp_(max=1)
        rows.add_(used.mul_(bases[start : start + step, None]))
    first = header[: N + 1, 0].long()
    count = int(first[N])
    side = packed[side_at : side_at + 8 * count].view(torch.int32).view(-1, 2)
    row = torch.repeat_interleave(torch.arange(N, device=packed.device), first[1:] - first[:-1])
    weight[row, side[:, 0].long()] = (side[:, 1] >> 16).to(torch.int16)
    return weight.view(torch.bfloat16)


@dataclass(frozen=True)
class Lossless:
    """The layout above, as a `Layout`; its packed tensor is uint8, one-dimensional."""

    name: str = "lossless12"
    lossless: bool = True
    unpack_flops: float = 0.0  # seen so: benchmarks/baseline.md

    def dtype(self, plain: str) -> str:
        return "uint8"

    def shape(self, plain: tuple[int, ...]) -> tuple[int, ...]:
        N, K = plain
        return (offsets(N, K)[2],)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return pack(weight)


def _chunk_rows(K: int, device: torch.device) -> int:
    """Rows packed at a time: whole tiles, as many as a core's cache holds; on an accelerator few large pieces."""
    return max(CHUNK_BYTES // (2 * K) // TILE, 1) * TILE if device.type == "cpu" else 4096 * TILE


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weight's bits, some rows at a time."""
    return iter(weight.contiguous().view(torch.int16).split(_chunk_rows(weight.shape[1], weight.device)))


def encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes without signs int16 [n, K], bases of the windows int16 [n], rows and columns of the side list, ascending.

    A base is one below the lowest exponent of its window, which ends at the row's largest exponent; in rows where that
    leaves too many weights outside (an outlier, an infinity), it lies where it holds most weights.
    """
    magnitude = rows & MAGNITUDE
    largest = magnitude.amax(dim=1) >> MANTISSA_BITS
    bases = (largest - EXPONENTS).clamp_(0, MAX_BASE)
    # Whole vectors at a time: comparisons are many times slower.
    code = magnitude - (bases << MANTISSA_BITS)[:, None]
    kept = torch.threshold(code, (1 << MANTISSA_BITS) - 1, 0)
    row, k = _listed(code.sub_(1 << MANTISSA_BITS).clamp_(max=0), magnitude)
    far = (torch.bincount(row, minlength=len(rows)) > 1 + rows.shape[1] // 1024) | (largest > MAX_BASE + EXPONENTS)
    if bool(far.any()):
        bases[far] = _best_bases(rows[far])
        code = magnitude - (bases << MANTISSA_BITS)[:, None]
        inside = (code >= 1 << MANTISSA_BITS) & (code < (EXPONENTS + 1) << MANTISSA_BITS)
        kept = code * inside
        row, k = _listed((~inside).to(torch.int16), magnitude)
    return kept, bases, row, k


def _listed(lost: torch.Tensor, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the weights for the side list, ascending: `lost` is not zero there, nor is the weight."""
    fours = lost.view(torch.int64).view(-1).nonzero().view(-1)
    found = fours[:, None] * 4 + torch.arange(4, device=lost.device)
    flat = found[(lost.view(-1)[found] != 0) & (magnitude.view(-1)[found] != 0)]
    return flat // lost.shape[1], flat % lost.shape[1]


def _best_bases(rows: torch.Tensor) -> torch.Tensor:
    """The windows that hold most weights: a histogram of each row's exponents, summed over each window."""
    exponents = ((rows & MAGNITUDE) >> MANTISSA_BITS).long()
    numbers = torch.arange(len(rows), device=rows.device)[:, None] * 256
    counts = torch.bincount((exponents + numbers).view(-1), minlength=256 * len(rows)).view(-1, 256)
    total = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    # Base b holds exponents b + 1 to b + 15.
    held = total[:, EXPONENTS + 1 :][:, : MAX_BASE + 1] - total[:, 1 : MAX_BASE + 2]
    return held.argmax(dim=1).to(torch.int16)


def _regroup(code: torch.Tensor, out: torch.Tensor) -> None:
    """Codes int16 [16 * T, 64 * B] to fragment order: int32 words `out` [T, B, 384].

    Two neighbouring codes are a word, as an mma takes them.  Lane (g, t) has four words of rows g and g + 8 in both
    halves of the block, whose runs are in this order: (row g, half 0), (row g + 8, half 0), (row g, half 1), (row g +
    8, half 1).
    """
    T, B = out.shape[:2]
    # tile, r, g, block, half, (t, word) -> half, r, tile, block, g, (t, word)
    words = code.view(torch.int32).view(T, 2, 8, B, 2, 16).permute(4, 1, 0, 3, 2, 5).contiguous()
    join(words.view(4, T, B, 8, 16), out.view(T, B, 3, 8, 16).permute(2, 0, 1, 3, 4))


def _ungroup(words: torch.Tensor) -> torch.Tensor:
    """Codes int16 [16 * T, 64 * B] from words [T, B, 384]: the inverse of `_regroup`."""
    T, B = words.shape[:2]
    halves = part(words.view(T, B, 3, 8, 16).permute(2, 0, 1, 3, 4)).view(2, 2, T, B, 8, 16)
    return halves.permute(2, 1, 4, 3, 0, 5).contiguous().view(torch.int16).view(T * TILE, B * BLOCK)


def join(runs: torch.Tensor, out: torch.Tensor) -> None:
    """Four runs of words, int32 [4, ...], in the place of three, `out` [3, ...]; a word is two codes.

    The first three stay, and the four bits that the exponent leaves free in each half of their words take the bits of
    the fourth: 10-7 in the first, 6-3 in the second, 2-0 and the sign in the third, where the signs of the two halves
    of a word are swapped (a rotation by 12 brings all to their places).
    """
    fourth = runs[3]
    torch.bitwise_or(runs[0], (fourth & 0x07800780) << 4, out=out[0])
    torch.bitwise_or(runs[1], (fourth & 0x00780078) << 8, out=out[1])
    free = (fourth & 0x8000) << 12
    free |= (fourth >> 20) & 0x800
    free |= (fourth & 0x00070007) << 12
    torch.bitwise_or(runs[2], free, out=out[2])


def part(joined: torch.Tensor) -> torch.Tensor:
    """The runs int32 [4, ...] of `joined` [3, ...]: the inverse of `join`."""
    first, second, third = joined
    fourth = (first >> 4) & 0x07800780
    fourth |= (second >> 8) & 0x00780078
    fourth |= (third >> 12) & 0x00070007
    fourth |= (third >> 12) & 0x8000
    fourth |= (third & 0x800) << 20
    stored = 0x87FF87FF - (1 << 32)
    return torch.stack((first & stored, second & stored, third & stored, fourth))
