"""Which kernels serve a matrix product on CUDA (matmul.py): by rules, by records, and where a vendor's takes over."""

import json
import re

import pytest

from benchmarks.kernels_cuda_linear import BUCKETS, spec_of
from vllm_compile.schedules.cuda import build, fed, matmul, records
from vllm_compile.schedules.cuda.linear import Linear
from vllm_compile.schedules.select import token_ranges
from vllm_compile.targets import cuda, resolve

TARGET = cuda.for_chip()
NARROW = spec_of("linear", 512, 576, residual=False)  # served by stream kernels alone where no record says otherwise


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """`recorded(...)`: no records but of lossless NARROW, (chip, least tokens, configuration, microseconds gained)."""
    names = ("op", "N", "K", "residual", "lossless", "min_tokens")

    def write(*found):
        keys = [dict(zip(names, records.key(NARROW, True, least), strict=True)) for _, least, _, _ in found]
        made = [
            {"chip": chip, **key, "config": config, "gain_us": gain_us}
            for (chip, _, config, gain_us), key in zip(found, keys, strict=True)
        ]
        path = tmp_path / "records.json"
        path.write_text(json.dumps(made))
        monkeypatch.setattr(records, "PATH", path)

    return write


@pytest.mark.parametrize(
    ("width", "columns", "packed", "kinds", "vendor"),
    [
        (28672, 3584, True, {1: "stream", 9: "fed", 17: "fed", 33: "fed"}, 65),
        (28672, 3584 + 128, True, {1: "stream", 9: "fed", 17: "fed", 33: "fed"}, 65),  # rounds of two stages
        (28672, 3584, False, {1: "stream", 9: "wide", 17: "wide", 33: "wide"}, 65),  # nothing to unpack
        (28672, 3584 + 64, True, {1: "stream", 9: "wide", 17: "wide", 33: "wide"}, 65),  # K not in rounds
        (37888, 3584, True, {1: "stream", 9: "wide", 17: "wide"}, 33),  # 148 blocks of 256 rows
        (37888, 3584, False, {1: "stream", 9: "wide", 17: "wide"}, 33),
        (33792, 3584, True, {1: "stream", 9: "fed", 17: "fed", 33: "fed"}, 65),  # 132: one for each multiprocessor
        (28672 + 16, 3584, True, {1: "stream", 9: "stream"}, 17),  # no whole warpgroups
        (4096, 3584, True, {1: "stream", 9: "stream"}, 17),  # too few rows for large thread blocks
    ],
)
def test_kinds_of_kernels_by_tokens(width, columns, packed, kinds, vendor):
    spec, family = spec_of("linear", width, columns, residual=False), Linear(packed)
    found = {variant.min_tokens: variant.config for variant in family.variants(spec, TARGET)}
    assert {least: config["kind"] for least, config in found.items()} == kinds
    if kinds[9] == "fed":
        assert {(c["row_groups"], c["k_groups"], c["cluster"], c["stages"]) for c in (found[9], found[33])} == {
            (4, 1, 1, 4 if columns % 256 == 0 else 2)
        }
    made_for = {least: config["tokens"] for least, config in found.items() if "tokens" in config}
    assert all(tokens == matmul.BUCKETS[least] for least, tokens in made_for.items())
    assert family.vendor(spec, TARGET).min_tokens == vendor


def test_records_come_first(recorded):
    (wanted, *_) = (config for config in Linear(packed=True).space(NARROW, TARGET) if config["kind"] == "wide")
    usual = {packed: Linear(packed).variants(NARROW, TARGET) for packed in (False, True)}
    recorded((TARGET.chip, 9, wanted, 1.0))
    found = Linear(packed=True).variants(NARROW, TARGET)
    assert found[1].config == wanted != usual[True][1].config
    assert found[:1] == usual[True][:1]
    assert Linear(packed=False).variants(NARROW, TARGET) == usual[False]


def test_a_chip_has_its_own_records_and_else_another_chips(recorded):
    first, second = Linear(packed=True).space(NARROW, TARGET)[:2]
    recorded(("h100", 9, first, 1.0), ("h200", 9, second, 1.0), ("h100", 33, first, 1.0))
    assert records.find(NARROW, True, 9, "h100").config == first
    assert records.find(NARROW, True, 9, "h200").config == second
    assert records.find(NARROW, True, 33, "h200").config == first
    assert records.find(NARROW, True, 17, "h200") is None
    by_name = {chip: Linear(packed=True).variants(NARROW, resolve(chip))[1].config for chip in ("cuda", "h200", "h100")}
    assert by_name == {"cuda": second, "h200": second, "h100": first}


def test_what_a_record_prefetches_is_admitted():
    """Of a tuning database too: the space has no prefetching, a kernel may have it within its tile."""
    spec, family = spec_of("linear", 512, 4096, residual=False), Linear(packed=True)
    (config, *_) = (v.config for v in family.variants(spec, TARGET) if v.config["kind"] == "stream")
    most = spec.input("weight").size(1) // 64 - config["stages"] * config["warps"]
    for prefetch, admitted in ((0, True), (most, True), (most + 1, False), (-1, False)):
        assert family.admits(spec, {**config, "prefetch": prefetch}, 1, TARGET) == admitted


@pytest.mark.parametrize(("gain_us", "least"), [(-1.0, [1]), (1.0, [1, 9])])
def test_the_vendor_takes_over_where_a_record_says_it_is_faster(recorded, gain_us, least):
    family = Linear(packed=True)
    recorded((TARGET.chip, 9, family.variants(NARROW, TARGET)[1].config, gain_us))
    found = [variant.min_tokens for variant in family.variants(NARROW, TARGET)]
    assert found[: len(least)] == least
    if least == [1]:
        assert found == least
        assert family.vendor(NARROW, TARGET).min_tokens == 9


def test_the_benchmark_knows_the_ranges_of_tokens():
    assert BUCKETS == matmul.BUCKETS


def test_no_variant_serves_more_tokens_than_it_is_made_for(recorded):
    """Also where a record is of a range behind one that nothing is made for; cuBLAS serves all of these."""
    family = Linear(packed=True)
    recorded((TARGET.chip, 33, family.space(NARROW, TARGET)[0], 1.0))
    variants = family.variants(NARROW, TARGET)
    ranges = token_ranges(variants, family.vendor(NARROW, TARGET))
    assert ranges == [(1, 8), (9, 16)]


def test_every_record_is_of_a_kernel_that_its_range_admits():
    found = json.loads(records.PATH.read_text())
    for record in found:
        spec = spec_of(record["op"], record["N"], record["K"], record["residual"])
        gated = record["op"] == "gate_up_silu"
        admitted = matmul.admits(spec, record["config"], record["min_tokens"], TARGET, record["lossless"], gated)
        assert admitted, record
    assert len(found) > 40


def test_memory_of_splits_is_as_large_as_is_counted_on():
    header = (build.HEADERS / "splits.cuh").read_text()
    (numbers,) = re.findall(r"SPLIT_BYTES = (\d+) << (\d+), SPLIT_GROUPS = (\d+) << (\d+);", header)
    a, b, c, d = map(int, numbers)
    assert (a << b, c << d) == (fed.SPLIT_BYTES, fed.SPLIT_GROUPS)


def test_every_configuration_fits_shared_memory():
    for packed in (False, True):
        space = Linear(packed).space(spec_of("linear", 512, 1024, residual=False), TARGET)
        assert {config["kind"] for config in space} == {"stream", "wide", "fed"}
        assert len(space) > 200
        assert all(matmul.shared_bytes(config) <= TARGET.shared_bytes for config in space)
