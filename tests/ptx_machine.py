"""Runs a compiled kernel on a CPU: an interpreter of the PTX that ours for matrix units use, registers and shared memory as they are.

What it computes is what a GPU would, but for the order of sums inside one product, approximate roots, and time. Warps run one after the other
from barrier to barrier, in the order given, so that a barrier that is missing shows. An instruction it does not know is an error.
"""

import operator
import re

import numpy as np

SIZES = {"b16": np.uint16, "u16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.uint32, "f32": np.uint32, "b64": np.uint64,
         "u64": np.uint64, "s64": np.uint64, "pred": np.bool_}  # fmt: skip
SIGNED = {"s32": np.int32, "s64": np.int64}
ORDER = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne}
BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
          "min": np.minimum, "max": np.maximum}  # fmt: skip
LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4 * 2


def parse(ptx: str) -> tuple[list, dict[str, int]]:
    """Instructions (name, operands, predicate, text) of the only kernel, and where its labels are."""
    body = ptx[ptx.index(".reqntid") :]
    body = re.sub(r"//.*", "", body[body.index("{") + 1 : body.index("\n}")])
    lines = (line.strip() for line in body.splitlines())
    text = " ".join(line for line in lines if line and not line.startswith("."))
    code, labels = [], {}
    for statement in text.split(";"):
        statement = statement.strip()
        while label := re.match(r"(\$\w+):\s*", statement):
            labels[label[1]], statement = len(code), statement[label.end() :]
        if not statement:
            continue
        predicate = re.match(r"@(!?)(%p\d+)\s+", statement)
        name, _, rest = (statement[predicate.end() :] if predicate else statement).partition(" ")
        name, _, more = name.partition("\t")
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", f"{more} {rest}")]
        code.append((name, operands, predicate and (predicate[2], predicate[1] == "!"), statement))
    return code, labels


def run(ptx: str, threads: int, programs: int, memory: np.ndarray, parameters: dict[int, int | float], warps: list[int], shared: int) -> None:
    """All programs of a launch on `memory` (bytes; pointers are places in it), warps in that order."""
    code, labels = parse(ptx)
    assert sorted(warps) == list(range(threads // 32))
    for program in range(programs):
        place = np.full(shared, 0xFF, np.uint8)
        running = {number: Warp(code, labels, memory, place, parameters, number, program).run() for number in warps}
        while running:
            running = {number: warp for number, warp in running.items() if next(warp, "ended") != "ended"}


class Warp:
    """32 threads in step."""

    def __init__(self, code, labels, memory, shared, parameters, number, program):
        self.code, self.labels, self.memory, self.shared, self.parameters = code, labels, memory, shared, parameters
        self.registers = {"%tid.x": LANE + 32 * number, "%laneid": LANE, "%ctaid.x": np.full(32, program), "global_smem": np.zeros(32, np.uint32)}
        self.active = np.ones(32, bool)

    def run(self):
        """Yields at barriers."""
        at = 0
        while at < len(self.code):
            name, operands, predicate, text = self.code[at]
            at += 1
            self.active = np.ones(32, bool) if not predicate else self.registers[predicate[0]] ^ predicate[1]
            if name.startswith("bra"):
                assert self.active.all() or not self.active.any(), f"threads part: {text}"
                at = self.labels[operands[-1]] if self.active.any() else at
            elif name == "ret":
                return
            elif name.startswith("bar"):
                yield
            else:
                try:
                    with np.errstate(all="ignore"):
                        self._step(name, name.split("."), operands)
                except Exception as problem:
                    raise RuntimeError(f"{text}: {problem!r}") from problem

    def _get(self, operand: str, kind: str = "u32") -> np.ndarray:
        if operand in self.registers:
            value = self.registers[operand]
            return value if value.dtype == SIZES[kind] else value.astype(SIZES[kind])
        assert operand[0] != "%", f"{operand} was never set"
        if operand.startswith("0f"):
            return np.full(32, int(operand[2:], 16), np.uint32)
        return np.full(32, int(operand, 0) % (1 << 8 * np.dtype(SIZES[kind]).itemsize), SIZES[kind])

    def _signed(self, operand: str, kind: str) -> np.ndarray:
        value = self._get(operand, kind)
        return value.view(SIGNED[kind]) if kind in SIGNED else value

    def _float(self, operand: str) -> np.ndarray:
        return self._get(operand, "f32").view(np.float32)

    def _put(self, operand: str, value: np.ndarray) -> None:
        value = value if value.dtype in (np.bool_, np.uint16, np.uint64) else np.ascontiguousarray(value).view(np.uint32)
        before = self.registers.get(operand)
        self.registers[operand] = value.copy() if self.active.all() or before is None else np.where(self.active, value, before)

    def _address(self, operand: str) -> np.ndarray:
        base, more = re.match(r"(%\w+|global_smem)([+-]\d+)?$", re.sub(r"[\[\]\s]", "", operand)).groups()
        return self._get(base, "u64").astype(np.int64) + int(more or 0)

    def _bytes(self, space: np.ndarray, operand: str, size: int) -> np.ndarray:
        """(32, size) places in memory or shared memory; those of threads that are not active are the first."""
        start = np.where(self.active, self._address(operand), 0)
        assert (start % size == 0).all() and (start >= 0).all() and (start + size <= len(space)).all(), "outside or not aligned"
        return start[:, None] + np.arange(size)

    def _step(self, name: str, parts: list[str], operands: list[str]) -> None:
        kind, first = parts[-1], parts[0]
        if first in ("griddepcontrol", "fence"):
            return
        if name.startswith("ld.param"):
            value = self.parameters[int(re.search(r"param_(\d+)", operands[1])[1])]
            self._put(operands[0], np.full(32, value, np.float32 if isinstance(value, float) else SIZES[kind]))
        elif first in ("ld", "st"):
            self._move("shared" in parts, first == "ld", kind, operands)
        elif first in ("ldmatrix", "stmatrix"):
            self._matrices(first == "ldmatrix", "trans" in parts, operands)
        elif first in ("mma", "wgmma"):
            if "commit_group" not in parts and "wait_group" not in parts and "fence" not in parts:
                self._product(name, operands)
        elif first == "mov" and "{" in operands[1]:
            low, high = (self._get(part, "b16").astype(np.uint32) for part in _names(operands[1]))
            self._put(operands[0], low | high << 16)
        elif first == "mov" and "{" in operands[0]:
            for part, half in zip(_names(operands[0]), _halves(self._get(operands[1])), strict=True):
                self._put(part, half.view(np.uint16))
        elif first == "mov":
            self._put(operands[0], self._get(operands[1], kind))
        elif first == "shfl":
            assert "bfly" in parts
            self._put(operands[0], self._get(operands[1])[LANE ^ int(operands[2])])
        elif first == "selp":
            self._put(operands[0], np.where(self._get(operands[3], "pred"), self._get(operands[1], kind), self._get(operands[2], kind)))
        elif first == "setp":
            read = self._float if kind == "f32" else lambda operand: self._signed(operand, kind)
            self._put(operands[0], ORDER[parts[1]](read(operands[1]), read(operands[2])))
        elif first == "cvt":
            self._convert(name, operands)
        elif kind == "f16x2":
            pairs = zip(*(_halves(self._get(operand)) for operand in operands[1:]), strict=True)
            self._put(operands[0], _joined(*((a > b).astype(np.float16) if first == "set" else BINARY[first](a, b) for a, b in pairs)))
        elif kind == "f32":
            self._put(operands[0], _arithmetic(first, [self._float(operand) for operand in operands[1:]]))
        else:
            self._integers(first, kind, "wide" in parts, operands)

    def _move(self, shared: bool, load: bool, kind: str, operands: list[str]) -> None:
        space, registers = self.shared if shared else self.memory, _names(operands[0 if load else 1])
        dtype = SIZES[kind]
        size = np.dtype(dtype).itemsize
        where = self._bytes(space, operands[1 if load else 0], size * len(registers))
        if load:
            for number, register in enumerate(registers):
                self._put(register, np.ascontiguousarray(space[where[:, number * size : (number + 1) * size]]).view(dtype)[:, 0])
        else:
            data = np.stack([self._get(register, kind) for register in registers], 1)
            space[where[self.active]] = data.view(np.uint8)[self.active]

    def _matrices(self, load: bool, turned: bool, operands: list[str]) -> None:
        """8 × 8 matrices of halves: lane 8 i + r has the address of row r of the i-th."""
        registers, rows = _names(operands[0 if load else 1]), self._bytes(self.shared, operands[1 if load else 0], 16)
        assert self.active.all() or not self.active.any()
        for number, register in enumerate(registers if self.active.any() else ()):
            where = rows[8 * number : 8 * number + 8]
            if load:
                matrix = self.shared[where].view(np.uint16)
                self._put(register, np.ascontiguousarray(matrix.T if turned else matrix).view(np.uint32).reshape(32))
            else:
                matrix = np.ascontiguousarray(self._get(register)).reshape(8, 4).view(np.uint16)
                self.shared[where] = np.ascontiguousarray(matrix.T if turned else matrix).view(np.uint8)

    def _product(self, name: str, operands: list[str]) -> None:
        sums, left = (_names(operand) for operand in operands[:2])
        a, columns = np.zeros((16, 16)), 2 * len(sums)
        for number, register in enumerate(left):
            for pair, half in enumerate(_halves(self._get(register))):
                a[ROW + 8 * (number % 2), COLUMN + 8 * (number // 2) + pair] = half
        if name.startswith("wgmma"):
            b = self._described(self._get(operands[2], "u64"), columns)
            assert self._get(operands[3], "pred").all() and operands[4:] == ["1", "1", "0"]
        else:
            assert "m16n8k16.row.col.f32.f16.f16.f32" in name
            b = np.zeros((16, 8))
            for number, register in enumerate(_names(operands[2])):
                for pair, half in enumerate(_halves(self._get(register))):
                    b[COLUMN + 8 * number + pair, ROW] = half
        start = sums if name.startswith("wgmma") else _names(operands[3])
        product, before = a @ b, [self._float(register) for register in start]
        for number, register in enumerate(sums):
            more = product[ROW + 8 * (number // 2 % 2), COLUMN + 8 * (number // 4) + number % 2]
            self._put(register, (before[number] + more).astype(np.float32))

    def _described(self, descriptor: np.ndarray, columns: int) -> np.ndarray:
        """(16, columns) of shared memory, rows along k with a swizzle of 64 bytes."""
        value = int(descriptor[0])
        assert (descriptor == descriptor[0]).all() and value >> 62 == 2
        k, n = np.arange(16)[:, None], np.arange(columns)[None, :]
        where = ((value & 0x3FFF) << 4) + n // 8 * ((value >> 32 & 0x3FFF) << 4) + n % 8 * 64 + 2 * k
        where ^= where >> 3 & 0x30
        return self.shared[where[..., None] + np.arange(2)].view(np.float16)[..., 0].astype(np.float64)

    def _convert(self, name: str, operands: list[str]) -> None:
        to, source = name.split(".")[-2:]
        if to in ("f16x2", "bf16x2"):
            high, low = (_rounded(self._float(operand), to) for operand in operands[1:])
            self._put(operands[0], low.astype(np.uint32) | high.astype(np.uint32) << 16)
        elif to == "f16":
            value = self._float(operands[1])
            half = value.astype(np.float16)
            if ".rm." in name:
                half = np.where(half > value, np.nextafter(half, np.float16(-np.inf)), half)
            self._put(operands[0], half.view(np.uint16))
        elif to == "f32":
            self._put(operands[0], self._get(operands[1], "b16").view(np.float16).astype(np.float32))
        else:
            self._put(operands[0], self._signed(operands[1], source).astype(SIGNED.get(to, SIZES[to])).view(SIZES[to]))

    def _integers(self, name: str, kind: str, wide: bool, operands: list[str]) -> None:
        if wide:
            a, b = (self._signed(operand, kind).astype(np.int64) for operand in operands[1:3])
            self._put(operands[0], (a * b + (self._get(operands[3], "u64").view(np.int64) if name == "mad" else 0)).view(np.uint64))
            return
        if name == "bfe":
            length = int(operands[3])
            field = self._get(operands[1]) >> np.uint32(int(operands[2])) & np.uint32((1 << length) - 1)
            negative = (kind == "s32") & (field >> np.uint32(length - 1) & 1 == 1)
            self._put(operands[0], np.where(negative, field.astype(np.int64) - (1 << length), field).astype(np.uint32))
            return
        a, *others = (self._signed(operand, kind) for operand in operands[1:])
        if name in ("shl", "shr"):
            count = self._get(operands[2]).astype(a.dtype)
            result = a << count if name == "shl" else a >> count
        elif name in ("div", "rem"):
            quotient = np.trunc(a / others[0]).astype(a.dtype)
            result = quotient if name == "div" else a - quotient * others[0]
        elif name == "mad":
            result = a * others[0] + others[1]
        else:
            result = {"not": lambda: ~a, "neg": lambda: -a}.get(name, lambda: BINARY[name](a, others[0]))()
        self._put(operands[0], result.view(SIZES[kind]))


def _names(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _halves(value: np.ndarray) -> list[np.ndarray]:
    return [(value >> np.uint32(shift)).astype(np.uint16).view(np.float16) for shift in (0, 16)]


def _joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16


def _rounded(value: np.ndarray, to: str) -> np.ndarray:
    if to == "f16x2":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def _arithmetic(name: str, values: list[np.ndarray]) -> np.ndarray:
    if name == "fma":
        return (values[0].astype(np.float64) * values[1] + values[2]).astype(np.float32)
    if name == "rsqrt":
        return 1 / np.sqrt(values[0])
    return -values[0] if name == "neg" else values[0] / values[1] if name == "div" else BINARY[name](*values)
