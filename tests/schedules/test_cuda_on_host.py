"""CUDA's norms, expressions, rotary embedding, lookups and attention on the CPU, thread by thread: no GPU.

See tests/cuda_on_host.
"""

import pytest
import torch

from tests.cuda_on_host.prim_func import run_kernel
from tests.cuda_on_host.runner import AVAILABLE
from vllm_compile import ops
from vllm_compile.schedules.cuda.expression import Elementwise
from vllm_compile.schedules.select import choose
from vllm_compile.targets import cuda

from . import harness
from .cuda_kernel_cases import mismatch, owned_rows, poison_of, sharing
from .expressions import every_function, inputs_of, rotation, spec_of

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")

TARGET = cuda.for_chip()
# What may be read while the kernels before still run: weights, arguments of the whole program, tokens cached earlier.
EARLY = {"weight", "slot_mapping", "kv", "block_table", "seq_lens", "query_start_loc"}
CASES = {  # operator, arguments of its samples, the input that the negative control changes
    "norm": (ops.RMS_NORM, (7, 4104), "x"),
    "norm_one_warp": (ops.RMS_NORM, (1, 64), "x"),
    "norm_wide": (ops.RMS_NORM, (2, 8208), "x"),
    "norm_of_heads": (ops.RMS_NORM, (6, 64), "x"),
    "norm_float_weight": (ops.RMS_NORM, (3, 1032), "x"),
    "add_norm": (ops.ADD_RMS_NORM, (5, 4104), "residual"),
    "layer_norm": (ops.LAYER_NORM, (7, 4104), "x"),
    "layer_norm_wide": (ops.LAYER_NORM, (2, 8208), "bias"),
    "layer_norm_float_weight": (ops.LAYER_NORM, (3, 64), "x"),
    "silu": (ops.SILU_MUL, (5, 2056), "x"),
    "embedding": (ops.EMBEDDING, (9, 40, 136), "ids"),
    "embedding_float": (ops.EMBEDDING, (9, 40, 4), "ids"),
    "argmax": (ops.ARGMAX, (5, 2056), "logits"),
    "argmax_one_warp": (ops.ARGMAX, (3, 24), "logits"),
    "argmax_wide": (ops.ARGMAX, (2, 17000), "logits"),
    "argmax_unaligned": (ops.ARGMAX, (5, 1027), "logits"),
    "argmax_float": (ops.ARGMAX, (3, 200), "logits"),
    "cache_write": (ops.KV_CACHE_WRITE, (9, 3, 64, 16, 32), "k"),
    "cache_write_keys": (ops.KV_CACHE_WRITE, (9, 1, 576, 16, 0), "k"),
    "rope": (ops.QKV_ROPE_CACHE, (9, 8, 2, 64, 16), "qkv"),
    "attention": (ops.PAGED_ATTENTION, (((1, 1), (1, 37), (9, 9), (5, 30), (0, 0)), 8, 2, 64, 16), "q"),
    "attention_split": (ops.PAGED_ATTENTION, (((1, 1), (1, 300), (1, 700)), 8, 2, 64, 32), "q"),
    "attention_16_heads": (ops.PAGED_ATTENTION, (((1, 300), (2, 40)), 16, 1, 32, 16), "q"),
    "rope_attention": (ops.QKV_ROPE_ATTENTION, (((1, 1), (1, 37), (9, 9), (5, 30), (0, 0)), 8, 2, 64, 16), "qkv"),
    "rope_attention_split": (ops.QKV_ROPE_ATTENTION, (((1, 1), (1, 641), (1, 700)), 8, 2, 64, 32), "qkv"),
    "rope_attention_16_heads": (ops.QKV_ROPE_ATTENTION, (((1, 300), (2, 40)), 16, 1, 32, 16), "qkv"),
    # Requests that are cut into more parts than there are thread blocks; one behind 32 others; one into more than 32
    # parts; of three blocks each.
    "attention_uneven": (ops.PAGED_ATTENTION, (((1, 1500), *((1, 40),) * 7, (5, 30)), 16, 16, 32, 16), "q"),
    "rope_attention_uneven": (
        ops.QKV_ROPE_ATTENTION,
        (((1, 20), *((1, 9),) * 33, (1, 900), (0, 0), (1, 700), (1, 3)), 8, 4, 32, 16),
        "qkv",
    ),
    "attention_many_parts": (ops.PAGED_ATTENTION, (((1, 20), *((1, 9),) * 38, (1, 9300)), 6, 2, 32, 16), "q"),
    "attention_uneven_split": (ops.PAGED_ATTENTION, (((1, 640), (1, 896)), 22, 22, 32, 16), "q"),
    # A block that one request fills in this step, and that others have for a part of their prefix.
    "attention_shared": (ops.PAGED_ATTENTION, (((1, 32), (1, 33), (20, 52)), 8, 2, 64, 16), "q"),
    "rope_attention_shared": (ops.QKV_ROPE_ATTENTION, (((1, 33), (1, 32), (1, 33), (20, 52)), 8, 2, 64, 16), "qkv"),
    "rope_attention_shared_prefill": (ops.QKV_ROPE_ATTENTION, (((1, 20), (16, 16), (30, 46)), 8, 2, 64, 16), "qkv"),
    "rope_attention_wide_heads": (ops.QKV_ROPE_ATTENTION, (((1, 150),), 3, 1, 256, 16), "cos"),
    "rope_attention_96": (ops.QKV_ROPE_ATTENTION, (((1, 150), (2, 20)), 2, 2, 96, 16), "qkv"),
    "rope_attention_192": (ops.QKV_ROPE_ATTENTION, (((1, 150), (2, 20)), 6, 1, 192, 16), "qkv"),
    "rope_attention_11_wide_heads": (ops.QKV_ROPE_ATTENTION, (((1, 150), (2, 20)), 11, 1, 256, 16), "qkv"),
    "attention_wide_heads": (ops.PAGED_ATTENTION, (((1, 150),), 3, 1, 256, 16), "q"),
    "attention_11_wide_heads": (ops.PAGED_ATTENTION, (((1, 150), (2, 20)), 11, 1, 256, 16), "q"),
}
CHANGES = {  # of a case's samples, which have bf16 weights, rows of tokens, a bias
    "norm_of_heads": lambda inputs: inputs | {"x": inputs["x"].view(2, 3, 64)},
    "norm_float_weight": lambda inputs: inputs | {"weight": inputs["weight"].float()},
    "layer_norm_float_weight": lambda inputs: {"x": inputs["x"], "weight": inputs["weight"].float()},
    "argmax_float": lambda inputs: {"logits": inputs["logits"].float()},
    "embedding_float": lambda inputs: inputs | {"table": inputs["table"].float()},
    "attention_shared": sharing(0, 0, 2),
    "rope_attention_shared": sharing(0, 1, 2),
    "rope_attention_shared_prefill": sharing(0, 1, 1),
}


class OnHost:
    """One call of one operator."""

    def __init__(self, op, inputs, attributes):
        self.op, self.inputs, self.attributes = op, inputs, attributes
        spec = harness.op_spec(op, inputs, attributes)
        choice = choose(spec, TARGET)
        self.kernels = [choice.family.build(spec, variant.config, TARGET) for variant in choice.variants]

    def expected(self):
        """Results of the reference, and what it has updated."""
        copies = {name: tensor.clone() for name, tensor in self.inputs.items()}
        self.written = harness.written(self.op, copies, self.attributes)
        self.rows = owned_rows(self.inputs, self.written[0].shape[0] if self.written else 1)
        return [*(result[self.rows] for result in self.written), *(copies[name] for name in self.op.updates)]

    def run(self, inputs, kernel, **options):
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = [torch.full_like(result, poison_of(result)) for result in self.written]
        # Tokens of prompts are cached by the kernel before.
        early = EARLY - {"kv"} if "prompts" in self.attributes else EARLY
        report = run_kernel(kernel, *given.values(), *outputs, early=early, **options)
        assert report.launched == report.waited == (1, 1)
        return [*(out[self.rows] for out in outputs), *(given[name] for name in self.op.updates)]

    def problems(self, actual, expected):
        tolerance = self.op.tolerance["bfloat16"]  # of exact operators, float32's is the same
        pairs = zip(actual, expected, strict=True)
        return [m for ours, theirs in pairs if (m := mismatch(ours, theirs, tolerance.rtol, tolerance.atol))]


@pytest.mark.parametrize("case", CASES)
def test_matches_reference_in_every_order_of_threads(case, generator):
    op, sizes, name = CASES[case]
    inputs, attributes = op.sample(generator, torch.bfloat16, *sizes)
    call = OnHost(op, CHANGES.get(case, lambda inputs: inputs)(inputs), attributes)
    expected = call.expected()
    for kernel in call.kernels:
        # Blocks that count on one another are run several at a time, too.
        results = [call.run(call.inputs, kernel, seed=seed, together=1 + seed) for seed in range(4)]
        assert not call.problems(results[0], expected)
        for result in results[1:]:
            assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))
    changed = call.inputs[name].clone()
    if call.op is ops.EMBEDDING:
        changed[0] = (changed[0] + 4) % len(call.inputs["table"])
    elif call.op is ops.ARGMAX:
        changed[:, -1] = 9  # the largest, as it has not been in every row but for a few chances in a million
    else:
        changed[call.rows[-1]] += 4  # of a request with several cached tokens
    assert call.problems(call.run({**call.inputs, name: changed}, call.kernels[0]), expected)


@pytest.mark.parametrize("width", [1032, 37])
def test_argmax_of_rows_that_have_no_largest(width, generator):
    """NaN is passed over; where nothing is left, a token that there is comes out."""
    logits_TV = torch.randn(5, width, generator=generator).to(torch.bfloat16)
    logits_TV[0, :-1], logits_TV[1], logits_TV[2:4] = float("nan"), float("nan"), float("-inf")
    logits_TV[3, 8:16] = float("nan")
    call = OnHost(ops.ARGMAX, {"logits": logits_TV}, {})
    expected = call.expected()[0]
    (found,) = call.run(call.inputs, call.kernels[0])
    assert found.tolist() == [[width - 1], [0], [0], [0], expected[4].tolist()]


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 64), ("bfloat16", 37), ("float32", 64)])
def test_every_function_of_an_expression(dtype, width, generator):
    check_expression(every_function(dtype, width), generator)


@pytest.mark.parametrize(("interleaved", "head_dim"), [(False, 32), (False, 20), (True, 32)])
def test_rotated_heads(interleaved, head_dim, generator):
    """Halves that are eight values and parts of them, and single ones."""
    check_expression(rotation("bfloat16", interleaved, head_dim=head_dim), generator)


def check_expression(nodes, generator, tokens=5):
    inputs, spec = inputs_of(nodes, generator, tokens), spec_of(nodes)
    (expected,) = harness.results(ops.ELEMENTWISE, inputs, {"expression": tuple(nodes)})
    kernel = Elementwise().build(spec, {}, TARGET)

    def run(given):
        out = torch.full([tokens, *spec.outputs[0].sizes()[1:]], float("nan"), dtype=expected.dtype)
        report = run_kernel(kernel, *given.values(), out, early=())
        assert report.launched == report.waited == (1, 1)
        return (out.view_as(expected),)

    harness.assert_matches(ops.ELEMENTWISE, run(inputs), (expected,))
    changed = inputs["x0"].clone()
    changed[-1] += 4
    with pytest.raises(AssertionError):
        harness.assert_matches(ops.ELEMENTWISE, run(inputs | {"x0": changed}), (expected,))
