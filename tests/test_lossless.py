"""Lossless packing restores every bit of every weight, or says beforehand that it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_compile import lossless


def bits(*values: int) -> torch.Tensor:
    """bf16 numbers by their bits."""
    signed = [value - (1 << 16) if value >> 15 else value for value in values]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16)


def gaussian(generator, N, K, scale=0.02):
    return (torch.randn(N, K, generator=generator) * scale).bfloat16()


def assert_restored(weight):
    packed = lossless.pack(weight)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == lossless.Lossless().shape(tuple(weight.shape))
    restored = lossless.unpack(packed, *weight.shape)
    assert torch.equal(restored.view(torch.int16), weight.view(torch.int16))
    return packed


def listed(packed, N, K):
    """Entries in the side list."""
    rows, side, _ = lossless.offsets(N, K)
    return int(packed[rows:side].view(torch.int32).view(-1, 2)[N, 0])


@pytest.mark.parametrize(("N", "K"), [(16, 64), (48, 192), (1024, 2048), (80, 4096)])
def test_gaussian(N, K, generator):
    weight = gaussian(generator, N, K)
    assert lossless.fits(weight)
    packed = assert_restored(weight)
    assert listed(packed, N, K) < N * K / 2000 + 10


def test_size_is_twelve_bits_and_a_little(generator):
    N, K = 1024, 4096
    assert lossless.offsets(N, K)[2] * 8 / (N * K) < 12.1


def special(generator, name):
    """Weights [64, 256] that are hard in one way."""
    weight = gaussian(generator, 64, 256)
    if name == "zeros":
        weight.zero_()
    elif name == "negative zeros":
        weight[::2] = -0.0
    elif name == "a row of zeros":
        weight[5] = 0
    elif name == "sparse":
        weight[torch.rand(64, 256, generator=generator) < 0.7] = 0
    elif name == "denormals":
        weight[3, :60] = bits(*range(1, 61))
        weight[4, ::64] = bits(0x8001, 0x807F, 0x0040, 0x007F)
    elif name == "one outlier a row":
        weight[torch.arange(64), torch.randint(256, (64,), generator=generator)] = 1e30
    elif name == "one tiny weight a row":
        weight[torch.arange(64), torch.randint(256, (64,), generator=generator)] = -1e-30
    elif name == "infinities and nans":
        weight[7, :6] = bits(0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x7FFF)
    elif name == "largest":
        weight.copy_(bits(0x7F7F, 0xFF7F).repeat(64, 128))
    elif name == "rows of all magnitudes":
        weight *= 2.0 ** torch.arange(-90, 70, 2.5)[:, None]
    elif name == "one exponent":
        weight.copy_(bits(*range(0x3F00, 0x3F80)).repeat(64, 2))
    elif name == "powers of two":
        # The last is the exponent just below the window, with mantissa 0: its code would be that of a zero.
        weight.copy_(bits(*(0x3F80 - (e << 7) for e in range(15)), 0x3F80).repeat(64, 16))
        weight[:, 100] = bits(0x3F80 - (15 << 7))
    elif name == "small exponents":
        weight.copy_(bits(*(e << 7 | 5 for e in range(1, 17))).repeat(64, 16))
        weight[:, 16:] = bits(8 << 7)
    return weight


FITTING = [
    "zeros",
    "negative zeros",
    "a row of zeros",
    "sparse",
    "denormals",
    "one outlier a row",
    "one tiny weight a row",
    "infinities and nans",
    "largest",
    "rows of all magnitudes",
    "one exponent",
    "powers of two",
    "small exponents",
]


@pytest.mark.parametrize("name", FITTING)
def test_special_weights_are_restored(name, generator):
    weight = special(generator, name)
    if name == "largest":
        # Exponents too large for a row's scale: listed, and too many.
        assert not lossless.fits(weight)
        return
    assert lossless.fits(weight), name
    assert_restored(weight)


def exponents_everywhere(generator):
    return torch.randint(-(1 << 15), 1 << 15, (64, 256), generator=generator).to(torch.int16).view(torch.bfloat16)


def one_bad_row(generator):
    weight = gaussian(generator, 64, 256)
    weight[40] = exponents_everywhere(generator)[0]
    return weight


def all_denormal(generator):
    return torch.randint(1, 128, (64, 256), generator=generator).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("make", [exponents_everywhere, one_bad_row, all_denormal])
def test_what_does_not_fit_is_refused(make, generator):
    weight = make(generator)
    assert not lossless.fits(weight)
    with pytest.raises(ValueError, match="outside the windows"):
        lossless.pack(weight)


@pytest.mark.parametrize(
    "weight", [torch.zeros(16, 65).bfloat16(), torch.zeros(17, 64).bfloat16(), torch.zeros(16, 64)]
)
def test_wrong_shape_or_dtype_is_refused(weight):
    assert not lossless.fits(weight)
    with pytest.raises(ValueError, match="lossless packing wants bfloat16"):
        lossless.pack(weight)


def test_wrong_size_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        lossless.unpack(torch.zeros(100, dtype=torch.uint8), 16, 64)


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 191), st.integers(0, 0xFFFF)), max_size=12),
    st.integers(0, 254),
    st.integers(0, 2**31),
)
def test_any_bits_are_restored_or_refused(tiles, blocks, changes, top, seed):
    generator = torch.Generator().manual_seed(seed)
    N, K = 16 * tiles, 64 * blocks
    exponents = top - torch.randint(0, 16, (N, K), generator=generator).clamp(max=top)
    mantissas = torch.randint(0, 128, (N, K), generator=generator)
    signs = torch.randint(-1, 1, (N, K), generator=generator) << 15
    weight = ((exponents << 7) + mantissas + signs).to(torch.int16).view(torch.bfloat16)
    for row, k, value in changes:
        weight[row % N, k % K] = bits(value)
    if lossless.fits(weight):
        assert_restored(weight)
    else:
        with pytest.raises(ValueError, match="outside"):
            lossless.pack(weight)


@pytest.mark.parametrize("part", ["codes", "rows", "side"])
def test_comparison_sees_one_wrong_byte(part, generator):
    N, K = 64, 256
    weight = gaussian(generator, N, K)
    weight[0].clamp_(min=0.01)  # the byte is of one that is not listed, as one in thousands is
    weight[:, 9] = 1e-30
    packed = assert_restored(weight)
    rows, side, _ = lossless.offsets(N, K)
    place = {"codes": 0, "rows": rows + 8 * 5 + 7, "side": side + 7}[part]
    packed[place] ^= 1
    assert not torch.equal(lossless.unpack(packed, N, K).view(torch.int16), weight.view(torch.int16))


def test_codes_are_what_a_kernel_takes_them_for(generator):
    """A block decoded by the letter of the module's docstring and of `_regroup`, one weight at a time."""
    N, K = 32, 128
    weight = gaussian(generator, N, K)
    packed = lossless.pack(weight)
    rows_at, side_at, _ = lossless.offsets(N, K)
    words = packed[:rows_at].view(torch.int32).view(N // 16, K // 64, 3, 8, 4, 4)
    scales = packed[rows_at:side_at].view(torch.float32).view(-1, 2)[:, 1]
    raised = 2.0**lossless.SCALE_BIAS

    def decoded(row: int, k: int) -> float:
        tile, block, g, r = row // 16, k // 64, row % 8, row % 16 // 8
        half, t, word, high = k % 64 // 32, k % 32 // 8, k % 8 // 2, k % 2
        first, second, third = (int(w) & 0xFFFFFFFF for w in words[tile, block, :, g, t, word])
        rotated = (third >> 12 | third << 20) & 0xFFFFFFFF
        fourth = (first >> 4) & 0x07800780 | (second >> 8) & 0x00780078 | rotated & 0x80078007
        pair = {(0, 0): first, (0, 1): second, (1, 0): third, (1, 1): fourth}[half, r] & 0x87FF87FF
        return float(bits(pair >> 16 * high & 0xFFFF)) * raised * float(scales[row])

    for row in range(0, N, 3):
        for k in range(0, K, 5):
            value = float(weight[row, k])
            assert decoded(row, k) in (value, 0.0)
    places = [(row, k) for row in range(N) for k in range(0, K, 7)]
    assert sum(decoded(row, k) == float(weight[row, k]) for row, k in places) > 0.99 * len(places)
