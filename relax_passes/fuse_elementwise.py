"""What no other pass gave a name becomes `elementwise` operators, as few as can be."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from vllm_compile.errors import UnsupportedError
from vllm_compile.expression import BINARY, UNARY, Node
from vllm_compile.ops import ELEMENTWISE
from vllm_compile.ops.base import PREFIX
from vllm_compile.spec import Sym

from .base import Definitions, Rewrite, counted_pass, replace_by, rewrite_functions, used_vars
from .lift_weights import WEIGHTS
from .outline_layers import place

VIEWS = {"relax.reshape", "relax.expand_dims", "relax.squeeze"}


@counted_pass("fuse_elementwise")
def fuse_elementwise(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Fuse what leads from one operator of ours to the next; casts, slices and permutations cost no memory.

    Before:
        y = linear(x, w)
        z = linear(multiply(tanh(y), 0.5), v)
    After:
        y = linear(x, w)
        a = elementwise(y, expression=(input x0, tanh, constant 0.5, multiply))
        z = linear(a, v)
    A value that several of these need is computed in each, unless an operator of ours reads it too.

    Raises:
        UnsupportedError: an operator cannot be part of an expression; it is named, with its layers.
    """

    def find(function: relax.Function) -> dict[relax.Var, Rewrite]:
        name = str(function.attrs["global_symbol"]) if "global_symbol" in (function.attrs or {}) else None
        if name == WEIGHTS:
            return {}
        try:
            return _find(function)
        except UnsupportedError as error:
            var = next(var for var, known in module.functions_items() if known.same_as(function))
            raise UnsupportedError(f"{place(module, var.name_hint)}: {error}") from error

    return rewrite_functions(module, find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    d = Definitions(function)
    wanted = {function.body.body} | {v for b in d.bindings if not _is_plain(d, b.var) for v in used_vars(b.value)}
    roots = {b.var for b in d.bindings if b.var in wanted and _is_plain(d, b.var)}
    views = {root for root in roots if _is_view(d, root, roots)}
    return {root: replace_by(root, _Group(d, roots - views).call(root)) for root in roots - views}


def _is_plain(d: Definitions, expr: Any) -> bool:
    """True if `expr` is bound to a call of an operator that is not ours, or to a part of its result."""
    value = d.value(expr)
    if isinstance(value, relax.TupleGetItem):
        value = d.value(value.tuple_value)
    return isinstance(value, relax.Call | relax.Tuple) and not (
        isinstance(value, relax.Call) and (isinstance(value.op, tvm.ir.GlobalVar) or value.op.name.startswith(PREFIX))
    )


def _is_view(d: Definitions, expr: Any, roots: set[relax.Var]) -> bool:
    """True if `expr` is what is in memory already under another shape."""
    call = d.value(expr)
    while isinstance(call, relax.Call) and call.op.name in VIEWS and _is_token_major(call.args[0]):
        expr, call = call.args[0], d.value(call.args[0])
        if expr in roots or not _is_plain(d, expr):
            return True
    return False


def _is_token_major(expr: relax.Expr) -> bool:
    shape = _shape(expr)
    return Sym.TOKENS not in shape or all(dim == 1 for dim in shape[: shape.index(Sym.TOKENS)])


def _keeps_tokens(shape: tuple, inner: tuple) -> bool:
    """True if a reshape leaves the axes up to that of the tokens as they are, but for unit axes."""
    leads = [s[: s.index(Sym.TOKENS)] for s in (shape, inner) if Sym.TOKENS in s]
    return not leads or leads[0] == leads[-1] or {dim for lead in leads for dim in lead} <= {1}


def _shape(expr: relax.Expr) -> tuple:
    return tuple(Sym(d.name) if isinstance(d, tirx.Var) else int(d) for d in expr.ty.shape.values)


def _unsupported(expr: relax.Expr, what: str) -> UnsupportedError:
    return UnsupportedError(f"operator {what} ({expr.ty}) is left after all passes and has no kernel")


class _Group:
    """The expression of one root, down to values that are in memory."""

    def __init__(self, d: Definitions, roots: set[relax.Var]) -> None:
        self._d, self._roots = d, roots
        self._nodes: list[Node] = []
        self._number: dict[Any, int] = {}
        self._inputs: dict[str, relax.Expr] = {}

    def call(self, root: relax.Var) -> relax.Call:
        if not _is_token_major(root):
            raise _unsupported(root, self._d.value(root).op.name)
        self._compute(root)
        return ELEMENTWISE(self._inputs, expression=tuple(self._nodes))

    def _add(self, expr: relax.Expr, op: str, operands: tuple[int, ...] = (), parameters: tuple = ()) -> int:
        dtype = str(expr.ty.dtype)
        if dtype not in ("float32", "bfloat16"):
            raise _unsupported(expr, f"{op} of {dtype}")
        self._nodes.append(Node(op, operands, _shape(expr), dtype, parameters))
        return len(self._nodes) - 1

    def _node(self, expr: Any) -> int:
        """The number of the node that holds `expr`."""
        if isinstance(expr, relax.Var):
            if expr not in self._number:
                in_memory = expr in self._roots or not _is_plain(self._d, expr)
                self._number[expr] = self._input(expr) if in_memory else self._compute(expr)
            return self._number[expr]
        return self._compute(expr)

    def _input(self, expr: relax.Expr) -> int:
        name = f"x{len(self._inputs)}"
        self._inputs[name] = expr
        return self._add(expr, "input", parameters=(name,))

    def _compute(self, expr: relax.Expr) -> int:
        value = self._d.value(expr)
        if isinstance(value, GenericConst):
            if value.ty.shape.values:
                raise _unsupported(value, "constant")
            # Torch computes with a whole number as with a float32 one.
            dtype = "float32" if str(value.ty.dtype).startswith("int") else str(value.ty.dtype)
            self._nodes.append(Node("constant", (), (), dtype, (float(value.value.numpy()),)))
            return len(self._nodes) - 1
        if isinstance(value, relax.TupleGetItem):
            return self._part(expr, value)
        if not isinstance(value, relax.Call):
            raise _unsupported(expr, type(value).__name__)
        name = value.op.name.removeprefix("relax.").removeprefix("nn.")
        args = list(value.args)
        if name in UNARY | BINARY:
            return self._add(value, name, tuple(map(self._node, args)))
        if value.op.name in VIEWS:
            if not _keeps_tokens(_shape(value), _shape(args[0])):
                raise _unsupported(value, value.op.name)
            return self._add(value, "reshape", (self._node(args[0]),))
        match name:
            case "astype":
                return self._add(value, "cast", (self._node(args[0]),))
            case "power":
                exponent = self._d.constant(args[1])
                if exponent is not None and exponent >= 2 and exponent == int(exponent):
                    return self._add(value, "power", (self._node(args[0]),), (int(exponent),))
            case "permute_dims":
                return self._add(value, "permute", (self._node(args[0]),), tuple(map(int, value.attrs.axes)))
            case "concat" | "stack":
                return self._concat(value, stacked=name == "stack")
            case "strided_slice":
                return self._slice(value)
            case "broadcast_to":
                return self._broadcast(value)
        raise _unsupported(value, value.op.name)

    def _concat(self, call: relax.Call, stacked: bool) -> int:
        fields = list(self._d.value(call.args[0]).fields)
        axis, shape = int(call.attrs.axis) % len(_shape(call)), list(_shape(call))
        parts = [self._node(field) for field in fields]
        if stacked:
            shape[axis] = 1
            dtype = str(call.ty.dtype)
            for i, part in enumerate(parts):
                self._nodes.append(Node("reshape", (part,), tuple(shape), dtype))
                parts[i] = len(self._nodes) - 1
        return self._add(call, "concat", tuple(parts), (axis,))

    def _slice(self, call: relax.Call) -> int:
        axes, begins, _, steps = ([int(getattr(v, "value", v)) for v in arg] for arg in call.args[1:5])
        shape = _shape(call.args[0])
        where = [(0, 1)] * len(shape)
        for axis, begin, step in zip(axes, begins, steps, strict=True):
            if step < 1 or (shape[axis] == Sym.TOKENS and (begin, step) != (0, 1)):
                raise _unsupported(call, "relax.strided_slice")
            where[axis] = (begin if begin >= 0 else begin + shape[axis], step)
        return self._add(call, "slice", (self._node(call.args[0]),), tuple(where))

    def _broadcast(self, call: relax.Call) -> int:
        """An axis of size 1 that is repeated, as a slice that stays where it is."""
        inner, shape = _shape(call.args[0]), _shape(call)
        if len(inner) != len(shape):
            raise _unsupported(call, "relax.broadcast_to")
        where = tuple((0, int(dim == wanted)) for dim, wanted in zip(inner, shape, strict=True))
        return self._add(call, "slice", (self._node(call.args[0]),), where)

    def _part(self, expr: relax.Expr, item: relax.TupleGetItem) -> int:
        """A part of a split, as a slice."""
        split = self._d.call(item.tuple_value, "relax.split")
        if split is None:
            raise _unsupported(expr, getattr(self._d.value(item.tuple_value), "op", item).name)
        axis = int(split.attrs.axis) % len(_shape(split.args[0]))
        sizes = [_shape_of(field)[axis] for field in split.ty.fields]
        where = [(0, 1)] * len(_shape(split.args[0]))
        where[axis] = (sum(sizes[: int(item.index)]), 1)
        return self._add(expr, "slice", (self._node(split.args[0]),), tuple(where))


def _shape_of(type_: relax.TensorType) -> list[int]:
    return [0 if isinstance(d, tirx.Var) else int(d) for d in type_.shape.values]
