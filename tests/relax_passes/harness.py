"""Small Relax functions to send through a pass, and what to ask of them afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import tvm
from tvm import relax, tirx

from tests import interpreter
from tests.models import Pair
from vllm_compile.ops import OPS
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.relax_passes.base import Definitions, clean, match_counts
from vllm_compile.runtime.plan import ModelShape

TOKENS = 5
Shape = tuple[int | str, ...]


def module(build: Callable[..., Any], dtype: str = "float32", **parameters: Shape) -> tvm.IRModule:
    """`main` with the named parameters; `build(emit, *parameters)` gives its result; "T" is the tokens."""
    tokens = tirx.Var("T", "int64")
    builder = relax.BlockBuilder()
    variables = [
        relax.Var(name, relax.TensorType([tokens if dim == "T" else dim for dim in shape], dtype))
        for name, shape in parameters.items()
    ]
    with builder.function("main", variables):
        with builder.dataflow():
            out = builder.emit_output(build(builder.emit, *variables))
        builder.emit_func_output(out)
    return clean(builder.get())


def random_arguments(function: relax.Function, generator: torch.Generator) -> list[torch.Tensor]:
    """A tensor for each parameter of a function over `TOKENS` tokens."""
    return [
        torch.randn(
            [TOKENS if isinstance(dim, tirx.Var) else int(dim) for dim in p.ty.shape.values], generator=generator
        ).to(getattr(torch, str(p.ty.dtype)))
        for p in function.params
    ]


def operators(function: relax.Function) -> Counter[str]:
    """How often each operator is called; ours by their short names."""
    calls = (binding.value for binding in Definitions(function).bindings)
    names = (c.op.name if isinstance(c.op, tvm.ir.Op) else "call" for c in calls if isinstance(c, relax.Call))
    return Counter(name.removeprefix("vllm_compile.") for name in names)


def own_operators(function: relax.Function) -> dict[str, int]:
    """How often each of our operators is called."""
    return {name: count for name, count in operators(function).items() if name in OPS}


def apply(
    transform: Any, before: tvm.IRModule, generator: torch.Generator, **given: torch.Tensor
) -> tuple[relax.Function, int]:
    """(`main` after the pass, its matches), after checking that `main` still computes the same.

    Parameters that are not `given` are random.
    To 1e-6 of the largest value: a merged product may add its terms in another order.
    """
    after = transform(before)
    relax.analysis.well_formed(after)  # raises if not
    names = [parameter.name for parameter in before["main"].params]
    drawn = dict(zip(names, random_arguments(before["main"], generator), strict=True))
    arguments = [(drawn | given)[name] for name in names]
    expected, actual = (interpreter.run(m, "main", *arguments) for m in (before, after))
    for want, got in zip(_tuple(expected), _tuple(actual), strict=True):
        tolerance = 1e-6 if want.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())
    return after["main"], match_counts(after)[transform.info.name]


def _tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


class Served:
    """A model at some stage of the pipeline, driven as a serving engine would.

    Before the layers are outlined it has one function, `main`; then `forward` and `logits`; at
    last a function `weights` too, whose results these two take.
    """

    def __init__(self, module: tvm.IRModule, pair: Pair) -> None:
        self._module, self._config = module, pair.model.config
        self._functions = {var.name_hint: f for var, f in module.functions_items()}
        self.weights = pair.weights()
        if "weights" in self._functions:
            function = self._functions["weights"]
            given = (self.weights[p.name] for p in function.params)
            stored = interpreter.run(module, "weights", *given)
            self.weights = dict(zip(map(str, function.attrs["stored"]), stored, strict=True))

    def batch(self, lengths: list[int]) -> PagedBatch:
        config = self._config
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sizes = config.hidden_size, config.vocab_size, config.max_position_embeddings
        dtype = str(config.dtype).removeprefix("torch.")
        return PagedBatch(ModelShape(config.num_hidden_layers, *heads, *sizes, dtype), lengths)

    def logits(self, ids: torch.Tensor, batch: PagedBatch, step: dict[str, torch.Tensor]) -> torch.Tensor:
        """[T, V] for the tokens of one step."""
        kv = {f"kv_{layer}": cache for layer, cache in enumerate(batch.kv)}
        given = {"input_ids": ids, **kv, **step, **self.weights}
        if "main" in self._functions:
            return self._run("main", given)[0]
        return self._run("logits", given | {"hidden": self._run("forward", given)})[0]

    def prompt(self, ids: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
        """Logits of one prompt, fed whole or in chunks."""
        batch = self.batch([len(ids)])
        bounds = [*range(0, len(ids), chunk or len(ids)), len(ids)]
        return torch.cat([self.logits(ids[b:e], batch, batch.step([b], [e])) for b, e in pairwise(bounds)])

    def _run(self, name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return interpreter.run(self._module, name, *(given[p.name] for p in self._functions[name].params))
