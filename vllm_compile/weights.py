"""Computes the stored weights from a checkpoint, one at a time.

The `weights` function of a compiled module says what each stored weight is in terms of the
checkpoint's tensors; here it is evaluated with torch, so that only the tensors of one weight
are in memory.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from .errors import ModelError, UnsupportedError
from .heap import trim
from .lowering import StoredWeight
from .relax_passes.base import Definitions
from .relax_passes.lift_weights import WEIGHTS
from .runtime.memory import ALIGNMENT
from .spec import OpSpec

SHARD_BYTES = 1 << 29
WORKERS = 2  # weights being computed while another is written
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float32": "F32", "uint8": "U8"}

OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "relax.concat": lambda call, tensors: torch.cat(list(tensors), dim=int(call.attrs.axis)),
    "relax.permute_dims": lambda call, tensor: tensor.permute([int(axis) for axis in call.attrs.axes]),
    "relax.strided_slice": lambda call, tensor, *where: tensor[_slices(tensor.dim(), *where)].contiguous(),
    "relax.add": lambda call, a, b: a + b,
    "relax.multiply": lambda call, a, b: a * b,
    "relax.astype": lambda call, tensor: tensor.to(getattr(torch, str(call.attrs.dtype))),
    "relax.reshape": lambda call, tensor, shape: tensor.reshape(shape),
    "relax.squeeze": lambda call, tensor: tensor.reshape([int(dim) for dim in call.ty.shape.values]),
    "vllm_compile.embedding": lambda call, ids, table: table[ids],
}


def _slices(rank: int, axes: list[int], begin: list[int], end: list[int], strides: list[int]) -> tuple[slice, ...]:
    where = [slice(None)] * rank
    for axis, first, last, step in zip(axes, begin, end, strides, strict=True):
        where[axis] = slice(first, last, step)
    return tuple(where)


class UnfitWeightError(Exception):
    """A weight that the layout chosen for it cannot hold; `call` is the call that reads it."""

    def __init__(self, parameter: str, call: OpSpec, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter, self.call, self.reason = parameter, call, reason


class WeightProgram:
    """Evaluates the fields of a module's `weights` function by name.

    `read(name)` gives the tensor of a parameter of that function.
    """

    def __init__(self, module: tvm.IRModule, read: Callable[[str], torch.Tensor]) -> None:
        function = module[WEIGHTS]
        self._definitions, self._read = Definitions(function), read
        fields = self._definitions.value(function.body.body).fields
        self._fields = dict(zip(map(str, function.attrs["stored"]), fields, strict=True))

    def evaluate(self, stored: StoredWeight) -> torch.Tensor:
        """The weight in the layout its kernel wants, contiguous.

        Raises:
            UnfitWeightError: the layout cannot hold it.
        """
        plain = self._value(self._fields[stored.parameter])
        try:
            packed = plain.contiguous() if stored.layout is None else stored.layout.pack(plain)
        except ValueError as error:
            raise UnfitWeightError(stored.parameter, stored.read_by, str(error)) from error
        if list(packed.shape) != stored.spec.sizes():
            raise ModelError(f"weight {stored.name} has shape {list(packed.shape)}, expected {stored.spec.sizes()}")
        return packed

    def _value(self, expr: Any) -> Any:
        value = self._definitions.value(expr)
        if isinstance(value, relax.Var):
            tensor = self._read(value.name)
            shape = [int(dim) for dim in value.ty.shape.values]
            if list(tensor.shape) != shape:
                raise ModelError(
                    f"{value.name}: shape {list(tensor.shape)} in the checkpoint, config.json says {shape}"
                )
            return tensor.to(getattr(torch, str(value.ty.dtype)))
        if isinstance(value, relax.ShapeExpr):
            return [int(dim) for dim in value.values]
        if isinstance(value, tirx.IntImm):
            return int(value)
        if isinstance(value, GenericConst):
            return torch.from_numpy(value.value.numpy().astype("float64")).to(getattr(torch, str(value.ty.dtype)))
        if isinstance(value, relax.Tuple):
            return [self._value(field) for field in value.fields]
        if isinstance(value, relax.Call) and value.op.name in OPERATORS:
            return OPERATORS[value.op.name](value, *(self._value(arg) for arg in value.args))
        operator = value.op.name if isinstance(value, relax.Call) else type(value).__name__
        raise UnsupportedError(f"operator {operator} ({expr.ty}) on weights is not supported")


def write_shards(
    weights: Iterable[StoredWeight], evaluate: Callable[[StoredWeight], torch.Tensor], directory: Path
) -> None:
    """Write weights as model-00001.safetensors and so on, one at a time.

    In each file the weights start on cache lines, so that kernels can read them where the file is mapped;
    the safetensors library aligns to 8 bytes only, and wants a whole shard in memory.
    """
    for number, shard in enumerate(_shards(weights), 1):
        header, offset = {}, 0
        for weight in shard:
            end = offset + weight.spec.nbytes()
            dtype = SAFETENSORS_DTYPES[weight.spec.dtype]
            header[weight.name] = {
                "dtype": dtype,
                "shape": weight.spec.sizes(),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        with (directory / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in _ahead(evaluate, shard):
                file.write(tensor.view(torch.uint8).numpy().data)
                del tensor  # before the next is waited for
                trim()


def _ahead(evaluate: Callable[[StoredWeight], torch.Tensor], weights: Iterable[StoredWeight]) -> Iterator[torch.Tensor]:
    """The weights in order, the next few computed meanwhile (torch releases the GIL)."""
    with ThreadPoolExecutor(WORKERS) as pool:
        pending: deque[Future[torch.Tensor]] = deque()
        for weight in weights:
            pending.append(pool.submit(evaluate, weight))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _shards(weights: Iterable[StoredWeight]) -> list[list[StoredWeight]]:
    """Groups of about SHARD_BYTES; in each, weights that are no multiple of a cache line come last."""
    shards: list[list[StoredWeight]] = [[]]
    for weight in weights:
        if sum(w.spec.nbytes() for w in shards[-1]) >= SHARD_BYTES:
            shards.append([])
        shards[-1].append(weight)
    return [sorted(shard, key=lambda w: w.spec.nbytes() % ALIGNMENT != 0) for shard in shards]
