"""Runs a plan whose steps are functions of torch: each batch in a bucket's shape, so that each bucket is one graph.

Values are what functions return: a chip's graph compiler lays out its own memory.  On a CPU the same functions run one
by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from vllm_compile.spec import Sym, TensorSpec

from .buckets import BucketPlan
from .padded_steps import Lengths, Padded, batches_of, bucket_of, pad, shape_of
from .plan import CallStep, Plan, TorchStep
from .torch_functions import FUNCTIONS
from .tpc_kernels import as_graphs

Observer = Callable[[int, torch.Tensor], None]


class _Entry(torch.nn.Module):
    """An entry point as a function of tensors."""

    def __init__(self, evaluate: Callable[..., torch.Tensor], name: str) -> None:
        super().__init__()
        self._evaluate, self._name = evaluate, name

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._evaluate(self._name, inputs)


class TorchExecutor:
    """Holds the weights of a plan of torch steps, and runs it; see `Executor`.

    Args:
        plan: what to run.
        device: where.
        buckets: shapes to run batches in; None runs each in its own.

    Attributes:
        timings: not measured: graphs are not taken apart.
    """

    def __init__(self, plan: Plan, device: torch.device, buckets: BucketPlan | None = None) -> None:
        self.plan, self.device, self.buckets = plan, device, buckets
        self.timings: dict[str, list[float]] | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._graphs = {name: as_graphs(_Entry(self._evaluate, name), device) for name in ("forward", "logits")}

    def set_plan(self, plan: Plan) -> None:
        """Run this plan from now on."""
        self.plan = plan

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as weights, by the names the plan gives them."""
        self._weights = dict(weights)

    def weight(self, name: str) -> torch.Tensor:
        """The weight the plan calls `name`."""
        return self._weights[name]

    def prepare(self, max_tokens: int, max_rows: int = 0) -> None:
        """Nothing to allocate: the graphs' memory is the graph compiler's."""

    def run(
        self,
        name: str,
        tokens: int,
        inputs: Mapping[str, torch.Tensor],
        observer: Observer | None = None,
        prefill: bool = False,
    ) -> torch.Tensor:
        """Run entry point `name` on `tokens` tokens.  Lengths are read on the host: they choose the bucket.

        With an observer, all requests are one batch of its own shape, whose layers are run one by one.

        Raises:
            BucketError: no bucket covers a batch.
        """
        with torch.no_grad():
            return self._logits(inputs["hidden"]) if name == "logits" else self._forward(inputs, tokens, observer)

    def _logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """In as many rows as the smallest bucket of decodes that has so many requests."""
        rows = hidden_SD.shape[0]
        known = self.buckets.buckets if self.buckets is not None else ()
        padded = min((b.batch for b in known if b.decodes and b.batch >= rows), default=rows)
        if padded > rows:
            hidden_SD = torch.cat([hidden_SD, hidden_SD.new_zeros(padded - rows, hidden_SD.shape[1])])
        return self._graphs["logits"]({"hidden": hidden_SD})[:rows]

    def _forward(self, inputs: Mapping[str, torch.Tensor], tokens: int, observer: Observer | None) -> torch.Tensor:
        (result,) = self.plan.functions["forward"].results
        out_TD = torch.zeros(result.spec.sizes(tokens), dtype=getattr(torch, result.spec.dtype), device=self.device)
        caches = {name: tensor for name, tensor in inputs.items() if name.startswith("kv_")}
        block_size = next(iter(caches.values())).shape[2]
        lengths = Lengths(inputs["query_start_loc"].diff().tolist(), inputs["seq_lens"].tolist())
        for batch in batches_of(lengths, together=observer is not None):
            shape = shape_of(batch, lengths, block_size)
            bucket = shape if observer is not None else bucket_of(shape, self.buckets, block_size)
            padded = pad(inputs, lengths, batch, bucket, block_size)
            given = {**padded.inputs, **caches}
            if observer is None:
                hidden_TD = self._graphs["forward"](given)
            else:
                hidden_TD = self._evaluate("forward", given, _unpadded(observer, padded))
            out_TD[padded.places] = hidden_TD[padded.taken]
        return out_TD

    def _evaluate(
        self, name: str, inputs: Mapping[str, torch.Tensor], observer: Observer | None = None
    ) -> torch.Tensor:
        function = self.plan.functions[name]
        values = {**inputs, **{a.buffer: self._weights[a.buffer] for a in function.weights}}
        return self._function(name, values, observer)

    def _function(self, name: str, values: dict[str, torch.Tensor], observer: Observer | None) -> torch.Tensor:
        function = self.plan.functions[name]
        layer = 0
        for step in function.steps:
            if isinstance(step, CallStep):
                callee = self.plan.functions[step.function]
                *given, out = step.arguments
                formal = [*callee.inputs, *callee.weights]
                if observer is not None:
                    values[given[0]] = values[given[0]].clone()
                    observer(layer, values[given[0]])
                layer += 1
                inner = {a.buffer: values[n] for a, n in zip(formal, given, strict=True)}
                values[out] = self._function(step.function, inner, None)
                continue
            if not isinstance(step, TorchStep):
                raise TypeError(f"{step.op} is a kernel, which has an executor of its own")
            arguments = {key: _view(values[a.buffer], a.spec) for key, a in step.inputs}
            found = FUNCTIONS[step.function](**arguments, **dict(step.attributes))
            results = found if isinstance(found, tuple) else (found,)
            for argument, result in zip(step.results, results, strict=True):
                values[argument.buffer] = _view(result, argument.spec)
        (result,) = function.results
        return _view(values[result.buffer], result.spec)


def _view(value: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A value under a step's own shape; those of weights, tables and caches are theirs already."""
    if spec.shape[:1] != (Sym.TOKENS,):
        return value
    return value.reshape(-1, *(int(dim) for dim in spec.shape[1:])) if len(spec.shape) > 1 else value


def _unpadded(observer: Observer, padded: Padded) -> Observer:
    """Shows an observer the real tokens only, in the step's order; what it writes is taken."""

    def observe(layer: int, hidden_TD: torch.Tensor) -> None:
        order = padded.places.argsort()
        real_TD = hidden_TD[padded.taken[order]]
        observer(layer, real_TD)
        hidden_TD[padded.taken[order]] = real_TD

    return observe
