"""What the instructions of PTX do to a machine (``ptx_machine.py``), for all of its threads at once.

As NVIDIA's manual of PTX has them, but that ex2.approx, div.full and their like are good to the last place, and that
products of a tensor core are summed in float64. What is not emulated is not in ``ACTIONS``, and the machine says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

END = 2**62
KINDS: dict[str, Any] = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "pred": np.bool_}
KINDS |= {f"{k}{8 * n}": np.dtype(f"{'i' if k == 's' else 'u'}{n}").type for k in "bsu" for n in (1, 2, 4, 8)}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Array = np.ndarray


class EmulationError(Exception):
    """What a GPU would not do, or not surely, or what is not emulated; with the instruction."""


def _flushed(x: Array) -> Array:
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), x).astype(x.dtype), x)


def _from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _numbers(m: Any, names: list[str], word: str, half: int = 0) -> list[Array]:
    """Operands of the kind that an instruction says, bf16 as float32; of two in a register the lower or the upper."""
    if word in ("bf16x2", "f16x2"):
        bits = [(m.get(name, np.uint32) >> np.uint32(16 * half)).astype(np.uint16) for name in names]
    elif word == "bf16":
        bits = [m.get(name, np.uint16) for name in names]
    else:
        return [m.get(name, KINDS[word]) for name in names]
    return [x.view(np.float16) if word == "f16x2" else _from_bf16(x) for x in bits]


def _pair(low: Array, high: Array, kind: str) -> Array:
    """Two numbers of 16 bits in one register."""
    low, high = (_converted(x, kind, []).view(np.uint16).astype(np.uint32) for x in (low, high))
    return high << np.uint32(16) | low


def _converted(x: Array, into: str, words: list[str]) -> Array:
    for word, rounded in (("rmi", np.floor), ("rpi", np.ceil), ("rni", np.rint), ("rzi", np.trunc)):
        x = rounded(x) if word in words else x
    if into == "bf16":
        bits = x.astype(np.float32).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint32(0x7FFF), nearest).astype(np.uint16)
    if into == "tf32":  # to the nearest, ties away from 0
        return x.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000)
    kind = KINDS[into]
    if x.dtype.kind == "f" and np.dtype(kind).kind != "f":  # what is too large becomes the largest
        limits = np.iinfo(kind)
        return np.clip(np.nan_to_num(x.astype(np.longdouble)), limits.min, limits.max).astype(kind)
    return x.astype(kind, copy=False)


def _fma(x: Array, y: Array, z: Array) -> Array:
    if x.dtype.kind != "f":
        return x * y + z
    wider = np.float64 if x.itemsize < 8 else np.longdouble
    return (x.astype(wider) * y + z).astype(x.dtype)


def _divide(x: Array, y: Array) -> Array:
    if x.dtype.kind == "f":
        return x / y
    y = np.where(y == 0, np.ones(1, y.dtype), y)  # by 0 it is anything; quotients are cut off towards 0
    quotient = x // y
    return quotient + ((x < 0) != (y < 0)) * (quotient * y != x).astype(x.dtype)


PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fma,
    "div": _divide,
    "rem": lambda x, y: x - _divide(x, y) * y,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "ex2": lambda x: np.exp2(x.astype(np.float64)),
    "lg2": lambda x: np.log2(x.astype(np.float64)),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


def _plain(m: Any, step: Any, mask: Array | None) -> None:
    """A function of each thread's own numbers, all of one kind."""
    function = PLAIN[step.name]
    if "NaN" in step.words:
        function = {"min": np.minimum, "max": np.maximum}[step.name]
    target, *names = step.operands
    flush = _flushed if "ftz" in step.words else lambda x: x
    word = step.words[-1]
    results = [flush(function(*map(flush, _numbers(m, names, word, half)))) for half in range(1 + word.endswith("x2"))]
    m.put(target, _converted(results[0], word, []) if len(results) == 1 else _pair(*results, word[:-2]), mask)


def _multiply(m: Any, step: Any, mask: Array | None) -> None:
    """mul and mad of integers; .wide and .hi have a product of twice the bits."""
    kind = wider = KINDS.get(step.words[-1])
    if kind is None or np.dtype(kind).kind == "f":
        _plain(m, step, mask)
        return
    size = np.dtype(kind).itemsize
    if {"wide", "hi"} & set(step.words):
        wider = np.dtype(f"{np.dtype(kind).kind}{2 * size}").type
    target, *names = step.operands
    result = m.get(names[0], kind).astype(wider) * m.get(names[1], kind).astype(wider)
    if "hi" in step.words:
        result = (result >> wider(8 * size)).astype(kind)
    if step.name == "mad":
        result = result + m.get(names[2], result.dtype.type)
    m.put(target, result, mask)


def _shift(m: Any, step: Any, mask: Array | None) -> None:
    kind = KINDS[step.words[-1]]
    x, by = m.get(step.operands[1], kind), m.get(step.operands[2], np.uint32)
    bits = 8 * x.itemsize
    moved = np.minimum(by, bits - 1).astype(kind)
    result = x << moved if step.name == "shl" else x >> moved
    if step.name == "shl" or x.dtype.kind == "u":  # else the sign is what is left
        result = np.where(by >= bits, np.zeros(1, kind), result)
    m.put(step.operands[0], result, mask)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}


def _setp(m: Any, step: Any, mask: Array | None) -> None:
    target, *names = step.operands
    how, word = step.words[0], step.words[-1]
    for half, predicate in enumerate(target.split("|")):  # the second is that of the upper half
        if half and not word.endswith("x2"):
            raise EmulationError("this form of it is not emulated")
        x, y = _numbers(m, names, word, half)
        unordered = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(1, np.bool_)
        if how in ("nan", "num"):
            result = unordered == (how == "nan")
        elif how in COMPARISONS:
            result = COMPARISONS[how](x, y) & ~unordered
        else:  # "ltu": or one is no number
            result = COMPARISONS[how[:-1]](x, y) | unordered
        m.put(predicate, result, mask)


def _selp(m: Any, step: Any, mask: Array | None) -> None:
    target, x, y, which = step.operands
    kind = KINDS[step.words[-1]]
    m.put(target, np.where(m.get(which, np.bool_), m.get(x, kind), m.get(y, kind)), mask)


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _mov(m: Any, step: Any, mask: Array | None) -> None:
    """Also taking a register apart, and putting some together, the lowest bits first."""
    target, source = step.operands
    kind = KINDS[step.words[-1]]
    parts = _parts(target if target[0] == "{" else source)
    if len(parts) == 1:
        m.put(target, m.get(source, kind), mask)
        return
    size = np.dtype(kind).itemsize // len(parts)
    piece, shifts = UNSIGNED[size], [kind(8 * size * i) for i in range(len(parts))]
    if target[0] == "{":
        for part, shift in zip(parts, shifts, strict=True):
            m.put(part, (m.get(source, kind) >> shift).astype(piece), mask)
    else:
        pieces = [m.get(part, piece).astype(kind) << shift for part, shift in zip(parts, shifts, strict=True)]
        m.put(target, functools.reduce(np.bitwise_or, pieces), mask)


def _cvt(m: Any, step: Any, mask: Array | None) -> None:
    target, *names = step.operands
    into, out_of = step.words[-2:]
    values = _numbers(m, names, out_of)
    if "ftz" in step.words:
        values = [_flushed(x) for x in values]
    if into in ("bf16x2", "f16x2"):  # the first is the upper half
        m.put(target, _pair(values[1], values[0], into[:-2]), mask)
    else:
        m.put(target, _converted(values[0], into, step.words), mask)


def _bfe(m: Any, step: Any, mask: Array | None) -> None:
    """Some bits of a number, those of a signed one with their sign."""
    kind = KINDS[step.words[-1]]
    x = m.get(step.operands[1], kind).astype(np.int64)
    first, count = (m.get(name, np.uint32).astype(np.int64) & 255 for name in step.operands[2:])
    found = (x >> np.minimum(first, 63)) & ((np.int64(1) << np.minimum(count, 62)) - 1)
    if np.dtype(kind).kind == "i":
        last = (np.int64(1) << np.clip(count - 1, 0, 62)) * (count > 0)
        found = (found ^ last) - last
    m.put(step.operands[0], found.astype(kind), mask)


def _prmt(m: Any, step: Any, mask: Array | None) -> None:
    """Four bytes of eight, or copies of their signs."""
    if step.words != ["b32"]:
        raise EmulationError("this form of it is not emulated")
    low, high, which = (m.get(name, np.uint32).astype(np.uint64) for name in step.operands[1:])
    both, result = low | high << np.uint64(32), np.zeros(1, np.uint64)
    for i in range(4):
        chosen = which >> np.uint64(4 * i)
        byte = both >> ((chosen & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        byte = np.where(chosen & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        result = result | byte << np.uint64(8 * i)
    m.put(step.operands[0], result.astype(np.uint32), mask)


def _shfl(m: Any, step: Any, mask: Array | None) -> None:
    """A register of another lane of the warp; of the own one where there is no such lane."""
    m.whole(32)
    target, source, by, limits, _ = step.operands
    value, by = m.get(source, np.uint32), m.get(by, np.uint32).astype(np.int64) & 31
    if m.get(limits, np.uint32)[0] != (0 if "up" in step.words else 31) or "|" in target:
        raise EmulationError("this form of it is not emulated")
    if len(value) > 1:
        lane = {"bfly": m.lane ^ by, "up": m.lane - by, "down": m.lane + by, "idx": by}[step.words[1]]
        value = value[m.warp + np.where((lane < 0) | (lane > 31), m.lane, lane)]
    m.put(target, value, mask)


def _redux(m: Any, step: Any, mask: Array | None) -> None:
    m.whole(32)
    value = np.broadcast_to(m.get(step.operands[1], KINDS[step.words[-1]]), m.lane.shape).reshape(-1, 32)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[step.words[1]]
    function = {"and": np.bitwise_and, "or": np.bitwise_or}.get(step.words[1], function)
    m.put(step.operands[0], np.repeat(function.reduce(value, axis=1, dtype=value.dtype), 32), mask)


def _ld(m: Any, step: Any, mask: Array | None) -> None:
    kind, targets = KINDS[step.words[-1]], _parts(step.operands[0])
    if step.words[0] == "param":
        value = np.array([m.values[step.operands[1].strip("[]")] % 2**64], np.uint64).astype(
            UNSIGNED[np.dtype(kind).itemsize]
        )
        m.put(targets[0], _extended(value.view(kind)), mask)
        return
    width, count = np.dtype(kind).itemsize, len(targets)
    memory, places, readers = m.touched(step.operands[1], _is_shared(step.words), width * count, mask)
    for i, target in enumerate(targets):
        value = np.zeros(readers.shape, kind)
        value[readers] = memory.numbers(width)[places * count + i].view(kind)
        m.put(target, _extended(value), mask)


def _extended(value: Array) -> Array:
    return value.astype(np.int64) if value.dtype.kind == "i" else value


def _is_shared(words: list[str]) -> bool:
    return any(word.startswith("shared") for word in words)


def _st(m: Any, step: Any, mask: Array | None) -> None:
    kind, sources = KINDS[step.words[-1]], _parts(step.operands[1])
    width, count = np.dtype(kind).itemsize, len(sources)
    everybody = np.broadcast_to(np.ones(1, np.bool_) if mask is None else mask, m.lane.shape)
    memory, places, writers = m.touched(step.operands[0], _is_shared(step.words), width * count, everybody)
    for i, source in enumerate(sources):
        values = np.broadcast_to(m.get(source, UNSIGNED[width]), writers.shape)
        memory.numbers(width)[places * count + i] = values[writers]


ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def _atomic(m: Any, step: Any, mask: Array | None) -> None:
    """red and atom, in the order of threads. (atom also gives what was there before.)"""
    how = next((word for word in step.words if word in ATOMIC), None)
    if how is None or step.words[-1] not in KINDS:
        raise EmulationError("this form of it is not emulated")
    kind, targets, operands = KINDS[step.words[-1]], [], list(step.operands)
    if step.name == "atom":
        targets = _parts(operands.pop(0))
    sources = _parts(operands[1])
    width, count = np.dtype(kind).itemsize, len(sources)
    everybody = np.broadcast_to(np.ones(1, np.bool_) if mask is None else mask, m.lane.shape)
    memory, places, writers = m.touched(operands[0], _is_shared(step.words), width * count, everybody)
    numbers = memory.numbers(width).view(kind)
    for i, source in enumerate(sources):
        values, at = np.broadcast_to(m.get(source, kind), writers.shape)[writers], places * count + i
        before = np.zeros(writers.shape, kind)
        if targets and targets[i] != "_":
            found = np.zeros(len(at), kind)
            for thread, place in enumerate(at):
                found[thread] = numbers[place]
                numbers[place] = ATOMIC[how](numbers[place], values[thread])
            before[writers] = found
            m.put(targets[i], before, mask)
        else:
            ATOMIC[how].at(numbers, at, values)


def _matrix(m: Any, step: Any, mask: Array | None) -> None:
    """ldmatrix and stmatrix: matrices of 8 x 8 numbers of 16 bits, whose rows are where 8 lanes each say."""
    m.whole(32)
    if mask is not None and mask is not m.active:
        raise EmulationError("this form of it is not emulated")
    store = step.name == "stmatrix"
    registers = _parts(step.operands[1] if store else step.operands[0])
    givers = np.broadcast_to(m.lane < 8 * len(registers), m.lane.shape) & m.present
    memory, places, _ = m.touched(step.operands[0] if store else step.operands[1], True, 16, givers)
    rows = np.zeros(m.lane.shape, np.int64)
    rows[givers] = 8 * places
    numbers, row, column = memory.numbers(2), m.lane // 4, 2 * (m.lane % 4)
    for i, register in enumerate(registers):
        halves = []
        for half in (0, 1):
            if "trans" in step.words:
                at = rows[m.warp + 8 * i + column + half] + row
            else:
                at = rows[m.warp + 8 * i + row] + column + half
            halves.append(at)
        if store:
            value = np.broadcast_to(m.get(register, np.uint32), m.lane.shape)
            for half, at in enumerate(halves):
                numbers[at[m.present]] = (value >> np.uint32(16 * half)).astype(np.uint16)[m.present]
        else:
            low, high = (numbers[at].astype(np.uint32) for at in halves)
            m.put(register, low | high << np.uint32(16), mask)


def _cp(m: Any, step: Any, mask: Array | None) -> None:
    """Asynchronous copies to shared memory, zeros behind the bytes that a thread asks for."""
    if step.words[1] == "commit_group":
        m.copies.append([])
    elif step.words[1] in ("wait_group", "wait_all"):
        if step.words[1] == "wait_all":
            m.copies.append([])
        m.arrive(int(step.operands[0], 0) if step.operands else 0)
    elif step.words[:1] == ["async"] and step.words[1] in ("ca", "cg"):
        into, out_of, size, *asked = step.operands
        width = int(size, 0)
        everybody = np.broadcast_to(np.ones(1, np.bool_) if mask is None else mask, m.lane.shape)
        wanted = np.broadcast_to(m.get(asked[0] if asked else size, np.uint32), m.lane.shape)
        _, to, writers = m.touched(into, True, width, everybody)
        memory, source, readers = m.touched(out_of, False, width, everybody & (wanted > 0))
        for i in range(width // 4):
            value = np.zeros(m.lane.shape, np.uint32)
            value[readers] = memory.numbers(4)[source * (width // 4) + i]
            m.copies[-1].append((to * (width // 4) + i, np.where(wanted > 4 * i, value, np.uint32(0))[writers]))
    else:
        raise EmulationError("this form of it is not emulated")


def _mma(m: Any, step: Any, mask: Array | None) -> None:
    """D = A B + C of a warp; C and D are 16 x 8 float32, A has 16 rows of as many numbers as the columns of B."""
    m.whole(32)
    form, kind = ".".join((step.words[2], *step.words[5:])), step.words[-2]
    if form not in MMA or mask is not m.active:
        raise EmulationError("this form of it is not emulated")
    d, a, b, c = (_parts(operand) for operand in step.operands)
    per_register = MMA[form]  # numbers of A and B in one
    warps, row, column = len(m.lane) // 32, m.lane[:32] // 4, m.lane[:32] % 4
    left, right = np.zeros((warps, 16, 8 * per_register)), np.zeros((warps, 8 * per_register, 8))
    for i in range(per_register):
        at = per_register * column + i
        for number, register in enumerate(a):
            value = _product_operand(m, register, kind, i)
            left[:, row + 8 * (number % 2), at + 4 * per_register * (number // 2)] = value
        for number, register in enumerate(b):
            right[:, at + 4 * per_register * number, row] = _product_operand(m, register, kind, i)
    with np.errstate(all="ignore"):
        product = left @ right
    for number, (register, before) in enumerate(zip(d, c, strict=True)):
        found = product[:, row + 8 * (number // 2), 2 * column + number % 2].reshape(-1)
        m.put(register, (found + m.get(before, np.float32)).astype(np.float32), mask)


MMA = {"m16n8k16.f32.bf16.bf16.f32": 2, "m16n8k16.f32.f16.f16.f32": 2, "m16n8k8.f32.tf32.tf32.f32": 1}


def _product_operand(m: Any, register: str, kind: str, half: int) -> Array:
    bits = np.broadcast_to(m.get(register, np.uint32), m.lane.shape)
    if kind == "tf32":
        value = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        bits = (bits >> np.uint32(16 * half)).astype(np.uint16)
        value = _from_bf16(bits) if kind == "bf16" else bits.view(np.float16)
    return value.reshape(-1, 32)


def _bar(m: Any, step: Any, mask: Array | None) -> None:
    if step.words[0] == "warp":
        m.whole(32)
    elif len(step.operands) == 1:
        m.whole(m.program.threads)
    else:
        raise EmulationError("this form of it is not emulated")


ACTIONS: dict[str, Callable[[Any, Any, Array | None], None]] = dict.fromkeys(PLAIN, _plain)
ACTIONS |= {"mul": _multiply, "mad": _multiply, "shl": _shift, "shr": _shift, "setp": _setp, "selp": _selp, "mov": _mov}
ACTIONS |= {"cvt": _cvt, "bfe": _bfe, "prmt": _prmt, "shfl": _shfl, "redux": _redux, "ld": _ld, "st": _st, "cp": _cp}
ACTIONS |= {"red": _atomic, "atom": _atomic, "ldmatrix": _matrix, "stmatrix": _matrix, "mma": _mma}
ACTIONS |= {"bar": _bar, "barrier": _bar}
