"""What TVM does with a kernel's PrimFunc when it is called: binds dimensions, computes the grid and the arguments."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from tvm import tirx
from tvm.sym import Analyzer

from . import runner


def run_kernel(
    function: tirx.PrimFunc,
    *tensors: torch.Tensor,
    early: Collection[str] | None = None,
    together: int | None = None,
    seed: int | None = None,
) -> runner.Report:
    """Run a kernel that is one call of a device function on `tensors`, its inputs and outputs; see `runner.run`."""
    bound = Analyzer()  # dimensions of the tensors
    arguments: dict[str, runner.Value] = {}
    for buffer, tensor in zip(function.params, tensors, strict=True):
        assert str(buffer.dtype) == str(tensor.dtype).removeprefix("torch."), (buffer.name, tensor.dtype)
        _bind(buffer.name, buffer.shape, tensor.shape, bound)
        _bind(buffer.name, buffer.strides, tensor.stride() if len(buffer.strides) else (), bound)
        arguments[buffer.name] = tensor
    sizes = {"blockIdx": [1, 1, 1], "threadIdx": [1, 1, 1], "clusterCtaIdx": [1, 1, 1]}
    assertions, loops, allocations, call = _parts(function)
    for assertion in assertions:
        if not _value(assertion.condition, bound):
            raise ValueError("".join(part.value for part in assertion.message_parts))
    for loop in loops:
        index, axis = loop.thread_binding.thread_tag.split(".")
        sizes[index]["xyz".index(axis)] = _value(loop.extent, bound)
    words, scalars = _arguments(function, call)
    arguments |= {name: _value(expression, bound) for name, expression in scalars.items()}
    return runner.run(
        "",
        f"{call.args[0].value}({', '.join(words)})",
        grid=sizes["blockIdx"],
        block=sizes["threadIdx"],
        arguments=arguments,
        shared_bytes=sum(_value(allocation.buffer.shape[0], bound) for allocation in allocations),
        cluster=sizes["clusterCtaIdx"][0],
        together=together,
        early=early,
        source=call.args[-1].value,
        seed=seed,
    )


def prepare(functions: Iterable[tirx.PrimFunc]) -> None:
    """Compile several kernels at once."""
    units = []
    for function in functions:
        call = _parts(function)[-1]
        words, scalars = _arguments(function, call)
        types = {buffer.name: runner.TYPES[str(buffer.dtype)] + "*" for buffer in function.params}
        types |= {name: "float" if "float" in str(value.ty) else "int64_t" for name, value in scalars.items()}
        units.append(runner.unit(call.args[-1].value, f"{call.args[0].value}({', '.join(words)})", types))
    runner.prepare(units)


def _parts(function: tirx.PrimFunc) -> tuple[list[Any], list[Any], list[Any], Any]:
    """What is asserted before, loops over blocks and threads, allocations of shared memory, and the call."""
    *assertions, body = function.body.seq if isinstance(function.body, tirx.SeqStmt) else [function.body]
    loops = []
    while isinstance(body, tirx.For | tirx.AttrStmt):  # of loops, and what the assembler is told
        loops += [body] if isinstance(body, tirx.For) else []
        body = body.body
    *allocations, evaluation = body.seq if isinstance(body, tirx.SeqStmt) else [body]
    return assertions, loops, allocations, evaluation.value


def _arguments(function: tirx.PrimFunc, call: Any) -> tuple[list[str], dict[str, Any]]:
    """The call's arguments in C++, and those of them that are to be computed."""
    tensors = {buffer.name for buffer in function.params}
    words, scalars = [], {}
    for argument in call.args[1:-1]:
        operator = getattr(getattr(argument, "op", None), "name", "")
        if operator == "tirx.buffer_data":
            name = argument.args[0].name
            words.append(name if name in tensors else "shared")
        elif operator == "tirx.reinterpret":
            words.append("nullptr")
        else:
            words.append(f"argument_{len(words)}")
            scalars[words[-1]] = argument
    return words, scalars


def _bind(name: str, dimensions: Sequence[Any], sizes: Sequence[int], bound: Analyzer) -> None:
    for dimension, size in zip(dimensions, sizes, strict=True):
        if not hasattr(bound.simplify(dimension), "value"):
            bound.bind(dimension, tirx.IntImm("int64", size))
        assert _value(dimension, bound) == size, f"{name} has {tuple(sizes)}, expected {list(dimensions)}"


def _value(expression: Any, bound: Analyzer) -> int | float:
    return expression if isinstance(expression, int) else bound.simplify(expression).value
