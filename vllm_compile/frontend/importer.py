"""A traced model to Relax, with our own operators where they carry a meaning.

TVM's importer does the plain tensor operators.  What it gets wrong, or what should stay
whole, is converted here: linear layers (it would make their result float32 whatever the
model's dtype), attention, embeddings, layer boundaries and position tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
import tvm
from torch import fx
from torch.export.graph_signature import InputKind
from tvm import relax, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import CAUSAL_ATTENTION, EMBEDDING, LAYER_BOUNDARY, LAYER_NORM, LIMIT_GROUPS, LINEAR, MOE
from vllm_compile.relax_passes.base import same_type, substitute
from vllm_compile.spec import Sym

from .hf import TracedModel
from .nodes import name, place
from .position_tables import tabulate_positions
from .recorded_types import difference


@dataclass(frozen=True)
class ImportedModel:
    """A model in Relax.

    Attributes:
        module: `main(input_ids, positions, weights...) -> logits [1, T, V]`.
        weights: checkpoint name of each weight parameter, by the parameter's name in Relax.
        tables: position tables by the name of their parameter in Relax.
    """

    module: tvm.IRModule
    weights: dict[str, str]
    tables: dict[str, torch.Tensor]


def import_model(traced: TracedModel, max_positions: int) -> ImportedModel:
    """Convert a traced model; position tables cover positions below `max_positions`, and the model's long sequences.

    Raises:
        UnsupportedError: the graph has an operator that cannot be converted; it is named.
    """
    program = traced.program
    positions = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "positions")
    tables = tabulate_positions(program, positions, max_positions, traced.long)
    importer = _Importer(
        [relax.Var(f"position_table_{i}", _table_type(t)) for i, t in enumerate(tables)],
        max(max_positions, traced.long.positions),
    )
    try:
        module = importer.from_exported_program(program, True, True, False, importer.converters())
    except UnsupportedError as error:
        raise UnsupportedError(f"{traced.config.model_type}: {error}") from error
    names = {
        s.arg.name: s.target.removeprefix("model.")
        for s in program.graph_signature.input_specs
        if s.kind is InputKind.PARAMETER
    }
    main = _rename(module["main"], importer.tables, names)
    module = tvm.IRModule({"main": main})
    weights = {_identifier(name): name for name in names.values()}
    return ImportedModel(module, weights, {v.name: t for v, t in zip(importer.tables, tables, strict=True)})


def _rename(main: relax.Function, tables: list[relax.Var], names: dict[str, str]) -> relax.Function:
    """`main` with the tables as parameters, weights named as in the checkpoint, and T for the tokens."""
    tokens = main.params[0].ty.shape.values[0]
    main = main.bind_symbolic_vars({tokens: tirx.Var(Sym.TOKENS, "int64")})
    renamed = {p: relax.Var(_identifier(names.get(p.name, p.name)), p.ty) for p in main.params}
    body = substitute(main.body, renamed)
    used = set(relax.analysis.free_vars(body))
    parameters = [*renamed.values(), *(table for table in tables if table in used)]
    return relax.Function(parameters, body, main.ret_ty).with_attr("global_symbol", "main")


def _identifier(name: str) -> str:
    """A checkpoint's name for a weight as the name of a variable."""
    return name.replace(".", "_")


def _table_type(table: torch.Tensor) -> relax.TensorType:
    return relax.TensorType(list(table.shape), str(table.dtype).removeprefix("torch."))


class _Importer(ExportedProgramImporter):
    """TVM's importer with our converters; parameters stay on meta, so they are never copied."""

    def __init__(self, tables: list[relax.Var], max_positions: int) -> None:
        super().__init__()
        self.tables, self.max_positions = tables, max_positions

    def _check_unsupported_func_type(self, nodes):
        """Refuse operators that nothing converts; from here on those that are converted say where they stand."""
        for node in nodes:
            if node.op == "call_function":
                if name(node) not in self.convert_map:
                    raise UnsupportedError(f"operator {name(node)} ({place(node)}) is not supported")
                self.convert_map[name(node)] = _named(self.convert_map[name(node)])

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor_value):
        if tensor_value.is_meta:
            return None
        return ExportedProgramImporter._convert_pytorch_tensor_to_tvm(tensor_value)

    def converters(self):
        """Names of torch operators -> converters, each `(node, importer) -> Relax variable`."""
        return {
            "linear.default": _linear,
            "addmm.default": _addmm,
            "matmul.default": _matmul,
            "numpy_T.default": _transpose,
            "layer_norm.default": _layer_norm,
            "dropout.default": lambda node, importer: importer.env[node.args[0]],
            "embedding.default": _embedding,
            "causal_attention.default": _causal_attention,
            "layer_boundary.default": _layer_boundary,
            "limit_groups.default": _limit_groups,
            "moe.default": _moe,
            "view.default": _reshape,
            "reshape.default": _reshape,
            "select.int": _select,
            "div_.Tensor": _divide_in_place,
            "to.dtype": _cast,
            "softmax.int": _softmax,
            "topk.default": _topk,
            "position_table.default": _position_table,
        }


def _named(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The converter, whose result is of the type recorded for the node.

    Its errors say which operator of which module could not be converted.
    """
    if hasattr(convert, "names_errors"):
        return convert

    @wraps(convert)
    def converted(node: fx.Node, *importer: _Importer) -> Any:
        what = f"operator {name(node)} ({place(node)}) cannot be converted"
        try:
            value = convert(node, *importer)
        except Exception as error:  # TVM's converters raise whatever the operators they call do
            raise UnsupportedError(f"{what}: {' '.join(str(error).split())}") from error
        stands_for_rows = importer and value in importer[0].tables
        if not stands_for_rows and (reason := difference(node, value)):
            raise UnsupportedError(f"{what}: {reason}")
        return value

    converted.__dict__["names_errors"] = True
    return converted


def _select(node: fx.Node, importer: _Importer) -> relax.Var:
    """One index of an axis, as a slice without the axis."""
    x, axis, index = importer.env[node.args[0]], cast(int, node.args[1]), node.args[2]
    if not isinstance(index, int):
        raise UnsupportedError("its index depends on the number of tokens")
    shape = x.ty.shape.values
    axis %= len(shape)
    if index < 0:
        index += int(shape[axis])
    part = importer.block_builder.emit(relax.op.strided_slice(x, [axis], [index], [index + 1], [1]))
    return importer.block_builder.emit(relax.op.squeeze(part, [axis]))


def _reshape(node: fx.Node, importer: _Importer) -> relax.Var:
    """TVM's own fails on a shape that has the same axes as its operand's, tokens among them, in another order."""
    x, shape = importer.retrieve_args(node)
    reshaped = importer._emit_torch_reshape(x, shape)
    return x if same_type(reshaped, x) else reshaped


def _linear(node: fx.Node, importer: _Importer) -> relax.Var:
    x, weight, *bias = importer.retrieve_args(node)
    inputs = {"x": x, "weight": weight, "bias": bias[0] if bias else None}
    return importer.block_builder.emit(LINEAR(inputs))


def _addmm(node: fx.Node, importer: _Importer) -> relax.Var:
    """GPT-2 keeps its weights transposed."""
    bias, x, weight = importer.retrieve_args(node)[:3]
    transposed = importer.block_builder.emit(relax.op.permute_dims(weight, [1, 0]))
    return importer.block_builder.emit(LINEAR({"x": x, "weight": transposed, "bias": bias}))


def _transpose(node: fx.Node, importer: _Importer) -> relax.Var:
    x = importer.env[node.args[0]]
    return importer.block_builder.emit(relax.op.permute_dims(x, list(range(x.ty.ndim))[::-1]))


def _matmul(node: fx.Node, importer: _Importer) -> relax.Var:
    """A product with a weight [K, N] (Falcon writes its transpose out) is a linear layer."""
    x, weight = importer.retrieve_args(node)
    if len(weight.ty.shape.values) != 2 or weight.ty.shape.values[0] != x.ty.shape.values[-1]:
        raise UnsupportedError(f"operator matmul of {x.ty} and {weight.ty} is not supported")
    transposed = importer.block_builder.emit(relax.op.permute_dims(weight, [1, 0]))
    return importer.block_builder.emit(LINEAR({"x": x, "weight": transposed}))


def _layer_norm(node: fx.Node, importer: _Importer) -> relax.Var:
    args = importer.retrieve_args(node)
    x, shape, weight, bias, eps = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
    if len(shape) != 1 or weight is None:
        raise UnsupportedError(f"layer_norm over {list(shape)} without a weight is not supported")
    return importer.block_builder.emit(LAYER_NORM({"x": x, "weight": weight, "bias": bias}, eps=float(eps)))


def _embedding(node: fx.Node, importer: _Importer) -> relax.Var:
    table, ids = importer.retrieve_args(node)[:2]
    if ids in importer.tables:  # a function of the position looked up in a weight: that depends on weights alone
        rows = importer.block_builder.emit(EMBEDDING({"ids": ids, "table": table}))
        (lookup,) = node.args[1:2]
        return _rows_of_positions(importer, cast(fx.Node, lookup).args[0], rows)
    return importer.block_builder.emit(EMBEDDING({"ids": ids, "table": table}))


def _cast(node: fx.Node, importer: _Importer) -> relax.Expr:
    """A cast to the dtype a value already has (float32 models are full of them) is nothing."""
    x = importer.env[node.args[0]]
    dtype = str(node.args[1]).removeprefix("torch.")
    return x if str(x.ty.dtype) == dtype else importer.block_builder.emit(relax.op.astype(x, dtype))


def _softmax(node: fx.Node, importer: _Importer) -> relax.Var:
    """In the dtype that is asked for: the values are cast before."""
    x, axis, *dtype = node.args
    values = importer.env[x]
    wanted = dtype[0] if dtype else node.kwargs.get("dtype")
    name = str(values.ty.dtype) if wanted is None else str(wanted).removeprefix("torch.")
    if str(values.ty.dtype) != name:
        values = importer.block_builder.emit(relax.op.astype(values, name))
    return importer.block_builder.emit(relax.op.nn.softmax(values, cast(int, axis)))


def _topk(node: fx.Node, importer: _Importer) -> relax.Var:
    """In falling order, which is one of those that a caller who wants none gets."""
    x, k, axis, largest = (*importer.retrieve_args(node), -1, True)[:4]
    return importer.block_builder.emit(relax.op.topk(x, k, axis, "both", largest, "int64"))


def _causal_attention(node: fx.Node, importer: _Importer) -> relax.Var:
    q, k, v, layer, scale, window, soft_cap = importer.retrieve_args(node)
    if window >= importer.max_positions:  # a window as long as the model sees everything
        window = 0
    attributes = {"layer": layer, "scale": scale, "window": window, "soft_cap": soft_cap}
    return importer.block_builder.emit(CAUSAL_ATTENTION({"q": q, "k": k, "v": v}, **attributes))


def _layer_boundary(node: fx.Node, importer: _Importer) -> relax.Var:
    x, index = importer.retrieve_args(node)
    return importer.block_builder.emit(LAYER_BOUNDARY({"x": x}, index=index))


def _limit_groups(node: fx.Node, importer: _Importer) -> relax.Var:
    scores, groups, kept = importer.retrieve_args(node)
    return importer.block_builder.emit(LIMIT_GROUPS({"scores": scores}, groups=groups, kept=kept))


def _moe(node: fx.Node, importer: _Importer) -> relax.Var:
    x, experts, scores, gate_up, down = importer.retrieve_args(node)
    inputs = {"x": x, "experts": experts, "scores": scores, "gate_up": gate_up, "down": down}
    return importer.block_builder.emit(MOE(inputs))


def _divide_in_place(node: fx.Node, importer: _Importer) -> relax.Var:
    """Whoever reads the value that was divided reads the result from here on."""
    a, b = importer.retrieve_args(node)
    importer.env[node.args[0]] = quotient = importer.block_builder.emit(relax.op.divide(a, b))
    return quotient


def _position_table(node: fx.Node, importer: _Importer) -> relax.Var:
    """The rows of a table; a table of whole numbers stands for its values at the positions."""
    positions, index = node.args[:2]
    table = importer.tables[cast(int, index)]
    return table if len(table.ty.shape.values) == 1 else _rows_of_positions(importer, positions, table)


def _rows_of_positions(importer: _Importer, positions: Any, table: relax.Var) -> relax.Var:
    rows = importer.block_builder.emit(EMBEDDING({"ids": importer.env[positions], "table": table}))
    return importer.block_builder.emit(relax.op.expand_dims(rows, 0))
