"""The machine that ``ptx.py`` runs kernels on: programs of PTX, memory, and threads in lockstep.

A register is an array of bits with an entry for each thread, or with one for all of them. Threads that branch apart run
the earliest first, until they meet again.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import numpy as np
from ptx_instructions import ACTIONS, END, UNSIGNED, EmulationError

WARP, POISON = 32, 0xA5  # what memory and registers hold that nobody has written


class Instruction(NamedTuple):
    """``@guard name.words operands;`` of a kernel's PTX."""

    text: str
    guard: str
    name: str
    words: list[str]
    operands: list[str]


class Program(NamedTuple):
    """A kernel's code: where its labels are, threads of a program, bytes of its shared memory, names of parameters."""

    kernel: str
    code: list[Instruction]
    labels: dict[str, int]
    threads: int
    shared: int
    params: list[str]


def parse(ptx: str, shared: int) -> Program:
    """Read a module of one kernel, a program of which takes ``shared`` bytes of shared memory."""
    ptx = re.sub(r"//.*|^\s*\.(?:loc|file|section)\b.*$", "", ptx, flags=re.M)
    head, _, body = ptx[ptx.index(".entry") :].partition("\n{")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        text = " ".join(statement.split()).lstrip("{} ")
        while (label := re.match(r"(\$?\w+): ?(?!:)", text)) is not None:
            labels[label[1]], text = len(code), text[label.end() :].lstrip("{} ")
        if not text or text.startswith((".reg", ".pragma")):
            continue
        found = re.fullmatch(r"(?:@(!?%\w+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if found is None:
            if text.startswith("."):
                break  # what follows the kernel is for debuggers
            raise EmulationError(f"not read: {text!r}")
        name, *words = found[2].split(".")
        operands = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", found[3] or "")
        code.append(Instruction(text, found[1] or "", name, words, [operand.strip() for operand in operands]))
    threads, kernel = int(re.search(r"ntid (\d+)", head)[1]), re.search(r"\.entry (\w+)", head)[1]
    return Program(kernel, code, labels, threads, shared, re.findall(r"\b\w+_param_\d+\b", head))


class Memory:
    """Bytes that are addressed, of which some belong to somebody."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size + -size % 16, POISON, np.uint8)
        self.owned = np.zeros(len(self.bytes), np.bool_)

    def places(self, address: np.ndarray, width: int) -> np.ndarray:
        """Addresses in units of ``width`` bytes, all of which must be valid."""
        bad = (address < 0) | (address > len(self.bytes) - width)
        inside = np.where(bad, 0, address)
        bad |= ~(self.owned[inside] & self.owned[inside + width - 1])
        if bad.any():
            raise EmulationError(f"{bad.sum()} threads access {width} bytes that are nobody's, at {address[bad][:3]}")
        if (address % width).any():
            raise EmulationError(f"an access of {width} bytes is not aligned, at {address[address % width != 0][:3]}")
        return address // width

    def numbers(self, width: int) -> np.ndarray:
        """The bytes as numbers of so many each."""
        return self.bytes.view(UNSIGNED[width])


class Machine:
    """Programs ``first`` to ``first + count`` of a grid, and what their threads hold."""

    def __init__(
        self, program: Program, memory: Memory, values: dict[str, int], grid: tuple[int, ...], first: int, count: int
    ) -> None:
        self.program, self.memory, self.values = program, memory, values
        self.size = count * program.threads
        thread = np.arange(self.size)
        self.lane, self.warp = thread % WARP, thread // WARP * WARP
        each = program.shared + -program.shared % 16
        self.shared_at = thread // program.threads * each
        self.shared = Memory(max(16, count * each))
        self.shared.owned[:] = each > 0
        self.registers: dict[str, np.ndarray] = {}
        self.active: np.ndarray | None = None  # None: all of them
        self.copies: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]  # groups that have not arrived, the last is open
        number, nothing = first + thread // program.threads, np.zeros(1)
        special = {"tid.x": thread % program.threads, "tid.y": nothing, "tid.z": nothing, "laneid": self.lane}
        special |= {"ctaid.x": number % grid[0], "ctaid.y": number // grid[0] % grid[1]}
        special |= {"ctaid.z": number // (grid[0] * grid[1]), "ntid.x": nothing + program.threads}
        special |= {f"nctaid.{axis}": nothing + length for axis, length in zip("xyz", grid, strict=True)}
        self.registers |= {f"%{name}": value.astype(np.uint32) for name, value in special.items()}
        self.registers["global_smem"] = np.zeros(1, np.uint32)

    def run(self) -> None:
        """From the first instruction until every thread has returned."""
        at = np.zeros(self.size, np.int64)  # where threads wait
        here, nearest = 0, END  # where the active threads are, and the first of the others
        while here < END:
            if here == nearest:  # they meet
                at[self.present] = here
                self.active = None if (at == here).all() else at == here
                nearest = int(at[~self.present].min(initial=END))
            step = self.program.code[here]
            try:
                target = self._step(step)
            except (EmulationError, LookupError, ValueError) as error:
                raise EmulationError(f"{self.program.kernel}, {step.text!r}: {error}") from error
            here += 1
            if target is None:
                continue
            goes = np.broadcast_to(self._guard(step), self.size)[self.present]
            if goes.all():
                here = target
            elif goes.any():
                at[self.present] = np.where(goes, target, here)
                here, nearest = int(at.min()), int(at.min())
                self.active = at == here
                continue
            if here > nearest:
                at[self.present] = here
                here, self.active = nearest, at == nearest
        if any(self.copies):
            raise EmulationError(f"{self.program.kernel} ends with copies that nobody has waited for")

    @property
    def present(self) -> np.ndarray:
        """(threads,) who is here."""
        return np.ones(self.size, np.bool_) if self.active is None else self.active

    def _guard(self, step: Instruction) -> np.ndarray:
        return self.get(step.guard, np.bool_) if step.guard else np.ones(1, np.bool_)

    def _step(self, step: Instruction) -> int | None:
        """Do one instruction of the active threads. A branch returns where to."""
        if step.name == "bra":
            return self.program.labels[step.operands[0]]
        if step.name in ("ret", "exit"):
            return END
        mask = self.active
        if step.guard:
            guard = self._guard(step)
            mask = guard if mask is None else guard & mask
            mask = None if mask.all() else mask
        if step.name not in ACTIONS:
            raise EmulationError("this instruction is not emulated")
        ACTIONS[step.name](self, step, mask)
        return None

    def get(self, name: str, kind: Any) -> np.ndarray:
        """(1,) or (threads,) an operand, its bits read as numbers of a kind."""
        if name[0] == "!":
            return ~self.get(name[1:], kind)
        found = self.registers.get(name)
        if found is None:
            # LLVM reads registers, too, whose value makes no difference.
            found = np.full(1, POISON * 0x0101010101010101, np.uint64) if name[0] == "%" else _constant(name, kind)
        if kind is np.bool_:
            return found != 0
        width = np.dtype(kind).itemsize
        return (found if found.itemsize == width else found.astype(UNSIGNED[width])).view(kind)

    def put(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Set a register in the threads of the mask."""
        bits = value if value.dtype == np.bool_ else value.view(UNSIGNED[value.itemsize])
        if mask is not None:
            before = self.registers.get(name, np.full(1, POISON, np.uint8))
            bits = np.where(mask, bits, before.astype(bits.dtype))
        self.registers[name] = bits

    def whole(self, group: int) -> None:
        """All threads of a warp, or of a program, must be here."""
        here = self.present.reshape(-1, group)
        if (here.any(1) & ~here.all(1)).any():
            raise EmulationError("some of the threads that it is for are elsewhere")

    def touched(
        self, operand: str, shared: bool, width: int, mask: np.ndarray | None
    ) -> tuple[Memory, np.ndarray, np.ndarray]:
        """What ``[register + offset]`` says: a memory, the places of ``width`` bytes, and which threads they are of.

        Of a load of all threads from one address there is one place, and a mask of one entry.
        """
        found = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
        address = self.get(found[1], np.uint32 if shared else np.int64).astype(np.int64) + int(found[2] or 0)
        address, mask = np.broadcast_arrays(
            address + self.shared_at if shared else address, np.ones(1, np.bool_) if mask is None else mask
        )
        memory = self.shared if shared else self.memory
        return memory, memory.places(address[mask], width), mask

    def arrive(self, left: int) -> None:
        """Groups of copies come in, all but the last ``left`` of those that are closed."""
        while len(self.copies) > left + 1:
            for places, values in self.copies.pop(0):
                self.shared.numbers(4)[places] = values


@functools.cache
def _constant(text: str, kind: Any) -> np.ndarray:
    value = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
    bits = np.array([value % 2**64], np.uint64)
    return bits if kind is np.bool_ else bits.astype(UNSIGNED[np.dtype(kind).itemsize])
