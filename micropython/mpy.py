"""Makes a .mpy smaller, which does the same: MicroPython's compiler is quick, and leaves something to do.

A module has a table of its names, and a function one of its locals. The first 128 names take one byte where
they are used, and the first 16 locals none; mpy-cross numbers them as they come. Here those that are used
most come first, ways that end alike are joined, what is never run is left out, and jumps, whose length
depends on how far they go, are made anew.

The format is of .mpy version 6 (MicroPython 1.19 and later), bytecode only: py/persistentcode.c and py/bc0.h.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator

_BYTECODE = 0
_SETUPS = (0x47, 0x48, 0x49)  # with, except, finally
_LEAVES = (0x42, 0x63, 0x64, 0x65, 0x66)  # the next instruction is not run: jump, return, raise
_MAKE_CLOSURE = (0x20, 0x21)
_LOAD_FAST_N, _STORE_FAST_N, _DELETE_FAST = 0x24, 0x26, 0x28
_DEREF = (0x25, 0x27, 0x29)
_UNWIND_JUMP, _GO = 0x40, 0x42
_LAST_SIGNED = 0x44  # of the jumps: those that may go back
_LOAD_FAST, _STORE_FAST = 0xB0, 0xC0
_SHORT = 16  # locals that an instruction has within it
_VARARGS, _KEYWORDS = 0x04, 0x02  # flags of a function: *args, **options
_NAME, _NUMBER, _JUMP = 1, 2, 3


@dataclasses.dataclass(eq=False)
class Instruction:
    code: int
    kind: int  # 0 or what follows: a _NAME, a _NUMBER or the way of a _JUMP
    name: int = 0
    number: bytes = b""
    target: "Instruction | None" = None
    far: bool = False  # a jump that takes two bytes
    extra: bytes = b""  # one more byte at the end

    def what(self) -> tuple[object, ...]:
        """Two with the same do the same."""
        return self.code, self.name, self.number, self.target, self.extra


@dataclasses.dataclass
class Function:
    fixed: int  # locals that have their places: the arguments
    signature: bytes
    names: list[int]  # its own, and those of its arguments
    lines: bytes
    cells: bytes
    instructions: list[Instruction]
    children: "list[Function]"


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        number = 0
        while True:
            byte = self.byte()
            number = number << 7 | byte & 127
            if byte < 128:
                return number

    def encoded(self) -> bytes:
        """A number as it stands there."""
        start = self.at
        while self.byte() >= 128:
            pass
        return self.data[start : self.at]


def _number(value: int) -> bytes:
    coded = [value & 127]
    while value := value >> 7:
        coded.append(value & 127 | 128)
    return bytes(reversed(coded))


def smaller(data: bytes) -> bytes:
    """The same module in fewer bytes. ValueError: it is none that this can read."""
    reader = Reader(data)
    head = reader.take(4)
    if head[:2] != b"M\x06" or head[2]:
        raise ValueError("no .mpy of bytecode, version 6")
    count, objects_count = reader.number(), reader.number()
    names = [_name(reader) for _ in range(count)]
    start = reader.at
    for _ in range(objects_count):
        _skip_object(reader)
    objects = data[start : reader.at]
    module = _function(reader)
    if reader.at != len(data):
        raise ValueError("more than one module")
    functions = list(_all(module))
    for function in functions:
        while _shorten(function.instructions) or _join_ends(function.instructions):
            pass
        _renumber_locals(function)
    used: collections.Counter[int] = collections.Counter()
    for function in functions:
        used.update(function.names)
        used.update(each.name for each in function.instructions if each.kind == _NAME)
    # The first is the file that it was made of.
    order = [0, *(name for name, _ in used.most_common() if name)]
    places = {old: new for new, old in enumerate(order)}
    body = _written(module, places.__getitem__)
    return b"".join(
        [head, _number(len(order)), _number(objects_count), *(names[one] for one in order), objects, body]
    )


def _name(reader: Reader) -> bytes:
    start = reader.at
    length = reader.number()
    if not length & 1:
        reader.take((length >> 1) + 1)
    return reader.data[start : reader.at]


def _skip_object(reader: Reader) -> None:
    """A constant: a kind, and what it is made of."""
    kind = reader.byte()
    if kind <= 4:
        # Of the few that have no content.
        return
    length = reader.number()
    if kind == 10:
        for _ in range(length):
            _skip_object(reader)
    else:
        # Strings and bytes end with a zero.
        reader.take(length + (kind in (5, 6)))


def _function(reader: Reader) -> Function:
    kind = reader.number()
    if kind & 3 != _BYTECODE:
        raise ValueError("native code")
    end = reader.at + (kind >> 3)
    start = reader.at
    flags, arguments = _signature(reader)
    signature = reader.data[start : reader.at]
    lines_length, cells_length = _sizes(reader)
    info_end = reader.at + lines_length
    names = [reader.number() for _ in range(1 + arguments)]
    lines = reader.take(info_end - reader.at)
    cells = reader.take(cells_length)
    instructions = _instructions(reader, end)
    children = [_function(reader) for _ in range(reader.number())] if kind & 4 else []
    fixed = arguments + bool(flags & _VARARGS) + bool(flags & _KEYWORDS)
    return Function(fixed, signature, names, lines, cells, instructions, children)


def _signature(reader: Reader) -> tuple[int, int]:
    """A function's flags, and how many arguments have names: the bits xSSSSEAA, and then xFSSKAED."""
    byte = reader.byte()
    positional, flags, keyword, shift = byte & 3, 0, 0, 0
    while byte & 128:
        byte = reader.byte()
        flags |= (byte & 0x40) >> 6 << shift
        positional |= (byte & 4) << shift
        keyword |= (byte & 8) >> 3 << shift
        shift += 1
    return flags, positional + keyword


def _sizes(reader: Reader) -> tuple[int, int]:
    """Bytes of names and lines, and of cells: xIIIIIIC."""
    info = cells = shift = 0
    while True:
        byte = reader.byte()
        cells |= (byte & 1) << shift
        info |= (byte & 0x7E) >> 1 << 6 * shift
        shift += 1
        if byte < 128:
            return info, cells


def _sized(info: int, cells: int) -> bytes:
    coded = b""
    while True:
        byte = (info & 0x3F) << 1 | cells & 1
        info >>= 6
        cells >>= 1
        if not info and not cells:
            return coded + bytes((byte,))
        coded += bytes((byte | 128,))


def _instructions(reader: Reader, end: int) -> list[Instruction]:
    found: dict[int, Instruction] = {}
    jumps: list[tuple[Instruction, int]] = []
    while reader.at < end:
        at = reader.at
        code = reader.byte()
        kind = 0x3A4 >> 2 * (code >> 4) & 3
        instruction = found[at] = Instruction(code, kind)
        if kind == _NAME:
            instruction.name = reader.number()
        elif kind == _NUMBER:
            instruction.number = reader.encoded()
        elif kind == _JUMP:
            distance = reader.byte()
            far = distance >= 128
            if far:
                distance = distance & 127 | reader.byte() << 7
            if code <= _LAST_SIGNED:
                distance -= 0x4000 if far else 0x40
            jumps.append((instruction, reader.at + distance))
        if code in (*_MAKE_CLOSURE, _UNWIND_JUMP):
            instruction.extra = reader.take(1)
    for instruction, target in jumps:
        instruction.target = found[target]
    return list(found.values())


def _all(function: Function) -> Iterator[Function]:
    yield function
    for child in function.children:
        yield from _all(child)


def _shorten(instructions: list[Instruction]) -> bool:
    """Leave out what is never run, and jumps that lead to the next one or to another jump."""
    for each in instructions:
        if _UNWIND_JUMP < each.code <= _LAST_SIGNED:
            # It may lead around in a circle.
            for _ in instructions:
                if each.target is not None and each.target.code == _GO:
                    each.target = each.target.target
    reached = {each.target for each in instructions}
    for at in range(1, len(instructions)):
        each, before = instructions[at], instructions[at - 1]
        if before.code in _LEAVES and each not in reached:
            del instructions[at]
            return True
        if before.code == _GO and before.target is each:
            _replace(instructions, before, each)
            del instructions[at - 1]
            return True
    return False


def _join_ends(instructions: list[Instruction]) -> bool:
    """Where two ways end alike, in a jump to one place, a return or a raise, have one go into the other."""
    # What catches an exception depends on whether its handler stands before or after.
    handlers = {each.target for each in instructions if each.code in _SETUPS}
    parts = list(itertools.accumulate(each in handlers for each in instructions))
    for at, each in enumerate(instructions):
        if each.code not in _LEAVES:
            continue
        # Later ones only: most jumps go forward only.
        ends = [
            other
            for other, it in enumerate(instructions)
            if other > at and parts[other] == parts[at] and (it is each.target or it.what() == each.what())
        ]
        alike = {other: _alike(instructions, at, other) for other in ends}
        other = max(ends, key=alike.__getitem__, default=at)
        length = alike.get(other, 0)
        if sum(_size(one) for one in instructions[at - length : at]) > (each.code != _GO):
            for offset in range(length + 1):
                _replace(instructions, instructions[at - offset], instructions[other - offset])
            jump = Instruction(_GO, _JUMP, target=instructions[other - length])
            instructions[at - length : at + 1] = [jump]
            return True
    return False


def _alike(instructions: list[Instruction], at: int, other: int) -> int:
    """How many instructions before two places are the same, and run into them."""
    length = 0
    while at > length and length + 1 < other - at:
        one, two = instructions[at - length - 1], instructions[other - length - 1]
        if one.what() != two.what():
            break
        length += 1
    return length


def _size(instruction: Instruction) -> int:
    """Bytes, at least."""
    more = 1 if instruction.kind in (_NAME, _JUMP) else len(instruction.number)
    return 1 + more + len(instruction.extra)


def _replace(instructions: list[Instruction], old: Instruction, new: Instruction) -> None:
    """Have jumps to one instruction lead to another."""
    for each in instructions:
        if each.target is old:
            each.target = new


def _local(instruction: Instruction) -> tuple[int, int] | None:
    """Loading (0), storing (1) or deleting (2), and which local."""
    code = instruction.code
    if _LOAD_FAST <= code < _LOAD_FAST + _SHORT:
        return 0, code - _LOAD_FAST
    if _STORE_FAST <= code < _STORE_FAST + _SHORT:
        return 1, code - _STORE_FAST
    if code in (_LOAD_FAST_N, _STORE_FAST_N, _DELETE_FAST):
        return (code - _LOAD_FAST_N) // 2, Reader(instruction.number).number()
    return None


def _renumber_locals(function: Function) -> None:
    """The most used first. What an inner function has of them stands in cells: left as it is then."""
    if any(each.code in (*_DEREF, *_MAKE_CLOSURE) for each in function.instructions):
        return
    uses = [found for each in function.instructions if (found := _local(each)) is not None]
    used = collections.Counter(place for _, place in uses if place >= function.fixed)
    places = {old: function.fixed + new for new, (old, _) in enumerate(used.most_common())}
    for each in function.instructions:
        found = _local(each)
        if found is None or found[1] < function.fixed:
            continue
        how, place = found[0], places[found[1]]
        if place < _SHORT and how < 2:
            each.code, each.kind, each.number = (_LOAD_FAST, _STORE_FAST)[how] + place, 0, b""
        else:
            each.code, each.kind, each.number = _LOAD_FAST_N + 2 * how, _NUMBER, _number(place)


def _written(function: Function, place: Callable[[int], int]) -> bytes:
    """A function and those in it."""
    names = b"".join(_number(place(name)) for name in function.names) + function.lines
    code = function.signature + _sized(len(names), len(function.cells)) + names + function.cells
    code += _assembled(function.instructions, place)
    children = b"".join(_written(child, place) for child in function.children)
    kind = len(code) << 3 | bool(function.children) << 2 | _BYTECODE
    return _number(kind) + code + (_number(len(function.children)) if function.children else b"") + children


def _assembled(instructions: list[Instruction], place: Callable[[int], int]) -> bytes:
    for each in instructions:
        each.far = False
        if each.kind == _NAME:
            each.number = _number(place(each.name))
    while True:
        starts: dict[Instruction | None, int] = {}
        at = 0
        for each in instructions:
            starts[each] = at
            at += 1 + (1 + each.far if each.kind == _JUMP else len(each.number)) + len(each.extra)
        grown = False
        coded = bytearray()
        for each in instructions:
            coded.append(each.code)
            if each.kind == _JUMP:
                distance = starts[each.target] - (starts[each] + 2 + each.far)
                back = each.code <= _LAST_SIGNED
                if distance < 0 and not back:
                    raise ValueError("this jump cannot go back")
                if not each.far and not (-0x40 <= distance < 0x40 if back else 0 <= distance < 0x80):
                    each.far = grown = True
                if each.far:
                    distance += 0x4000 * back
                    coded += bytes((distance & 127 | 128, distance >> 7 & 255))
                else:
                    coded.append(distance + 0x40 * back & 255)
            else:
                coded += each.number
            coded += each.extra
        if not grown:
            return bytes(coded)
