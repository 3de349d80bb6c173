"""The model that ranks kernels for an AMD GPU that is not at hand: each thing it knows of makes its difference."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from vllm_compile.schedules.rocm.build import Resources
from vllm_compile.schedules.rocm.estimate import LATENCY, seconds_of
from vllm_compile.schedules.rocm.footprint import Footprint
from vllm_compile.targets.rocm import ARCHS, for_arch

TARGET = for_arch("gfx942")
LEAN = Resources(arguments=(), registers=32, spilled=0, scratch_bytes=0, lds_bytes=0, threads=256)
# A thread block a compute unit, next to no bytes: latency alone.
SMALL = Footprint(bytes=1, blocks=TARGET.compute_units, waves=4, rounds=10, block_bytes=1)
# A gigabyte, in many small blocks: bandwidth alone.
LARGE = Footprint(bytes=1 << 30, blocks=1 << 16, waves=1, rounds=1, block_bytes=1 << 14)


def seconds(footprint: Footprint, target=TARGET, **resources) -> float:
    return seconds_of(footprint, replace(LEAN, **resources), target)


def test_latency_is_paid_once_a_round():
    assert seconds(SMALL) == pytest.approx(10 * LATENCY, rel=1e-3)
    assert seconds(replace(SMALL, rounds=5)) == pytest.approx(5 * LATENCY, rel=1e-3)


def test_no_less_than_the_bytes_at_the_peak():
    bound = LARGE.bytes / TARGET.bandwidth
    assert bound < seconds(LARGE) < 1.1 * bound
    assert seconds(replace(LARGE, bytes=2 * LARGE.bytes)) > 1.9 * bound


def test_a_block_more_than_compute_units_is_a_tail():
    """Where each fills its compute unit; beside others it costs nothing until there is no room."""
    full = {"lds_bytes": TARGET.lds_bytes}
    more = replace(SMALL, blocks=SMALL.blocks + 1)
    assert seconds(more, **full) == pytest.approx(2 * seconds(SMALL, **full), rel=1e-3)
    assert seconds(more) == pytest.approx(seconds(SMALL), rel=1e-3)


@pytest.mark.parametrize("resources", [{"registers": 257}, {"lds_bytes": 33 << 10}])
def test_occupancy_hides_latency(resources):
    """Eight blocks of a compute unit side by side, or one after the other."""
    many = replace(SMALL, blocks=8 * SMALL.blocks)
    assert seconds(many) == pytest.approx(seconds(SMALL), rel=1e-3)
    assert seconds(many, **resources) == pytest.approx(8 * seconds(SMALL), rel=1e-3)


def test_matrix_cores_at_their_peak():
    """All SIMDs multiply: the time is that of the data sheet's peak."""
    products = replace(SMALL, rounds=0, mfmas=10_000)
    flops = products.blocks * products.waves * products.mfmas * 2 * 16**3
    for target in map(for_arch, ("gfx90a", "gfx942")):
        launch = replace(products, blocks=target.compute_units)
        peak = flops / products.blocks * launch.blocks / target.matrix_flops
        assert seconds(launch, target) == pytest.approx(peak, rel=1e-2)
    assert seconds(replace(products, waves=1)) == pytest.approx(seconds(products), rel=1e-3), "on one SIMD of four"


def test_bytes_through_a_compute_unit_and_through_l2():
    """64 or 128 bytes a clock through L1; blocks that read what others read too have it from L2."""
    alone = replace(SMALL, rounds=0, block_bytes=1 << 20, blocks=1)
    for arch, rate in (("gfx90a", 64), ("gfx942", 128), ("gfx950", 128)):
        target = for_arch(arch)
        assert seconds(alone, target) == pytest.approx((1 << 20) / rate / target.clock, rel=1e-2)
    assert seconds(replace(alone, lds_bytes=1 << 20)) == pytest.approx(2 * seconds(alone), rel=1e-2)
    everywhere = replace(alone, blocks=TARGET.compute_units)
    assert seconds(everywhere) > 1.3 * seconds(alone)


def test_vector_instructions_take_four_clocks():
    assert seconds(replace(SMALL, rounds=0, instructions=1000)) == pytest.approx(4000 / TARGET.clock, rel=1e-3)


@pytest.mark.parametrize("bad", [{"spilled": 1}, {"scratch_bytes": 4}, {"lds_bytes": 65 << 10}, {"registers": 520}])
def test_what_does_not_fit(bad):
    assert seconds(SMALL, **bad) == inf


def test_every_gpu_has_what_the_model_asks_for():
    for target in ARCHS.values():
        assert (
            target.matrix_flops
            == pytest.approx(target.compute_units * 4 * 2 * 16**3 / target.mfma_clocks * target.clock, rel=1e-2)
            or target.arch == "gfx950"
        ), "half of the peak: this instruction is CDNA 3's"
        assert 0 < seconds(LARGE, target) < inf
