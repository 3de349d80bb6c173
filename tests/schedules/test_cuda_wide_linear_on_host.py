"""`wide_linear` and `fed_linear` on the CPU, thread by thread (tests/cuda_on_host): each way to share the work, no GPU.

test_cuda_linear_on_host.py has what holds for every kernel of `linear`; this is what only these have: warpgroups, parts
of K in a thread block and in a cluster, odd numbers of blocks, warps that bring x to others, and side lists.
"""

import dataclasses
from functools import cache

import pytest
import torch

from tests.cuda_on_host.prim_func import prepare, run_kernel
from tests.cuda_on_host.runner import AVAILABLE
from vllm_compile import lossless
from vllm_compile.ops import GATE_UP_SILU, LINEAR
from vllm_compile.schedules.cuda import matmul
from vllm_compile.targets import cuda

from . import harness

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")

TARGET = cuda.for_chip()


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, and a call that is awkward for it."""

    how: tuple[tuple[str, int | str], ...]
    packed: bool
    N: int
    K: int  # in blocks of 64 columns
    gated: bool = False
    optional: tuple[str, ...] = ()

    @property
    def tokens(self):
        return dict(self.how)["tokens"]

    @property
    def most(self):
        """Tokens that there may be."""
        return self.tokens if "splits" in dict(self.how) else self.tokens + 5

    @property
    def together(self):
        """Thread blocks that may meet: those of a cluster, and of splits."""
        return dict(self.how)["cluster"] * dict(self.how).get("splits", 1)

    def config(self):
        return {"lossless": self.packed, "prefetch": 2, **dict(self.how)}

    def sample(self, generator, tokens):
        op = GATE_UP_SILU if self.gated else LINEAR
        width = {"intermediate": self.N // 2} if self.gated else {"N": self.N}
        inputs, _ = op.sample(generator, torch.bfloat16, tokens, 64 * self.K, **width)
        return op, {name: inputs[name] for name in ("x", "weight", *self.optional)}


def wide(tokens, row_groups, k_groups, cluster, blocks, stages):
    names = ("tokens", "row_groups", "k_groups", "cluster", "blocks", "stages")
    return (("kind", "wide"), *zip(names, (tokens, row_groups, k_groups, cluster, blocks, stages), strict=True))


def fed(tokens, row_groups, k_groups, cluster, stages, **others):
    names = ("tokens", "row_groups", "k_groups", "cluster", "stages")
    return (("kind", "fed"), *zip(names, (tokens, row_groups, k_groups, cluster, stages), strict=True), *others.items())


ALL = ("bias", "residual")
CASES = {
    # One warpgroup; one block of columns, and fewer blocks than stages.
    "smallest": Case(wide(16, 1, 1, 1, 1, 2), False, 64, 1),
    "few_blocks": Case(wide(16, 1, 1, 1, 2, 4), True, 64, 3, optional=("bias",)),
    # Warpgroups that share x.
    "rows": Case(wide(32, 2, 1, 1, 2, 3), True, 256, 9, optional=ALL),
    "rows_gated": Case(wide(64, 2, 1, 1, 2, 2), True, 256, 9, gated=True),
    "all_rows": Case(wide(64, 4, 1, 1, 1, 3), True, 256, 5, optional=("residual",)),
    "all_rows_plain": Case(wide(64, 4, 1, 1, 1, 3), False, 256, 6, optional=("bias",)),
    # Parts of K: within a block, in a cluster, both; unequal ones, and some with none.
    "parts": Case(wide(32, 1, 2, 1, 1, 3), True, 64, 5, optional=ALL),
    "four_parts": Case(wide(16, 1, 4, 1, 2, 2), False, 64, 11),
    "cluster": Case(wide(64, 2, 1, 4, 2, 3), True, 128, 9, optional=ALL),
    "cluster_gated": Case(wide(16, 1, 1, 2, 2, 2), False, 128, 7, gated=True),
    "both": Case(wide(32, 1, 2, 4, 1, 3), True, 64, 13, gated=True),
    "empty_parts": Case(wide(64, 1, 2, 4, 2, 2), True, 64, 5, optional=("residual",)),
    # Warps that bring x: one round of places, several, two thread blocks.
    "fed_once": Case(fed(64, 4, 1, 1, 4), True, 256, 4, optional=ALL),
    "fed_gated": Case(fed(64, 4, 1, 1, 4), True, 512, 12, gated=True),
    "fed_plain": Case(fed(32, 4, 1, 1, 2), False, 256, 6, optional=("bias",)),
    "fed_narrow": Case(fed(16, 4, 1, 1, 2), True, 256, 10),
    "fed_least": Case(fed(8, 4, 1, 1, 2), True, 256, 4, optional=("bias",)),
    # The same in parts of K: in a thread block, in a cluster, both; and thread blocks of two warpgroups.
    "fed_parts": Case(fed(32, 1, 4, 1, 2), True, 128, 16, optional=ALL),
    "fed_parts_gated": Case(fed(64, 2, 2, 1, 2), True, 256, 8, gated=True),
    "fed_cluster": Case(fed(64, 4, 1, 2, 4), True, 256, 16, optional=("residual",)),
    "fed_both": Case(fed(16, 1, 4, 2, 2), True, 64, 16, optional=ALL),
    "fed_both_plain": Case(fed(8, 2, 2, 8, 2), False, 256, 64, gated=True),
    "fed_odd_cluster": Case(fed(16, 4, 1, 7, 2), False, 256, 28, optional=ALL),
    "fed_odd_cluster_of_few": Case(fed(8, 2, 2, 3, 2), True, 128, 12, gated=True),
    "fed_two": Case(fed(64, 2, 1, 2, 4), True, 128, 16, optional=ALL),
    "fed_two_parts": Case(fed(16, 1, 2, 2, 2), True, 128, 16, gated=True),
    "fed_most_of_x": Case(fed(64, 1, 2, 2, 4), True, 64, 16, optional=("bias",)),
    "fed_sums_are_largest": Case(fed(64, 4, 1, 2, 2), True, 256, 8),
    # Parts of K over the grid: unequal ones, in clusters, of gates.
    "fed_splits": Case(fed(64, 4, 1, 1, 4, splits=3), True, 512, 16, optional=ALL),
    "fed_splits_of_clusters": Case(fed(32, 2, 1, 2, 2, splits=4), True, 256, 20, optional=("residual",)),
    "fed_splits_gated": Case(fed(16, 2, 1, 2, 2, splits=2), True, 256, 12, gated=True),
    "fed_splits_plain": Case(fed(8, 2, 2, 1, 2, splits=5), False, 128, 20, optional=("bias",)),
    # Warps without a tile.
    "fed_fewer_tiles": Case(fed(64, 4, 1, 1, 4, tiles=14), True, 448, 12, gated=True),
    "fed_one_tile": Case(fed(32, 1, 2, 1, 2, tiles=1), True, 48, 8, optional=ALL),
    "fed_fewer_tiles_plain": Case(fed(16, 2, 1, 1, 2, tiles=5), False, 160, 6, optional=("bias",)),
}


@cache
def kernel(case):
    op, inputs = case.sample(torch.Generator(), 5)
    return matmul.matmul(harness.op_spec(op, inputs, {}), case.config(), TARGET, case.gated)


@pytest.fixture(scope="module", autouse=True)
def prepared():
    prepare(map(kernel, CASES.values()))


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def run(case, inputs, out=None, **options):
    """The result, written over nan or `out`."""
    if out is None:
        out = torch.full((len(inputs["x"]), case.N // 2 if case.gated else case.N), float("nan")).bfloat16()
    weight = lossless.pack(inputs["weight"]) if case.packed else inputs["weight"]
    report = run_kernel(kernel(case), *{**inputs, "weight": weight}.values(), out, early={"weight"}, **options)
    assert report.launched == report.waited == (1, 1)
    return out


def test_matches_reference(case, generator):
    for tokens in (1, case.tokens - 3, case.tokens, case.most):
        op, inputs = case.sample(generator, tokens)
        expected = harness.results(op, inputs, {})
        harness.assert_matches(op, (run(case, inputs),), expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "residual" in case.optional])
def test_residual_may_lie_where_the_sum_will(name, generator):
    case = CASES[name]
    for tokens in (1, case.tokens, case.most):
        _, inputs = case.sample(generator, tokens)
        apart, sums = run(case, inputs), inputs["residual"].clone()
        run(case, {**inputs, "residual": sums}, out=sums)
        assert torch.equal(sums, apart)


def test_more_tokens_than_splits_are_made_for_are_refused(generator):
    case = CASES["fed_splits"]
    _, inputs = case.sample(generator, case.tokens + 1)
    with pytest.raises(ValueError, match="made for no more than 64 tokens"):
        run(case, inputs)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.packed])
def test_side_list(name, generator):
    """Entries above the window and below it, at all places of a fragment, and several in a row."""
    case = CASES[name]
    op, inputs = case.sample(generator, case.tokens)
    inputs["x"] = inputs[
        "x"
    ].abs()  # products of large entries, of one sign in a row, do not cancel to float32's errors
    weight, columns = inputs["weight"], 64 * case.K
    for row in range(case.N):
        for k in range(37 * row % min(columns, 101), columns, 101 if row % 16 == 0 else columns):
            large = weight[row, k].abs() * (2.0**21 if row % 32 else -(2.0**21))
            weight[row, k] = weight[row, k] * 2.0**-19 if row % 2 else large
    expected = harness.results(op, inputs, {})
    harness.assert_matches(op, (run(case, inputs),), expected)
    # They matter: even a small one is missed where x is large.
    row = case.N - 1
    k = 37 * row % min(columns, 101)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][::2, k], inputs["x"][1::2, k] = 2.0**40, -(2.0**40)
    expected = harness.results(op, inputs, {})
    harness.assert_matches(op, (run(case, inputs),), expected)
    weight[row, k] = 0
    with pytest.raises(AssertionError):
        harness.assert_matches(op, (run(case, inputs),), expected)


def test_comparison_sees_one_wrong_input(case, generator):
    op, inputs = case.sample(generator, case.tokens)
    expected = harness.results(op, inputs, {})
    for name in inputs:
        changed = inputs[name].clone()
        changed.view(-1)[-1] += 4
        with pytest.raises(AssertionError):
            harness.assert_matches(op, (run(case, {**inputs, name: changed}),), expected)


def test_neither_batch_nor_order_of_threads_matters(case, generator):
    _, inputs = case.sample(generator, case.tokens)
    whole = run(case, inputs)
    for seed, tokens in enumerate((case.tokens, case.tokens, 1, case.tokens - 3)):
        part = {name: t[:tokens] if name in ("x", "residual") else t for name, t in inputs.items()}
        assert torch.equal(run(case, part, seed=seed, together=case.together), whole[:tokens])


def test_nan_and_infinity_stay_in_their_rows(case, generator):
    _, inputs = case.sample(generator, case.tokens)
    clean = run(case, inputs)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][4, 3], inputs["x"][7, 5] = float("nan"), float("inf")
    dirty = run(case, inputs)
    assert dirty[4].isnan().all()
    assert not dirty[7].isfinite().all()
    others = [token for token in range(case.tokens) if token not in (4, 7)]
    assert torch.equal(dirty[others], clean[others])
