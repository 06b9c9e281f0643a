"""Eight numbers side by side: the SIMD values that the numba kernels of swap rewards are written in.

A recurrence along one list is a chain in which every step waits for the one before. Eight lists side by side are eight
chains, and each step is one instruction for all of them. numba has no type for that and leaves it to the optimiser to
find such loops, which it does not where the state of the recurrence lies in memory; so here is the type.

A ``Lanes`` value holds eight float32, float64 or booleans, one for each list. ``+ - * /``, the comparisons, ``min`` and
``max`` work lane by lane, between lanes or with a plain number. A *tile* is a C-contiguous array (rows, 8): lane i of
row k is entry k of list i. Indices are not checked, as everywhere in numba.

numba's cache of compiled functions does not notice a change in another file: who edits this one deletes the *.nbi files
of those that import it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 8


class Lanes(types.Type):
    """numba's name for eight values of one element type."""

    def __init__(self, element: types.Type):
        self.element = element
        super().__init__(name=f"Lanes({element})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes):
        element = {types.boolean: ir.IntType(1), types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
        super().__init__(manager, lanes, ir.VectorType(element[lanes.element], LANES))


FLOATS = Lanes(types.float64)
MASK = Lanes(types.boolean)
CONTRACT = ("contract",)  # a product and a sum may become one instruction that rounds once


def _spread(context: Any, builder: Any, value: Any, value_type: types.Type) -> Any:
    """The value as float64 lanes: unchanged if it is one, else the number in every lane."""
    if isinstance(value_type, Lanes):
        return value
    number = context.cast(builder, value, value_type, types.float64)
    one = builder.insert_element(
        ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined), number, ir.IntType(32)(0)
    )
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


# ---------------------------------------------------------------------------------------------- arithmetic, comparison


def _define_operator(function: Any, result: Lanes, build: Callable[[Any, Any, Any], Any]) -> None:
    @infer_global(function)
    class _Operator(AbstractTemplate):
        def generic(self, args: tuple, kws: dict) -> Any:
            if FLOATS in args and all(arg == FLOATS or isinstance(arg, types.Number) for arg in args):
                return signature(result, *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        a, b = (_spread(context, builder, value, kind) for value, kind in zip(args, sig.args, strict=True))
        return build(builder, a, b)

    for kinds in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(function, *kinds)(lower)


for _function in (operator.add, operator.iadd):
    _define_operator(_function, FLOATS, lambda builder, a, b: builder.fadd(a, b, flags=CONTRACT))
for _function in (operator.sub, operator.isub):
    _define_operator(_function, FLOATS, lambda builder, a, b: builder.fsub(a, b, flags=CONTRACT))
for _function in (operator.mul, operator.imul):
    _define_operator(_function, FLOATS, lambda builder, a, b: builder.fmul(a, b, flags=CONTRACT))
_define_operator(operator.truediv, FLOATS, lambda builder, a, b: builder.fdiv(a, b))
_define_operator(operator.lt, MASK, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
_define_operator(operator.le, MASK, lambda builder, a, b: builder.fcmp_ordered("<=", a, b))
_define_operator(operator.gt, MASK, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_define_operator(operator.ge, MASK, lambda builder, a, b: builder.fcmp_ordered(">=", a, b))
_define_operator(max, FLOATS, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
_define_operator(min, FLOATS, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
_define_operator(operator.ne, MASK, lambda builder, a, b: builder.fcmp_unordered("!=", a, b))
_define_operator(operator.eq, MASK, lambda builder, a, b: builder.fcmp_ordered("==", a, b))


@intrinsic
def spread(typingctx: Any, number: Any) -> Any:
    """The number in every lane, as float64."""
    return FLOATS(number), lambda context, builder, sig, args: _spread(context, builder, args[0], number)


@intrinsic
def where(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lane by lane: a where the mask is set, else b; float64 lanes or numbers. The mask may be one boolean for all."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        return builder.select(args[0], _spread(context, builder, args[1], a), _spread(context, builder, args[2], b))

    return FLOATS(mask, a, b), build


@intrinsic
def any_lane(typingctx: Any, mask: Any) -> Any:
    """Whether the mask is set in any lane."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, bits.type(0))

    return types.boolean(mask), build


def _call_llvm(builder: Any, name: str, *args: Any) -> Any:
    kind = args[0].type
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(args)), name)
    return builder.call(function, args)


@intrinsic
def nearest_integer(typingctx: Any, x: Any) -> Any:
    """Lane by lane, float64: x rounded to an integer, halves to even."""
    return FLOATS(x), lambda context, builder, sig, args: _call_llvm(builder, f"llvm.rint.v{LANES}f64", args[0])


@intrinsic
def power_of_two(typingctx: Any, exponent: Any) -> Any:
    """Lane by lane, float64: 2^exponent for integers in [-1022, 1023]."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        # The last bits of exponent + 1023 + 2^52 are the biased exponent; they move to where a float64 keeps it.
        kind, integers = args[0].type, ir.VectorType(ir.IntType(64), LANES)
        biased = builder.fadd(args[0], ir.Constant(kind, [2.0**52 + 1023.0] * LANES))
        bits = builder.shl(builder.bitcast(biased, integers), ir.Constant(integers, [52] * LANES))
        return builder.bitcast(bits, kind)

    return FLOATS(exponent), build


@intrinsic
def larger_and_smaller(typingctx: Any, a: Any, b: Any) -> Any:
    """Lane by lane, of numbers >= 0 of any float type: the larger, the smaller. Such numbers compare like their bits,
    and for float32 an integer maximum is one instruction that more units can execute."""
    result = types.UniTuple(a, 2)

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        if a.element == types.float32:
            integers = ir.VectorType(ir.IntType(32), LANES)
            x, y = (builder.bitcast(value, integers) for value in args)
            both = [_call_llvm(builder, f"llvm.{name}.v{LANES}i32", x, y) for name in ("smax", "smin")]
            both = [builder.bitcast(value, args[0].type) for value in both]
        else:
            x, y = args
            both = [builder.select(builder.fcmp_ordered(sign, x, y), x, y) for sign in (">", "<")]
        return context.make_tuple(builder, result, both)

    return result(a, b), build


# ------------------------------------------------------------------------------------------------------------- memory


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_value_type(array_type.dtype)
    return builder.bitcast(builder.gep(data, [offset]), ir.VectorType(element, LANES).as_pointer())


def _tile_pointer(context: Any, builder: Any, tile_type: Any, tile: Any, row: Any) -> Any:
    return _pointer(context, builder, tile_type, tile, builder.mul(row, row.type(LANES)))


@intrinsic
def load(typingctx: Any, tile: Any, row: Any) -> Any:
    """Row of a tile, in the tile's dtype."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        return builder.load(_tile_pointer(context, builder, tile, *args), align=tile.dtype.bitwidth // 8)

    return Lanes(tile.dtype)(tile, types.intp), build


@intrinsic
def store(typingctx: Any, tile: Any, row: Any, lanes: Any) -> Any:
    """Write a row of a tile, rounded to the tile's dtype."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        pointer = _tile_pointer(context, builder, tile, *args[:2])
        value = args[2] if lanes.element == tile.dtype else builder.fptrunc(args[2], pointer.type.pointee)
        builder.store(value, pointer, align=tile.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(tile, types.intp, lanes), build


@intrinsic
def widen(typingctx: Any, lanes: Any) -> Any:
    """The same numbers as float64 lanes."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        is_wide = lanes.element == types.float64
        return args[0] if is_wide else builder.fpext(args[0], ir.VectorType(ir.DoubleType(), LANES))

    return FLOATS(lanes), build


def _transposed(builder: Any, rows: list) -> list:
    """An 8 x 8 block transposed: off-diagonal halves exchanged, then quarters, then single entries."""
    for half in (4, 2, 1):
        upper = [i + LANES - half if i & half else i for i in range(LANES)]  # i >= LANES: from the second row
        lower = [i + LANES if i & half else i + half for i in range(LANES)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), picks) for picks in (upper, lower)]
        mixed = list(rows)
        for i in range(LANES):
            if not i & half:
                pair = rows[i], rows[i + half]
                mixed[i], mixed[i + half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        rows = mixed
    return rows


def _list_pointers(context: Any, builder: Any, array_type: Any, array: Any, first: Any, column: Any) -> list:
    """Of ``column`` in the eight rows from ``first`` on, the array's last row standing in for those that it lacks."""
    shape = context.make_array(array_type)(context, builder, array).shape
    rows, size = cgutils.unpack_tuple(builder, shape)
    last = builder.sub(rows, rows.type(1))
    offsets = []
    for lane in range(LANES):
        row = builder.add(first, first.type(lane))
        row = builder.select(builder.icmp_signed("<", row, last), row, last)
        offsets.append(builder.add(builder.mul(row, size), column))
    return [_pointer(context, builder, array_type, array, offset) for offset in offsets]


@intrinsic
def gather_columns(typingctx: Any, lists: Any, first: Any, column: Any, tile: Any) -> Any:
    """Rows column .. column + 7 of the tile from the lists (N, K) first .. first + 7, repeating the last list."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        align = tile.dtype.bitwidth // 8
        pointers = _list_pointers(context, builder, lists, *args[:3])
        columns = _transposed(builder, [builder.load(pointer, align=align) for pointer in pointers])
        for i, value in enumerate(columns):
            row = builder.add(args[2], args[2].type(i))
            builder.store(value, _tile_pointer(context, builder, tile, args[3], row), align=align)
        return context.get_dummy_value()

    return types.void(lists, types.intp, types.intp, tile), build


@intrinsic
def scatter_columns(typingctx: Any, lists: Any, first: Any, column: Any, tile: Any) -> Any:
    """The way back: the lists (N, K) from the rows of the tile. Lanes beyond the last list must hold what it gets."""

    def build(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        align = tile.dtype.bitwidth // 8
        tile_rows = [builder.add(args[2], args[2].type(i)) for i in range(LANES)]
        pointers = [_tile_pointer(context, builder, tile, args[3], row) for row in tile_rows]
        rows = _transposed(builder, [builder.load(pointer, align=align) for pointer in pointers])
        for value, pointer in zip(rows, _list_pointers(context, builder, lists, *args[:3]), strict=True):
            builder.store(value, pointer, align=align)
        return context.get_dummy_value()

    return types.void(lists, types.intp, types.intp, tile), build
