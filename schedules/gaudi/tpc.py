"""TPC-C of a fused expression: a kernel for Gaudi's vector cores, and what each piece of its work touches.

A tensor's last axis is TPC dimension 0, which lies on the lanes of a vector: 64 of float32; bf16 values are loaded 128
at a time and computed as two float32 vectors, rounded where the expression rounds.  (Which lane of which vector holds
an element is the hardware's choice, and nothing here depends on it: the conversion back undoes it.)

The index space has a dimension for each of a result's, so that rows are spread over the TPCs; a row with a mean is one
piece, its columns a loop, once for the mean and once more for what uses it.  Loads beyond a tensor's end give zeros and
stores there are dropped, so that every size will do.

Source: Intel Gaudi's documentation, "TPC User Guide" and "TPC-C Language Specification" (tensors, index space,
intrinsics, special functions).  Where it leaves open which lanes hold a reduction's sum, lane 0 of each group is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_compile.expression import Node
from vllm_compile.spec import Dim, Sym

from .expressions import Fused
from .kernel import Access, At, Kernel
from .templates import BINARY, UNARY

LANES = {"float32": 64, "bfloat16": 128}
MOST_DIMENSIONS = 5  # of a tensor
MOST_TENSORS = 16  # of a kernel
MOST_UNROLLED = 8  # places on an axis that is written out
# Results of operators on bf16 values that are such values themselves.
EXACT = frozenset({"input", "constant", "slice", "concat", "permute", "negative", "abs", "relu", "maximum", "minimum"})
KEEPS_ZERO = frozenset(
    {"slice", "concat", "permute", "cast", "negative", "abs", "relu", "square", "sqrt", "tanh", "silu"}
)


class NoKernelError(Exception):
    """An expression that no kernel is generated for."""


def generate(fused: Fused) -> Kernel | None:
    """The kernel of an expression, None where this generator has none.

    That is: tensors of several dtypes, columns that are cut or moved, the error function, more than five dimensions.
    """
    try:
        return _Generator(fused).kernel()
    except NoKernelError:
        return None


@dataclass
class _Block:
    """Statements that are run in order, and the values they have computed."""

    lines: list[str] = field(default_factory=list)
    values: dict[tuple[int, tuple[At, ...]], list[str]] = field(default_factory=dict)


class _Generator:
    def __init__(self, fused: Fused) -> None:
        self._nodes, self._results = fused
        dtypes = {n.dtype for i, n in enumerate(self._nodes) if n.op == "input" or i in self._results}
        shapes = {self._nodes[i].shape for i in self._results}
        if len(dtypes) != 1 or len(shapes) != 1:
            raise NoKernelError("tensors of several dtypes, or results of several shapes")
        (self._dtype,), (self._shape,) = dtypes, shapes
        ranks = [len(n.shape) for n in self._nodes if n.op == "input"]
        if max(ranks) > MOST_DIMENSIONS or len(self._shape) > MOST_DIMENSIONS or self._shape[0] != Sym.TOKENS:
            raise NoKernelError("dimensions")
        if len(ranks) + len(self._results) > MOST_TENSORS:
            raise NoKernelError("too many tensors")
        if self._dtype == "float32" and any(n.dtype != "float32" for n in self._nodes):
            raise NoKernelError("roundings to bf16 in a float32 kernel")
        self._lanes, self._halves = LANES[self._dtype], LANES[self._dtype] // 64
        self._width = int(self._shape[-1])
        self._loops = any(n.op == "mean" for n in self._nodes)
        self._names = 0
        self._loaded: dict[str, list[tuple[At, ...]]] = {}
        self._row = _Block()

    def kernel(self) -> Kernel:
        rank = len(self._shape)
        written_out = {int(n.parameters[0]) for n in self._nodes if n.op == "concat"}
        if any(axis == rank - 1 or _size(self._shape[axis]) > MOST_UNROLLED for axis in written_out):
            raise NoKernelError("a concatenation of columns, or along a long axis")
        # TPC dimension d is axis rank - 1 - d.
        place = [At(rank - 1 - axis, 1, 0) for axis in range(rank)]
        place[-1] = At(0, 1, 0)  # a column: the first lane's
        places = [place]
        for axis in sorted(written_out):
            size = _size(self._shape[axis])
            places = [[*p[:axis], At(None, 0, i), *p[axis + 1 :]] for p in places for i in range(size)]
        columns = _Block()
        stores: list[str] = []
        for where in map(tuple, places):
            for number, result in enumerate(self._results):
                value = self._value(result, where, columns)
                stores += self._store(f"out{number}", where, value)
        inputs = [n for n in self._nodes if n.op == "input"]
        names = [str(n.parameters[0]) for n in inputs]
        if len(set(names)) < len(names):
            raise NoKernelError("an input is read under two shapes")
        reads = tuple(self._access(str(n.parameters[0]), n.shape, self._loaded[str(n.parameters[0])]) for n in inputs)
        where_written = [tuple(p) for p in places]
        writes = tuple(self._access(f"out{i}", self._shape, where_written) for i in range(len(self._results)))
        geometry: list[Dim] = [1 if self._loops else -(-self._width // self._lanes)]
        for dim in range(1, rank):
            axis = rank - 1 - dim
            geometry.append(1 if axis in written_out else self._shape[axis])
        parameters = ", ".join(f"tensor {a.name}" for a in (*reads, *writes))
        body = self._main(parameters, rank, [*columns.lines, *stores])
        return Kernel(self._dtype, body, reads, writes, tuple(geometry))

    def _main(self, parameters: str, rank: int, column_lines: list[str]) -> str:
        lines = [f"void main({parameters}) {{", "    const int5 begin = get_index_space_offset();"]
        lines.append("    const int5 end = begin + get_index_space_size();")
        depth = 1
        for dim in range(rank - 1, 0, -1):
            lines.append("    " * depth + f"for (int i{dim} = begin[{dim}]; i{dim} < end[{dim}]; i{dim} += 1) {{")
            depth += 1
        lines += ["    " * depth + line for line in self._row.lines]
        if self._loops:
            lines.append("    " * depth + self._loop_head())
        else:
            first, last = f"begin[0] * {self._lanes}", f"end[0] * {self._lanes}"
            lines.append("    " * depth + f"for (int i0 = {first}; i0 < {last}; i0 += {self._lanes}) {{")
        lines += ["    " * (depth + 1) + line for line in column_lines]
        lines += ["    " * d + "}" for d in range(depth, -1, -1)]
        return "\n".join(lines) + "\n"

    def _loop_head(self) -> str:
        return f"for (int i0 = 0; i0 < {self._width}; i0 += {self._lanes}) {{"

    def _value(self, number: int, where: tuple[At, ...], block: _Block) -> list[str]:
        """The float32 vectors that hold a node's values from `where` on along the columns."""
        key = number, where
        if key not in block.values:
            node = self._nodes[number]
            if node.op == "mean":
                block.values[key] = self._mean(number, where)
            else:
                block.values[key] = self._compute(node, where, block)
        return block.values[key]

    def _compute(self, node: Node, where: tuple[At, ...], block: _Block) -> list[str]:
        if node.op == "input":
            return self._load(node, where, block)
        if node.op == "constant":
            value = torch.tensor(float(node.parameters[0])).to(getattr(torch, node.dtype)).item()
            return [f"(float64){value!r}f"] * self._halves
        if node.op == "concat":
            return self._part(node, where, block)
        if node.op in ("slice", "permute", "reshape"):
            (a,) = node.operands
            return self._value(a, self._moved(node, self._nodes[a], where), block)
        operands = [self._value(i, _broadcast(node, self._nodes[i], where), block) for i in node.operands]
        if node.op == "cast":
            made = operands[0]
        else:
            template = self._template(node)
            made = [self._name(template.format(*(o[half] for o in operands)), block) for half in range(self._halves)]
        if node.dtype == "bfloat16" and node.op not in EXACT and not self._is_bf16(node):
            return self._rounded(made, block)
        return made

    def _is_bf16(self, node: Node) -> bool:
        return node.op == "cast" and self._nodes[node.operands[0]].dtype == "bfloat16"

    def _template(self, node: Node) -> str:
        if node.op in UNARY:
            return UNARY[node.op]
        if node.op in BINARY:
            return BINARY[node.op]
        if node.op == "power":
            return " * ".join(["{0}"] * int(node.parameters[0]))
        raise NoKernelError(node.op)

    def _moved(self, node: Node, operand: Node, where: tuple[At, ...]) -> tuple[At, ...]:
        """Where in the operand a slice, a permutation or a reshape finds what is `where` in it."""
        last = len(node.shape) - 1
        if node.op == "reshape":
            if node.shape != operand.shape:
                raise NoKernelError("a reshape")
            return where
        if node.op == "permute":
            axes = [int(axis) for axis in node.parameters]
            if axes[-1] != last:
                raise NoKernelError("a permutation of columns")
            return tuple(where[axes.index(axis)] for axis in range(len(axes)))
        starts = [(int(begin), int(step)) for begin, step in node.parameters]
        if starts[last] != (0, 1) or node.shape[last] != operand.shape[last]:
            raise NoKernelError("a slice of columns")
        pairs = zip(where, starts, strict=True)
        return tuple(At(at.dim, at.scale * step, begin + step * at.offset) for at, (begin, step) in pairs)

    def _part(self, node: Node, where: tuple[At, ...], block: _Block) -> list[str]:
        axis = int(node.parameters[0])
        offset = where[axis].offset
        if where[axis].dim is not None:
            raise NoKernelError("a concatenation behind another change of its axis")
        for i in node.operands:
            size = _size(self._nodes[i].shape[axis])
            if offset < size:
                return self._value(i, (*where[:axis], At(None, 0, offset), *where[axis + 1 :]), block)
            offset -= size
        raise AssertionError("a place beyond a concatenation")

    def _load(self, node: Node, where: tuple[At, ...], block: _Block) -> list[str]:
        if node.shape[-1] != self._width:
            raise NoKernelError("an input with another number of columns")
        name = str(node.parameters[0])
        self._loaded.setdefault(name, []).append(where)
        if self._dtype == "float32":
            return [self._name(f"v_f32_ld_tnsr_b({_coordinates(where)}, {name})", block)]
        loaded = f"v_bf16_ld_tnsr_b({_coordinates(where)}, {name})"
        return self._pair(f"v_convert_bf16_to_f32_all_b({loaded}, 0)", block)

    def _rounded(self, halves: list[str], block: _Block) -> list[str]:
        wide = "(float128){" + ", ".join(halves) + "}"
        return self._pair(f"v_convert_bf16_to_f32_all_b(v_convert_f32_to_bf16_all_b({wide}, SW_RHNE), 0)", block)

    def _store(self, name: str, where: tuple[At, ...], halves: list[str]) -> list[str]:
        if self._dtype == "float32":
            return [f"v_f32_st_tnsr({_coordinates(where)}, {name}, {halves[0]});"]
        wide = "(float128){" + ", ".join(halves) + "}"
        return [f"v_bf16_st_tnsr({_coordinates(where)}, {name}, v_convert_f32_to_bf16_all_b({wide}, SW_RHNE));"]

    def _mean(self, number: int, where: tuple[At, ...]) -> list[str]:
        """A mean over a row's columns, once a row, before the loop that uses it."""
        node = self._nodes[number]
        (operand,) = node.operands
        inside = (*where[:-1], At(0, 1, 0))
        key = number, inside
        if key not in self._row.values:
            if self._nodes[operand].shape[-1] != self._width:
                raise NoKernelError("a mean of another number of columns")
            if self._width % self._lanes and not self._is_zero_beyond(operand):
                raise NoKernelError("a mean of what is not zero beyond the last column")
            loop = _Block()
            value = self._value(operand, inside, loop)
            self._names += 1
            total, mean = f"sum{self._names}", f"mean{self._names}"
            added = " + ".join(value)
            self._row.lines += [f"float64 {total} = 0.0f;", self._loop_head(), *(f"    {line}" for line in loop.lines)]
            self._row.lines += [f"    {total} = {total} + ({added});", "}", f"{total} = v_f32_reduce_add({total});"]
            broadcast = f"v_f32_shuffle_b({total}, (uchar256)0x80, 0, {total})"
            self._row.lines.append(f"const float64 {mean} = {broadcast} * (float64){1 / self._width!r}f;")
            halves = [mean] * self._halves
            self._row.values[key] = self._rounded(halves, self._row) if node.dtype == "bfloat16" else halves
        return self._row.values[key]

    def _is_zero_beyond(self, number: int) -> bool:
        """True if the value is zero where all inputs are, as they are beyond the last column."""
        node = self._nodes[number]
        operands = [self._is_zero_beyond(i) for i in node.operands]
        if node.op == "input":
            return node.shape[-1] == self._width
        if node.op in KEEPS_ZERO or node.op in ("add", "subtract", "maximum", "minimum", "power"):
            return all(operands)
        return node.op == "multiply" and any(operands)

    def _name(self, value: str, block: _Block) -> str:
        self._names += 1
        block.lines.append(f"const float64 v{self._names} = {value};")
        return f"v{self._names}"

    def _pair(self, value: str, block: _Block) -> list[str]:
        self._names += 1
        block.lines.append(f"const float128 p{self._names} = {value};")
        return [f"p{self._names}.v1", f"p{self._names}.v2"]

    def _access(self, name: str, shape: tuple[Dim, ...], places: list[tuple[At, ...]]) -> Access:
        """The spans of all places on each TPC dimension; along columns they are whole vectors, or the whole row."""
        spans = [(0, 0, 0, self._width - 1) if self._loops else (0, self._lanes, 0, self._lanes - 1)]
        for axis in range(len(shape) - 2, -1, -1):
            ats = [place[axis] for place in places]
            moving = {(at.dim, at.scale) for at in ats if at.dim is not None}
            if len(moving) > 1 or (moving and any(at.dim is None for at in ats)):
                raise NoKernelError("an input that is read in two directions")
            dim, scale = next(iter(moving), (0, 0))
            spans.append((dim or 0, scale, min(at.offset for at in ats), max(at.offset for at in ats)))
        return Access(name, shape, tuple(spans))


def _broadcast(node: Node, operand: Node, where: tuple[At, ...]) -> tuple[At, ...]:
    """Where a broadcast operand has what the node needs at `where`; axes of size 1 have one place."""
    aligned = where[len(where) - len(operand.shape) :]
    sizes = node.shape[len(where) - len(operand.shape) :]
    return tuple(
        At(None, 0, 0) if size == 1 and whole != 1 else at
        for at, size, whole in zip(aligned, operand.shape, sizes, strict=True)
    )


def _coordinates(where: tuple[At, ...]) -> str:
    places = [at.text() for at in reversed(where)]
    return "(int5){" + ", ".join(places + ["0"] * (MOST_DIMENSIONS - len(places))) + "}"


def _size(dim: Dim) -> int:
    if isinstance(dim, Sym):
        raise NoKernelError("the tokens' axis is cut")
    return int(dim)
