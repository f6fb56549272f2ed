"""What each pickle opcode does to the machine. One small function per opcode or per group of equal ones."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from hubtool.errors import CorruptFile, UnsafeFile
from hubtool.formats.pickle_state import MAX_DIGITS, MAX_OPCODES, Machine
from hubtool.formats.torch_objects import Name

Handler = Callable[[Machine, int], int]
HANDLERS: list[Handler | None] = [None] * 256
REFUSED = {
    ord("i"): "INST", ord("o"): "OBJ", ord("P"): "PERSID", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
    0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t", "r": "\r", "\n": ""}
_STRING_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_UNICODE_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")


def opcode(*codes: str) -> Callable[[Handler], Handler]:
    """Register a handler for the opcode bytes ``codes``."""

    def register(handler: Handler) -> Handler:
        for code in codes:
            HANDLERS[ord(code)] = handler
        return handler

    return register


# stack and memo


@opcode("(")
def _mark(m: Machine, pos: int) -> int:
    m.marks.append(m.stack)
    m.stack = []
    return pos


@opcode("0")
def _pop(m: Machine, pos: int) -> int:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()
    return pos


@opcode("1")
def _pop_to_mark(m: Machine, pos: int) -> int:
    m.pop_mark()
    return pos


@opcode("2")
def _dup(m: Machine, pos: int) -> int:
    m.stack.append(m.stack[-1])
    return pos


@opcode("q")
def _binput(m: Machine, pos: int) -> int:
    m.memo[m.data[pos]] = m.stack[-1]
    return pos + 1


@opcode("r")
def _long_binput(m: Machine, pos: int) -> int:
    return _put(m, int.from_bytes(m.take(pos, 4), "little"), pos + 4)


@opcode("p")
def _text_put(m: Machine, pos: int) -> int:
    return _put(m, *_decimal(m, pos))


def _put(m: Machine, slot: int, pos: int) -> int:
    if not 0 <= slot < MAX_OPCODES:
        raise UnsafeFile(f"the pickle asks for memo slot {slot}")
    m.memo[slot] = m.stack[-1]
    return pos


@opcode("\x94")
def _memoize(m: Machine, pos: int) -> int:
    m.memo[len(m.memo)] = m.stack[-1]
    return pos


@opcode("h")
def _binget(m: Machine, pos: int) -> int:
    m.stack.append(m.memo[m.data[pos]])
    return pos + 1


@opcode("j")
def _long_binget(m: Machine, pos: int) -> int:
    m.stack.append(m.memo[int.from_bytes(m.take(pos, 4), "little")])
    return pos + 4


@opcode("g")
def _text_get(m: Machine, pos: int) -> int:
    slot, pos = _decimal(m, pos)
    m.stack.append(m.memo[slot])
    return pos


@opcode("\x80")
def _proto(m: Machine, pos: int) -> int:
    if m.data[pos] > 5 or m.stack or m.marks or m.memo or m.protocol:
        raise CorruptFile(f"pickle protocol {m.data[pos]} is announced at an impossible place or does not exist")
    m.protocol = True
    return pos + 1


@opcode("\x95")
def _frame(m: Machine, pos: int) -> int:
    length = int.from_bytes(m.take(pos, 8), "little")
    if length > len(m.data) - pos - 8:
        m.take(pos + 8, length)
    return pos + 8


# constants


def _constant(code: str, value: Any) -> None:
    def push(m: Machine, pos: int) -> int:
        m.stack.append(value)
        return pos

    HANDLERS[ord(code)] = push


for _code, _value in {"N": None, "\x88": True, "\x89": False, ")": ()}.items():
    _constant(_code, _value)


@opcode("K")
def _binint1(m: Machine, pos: int) -> int:
    m.stack.append(m.data[pos])
    return pos + 1


def _fixed(code: str, layout: str) -> None:
    reader = struct.Struct(layout)
    size = reader.size

    def push(m: Machine, pos: int) -> int:
        m.stack.append(reader.unpack(m.take(pos, size))[0])
        return pos + size

    HANDLERS[ord(code)] = push


for _code, _layout in {"J": "<i", "M": "<H", "G": ">d"}.items():
    _fixed(_code, _layout)


def _long(code: str, width: int) -> None:
    def push(m: Machine, pos: int) -> int:
        count = int.from_bytes(m.take(pos, width), "little", signed=width == 4)
        digits = m.take(pos + width, count)
        if count > MAX_DIGITS // 2:
            raise UnsafeFile(f"an integer of {count} bytes")
        m.stack.append(int.from_bytes(digits, "little", signed=True))
        return pos + width + count

    HANDLERS[ord(code)] = push


_long("\x8a", 1)
_long("\x8b", 4)


def _decimal(m: Machine, pos: int) -> tuple[int, int]:
    text, pos = m.line(pos, MAX_DIGITS)
    return int(text.removesuffix(b"L")), pos


@opcode("I")
def _int(m: Machine, pos: int) -> int:
    value: int
    value, end = _decimal(m, pos)
    m.stack.append({b"00": False, b"01": True}.get(m.data[pos : end - 1], value))
    return end


@opcode("L")
def _text_long(m: Machine, pos: int) -> int:
    value, pos = _decimal(m, pos)
    m.stack.append(value)
    return pos


@opcode("F")
def _text_float(m: Machine, pos: int) -> int:
    text, pos = m.line(pos, MAX_DIGITS)
    m.stack.append(float(text))
    return pos


# text and bytes


def _counted(code: str, width: int, decode: Callable[[bytes], Any]) -> None:
    def push(m: Machine, pos: int) -> int:
        start = pos + width
        size = int.from_bytes(m.take(pos, width), "little")
        m.stack.append(decode(m.take(start, size)))
        return start + size

    HANDLERS[ord(code)] = push


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old_string(data: bytes) -> str | bytes:
    """A Python 2 ``str``: text where it is UTF-8, as ``torch.load`` assumes, bytes where it is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


for _code, _width, _decode in (
    ("\x8c", 1, _utf8), ("X", 4, _utf8), ("\x8d", 8, _utf8), ("U", 1, _old_string), ("T", 4, _old_string),
    ("C", 1, bytes), ("B", 4, bytes), ("\x8e", 8, bytes), ("\x96", 8, bytes),
):  # fmt: skip
    _counted(_code, _width, _decode)


@opcode("S")
def _text_string(m: Machine, pos: int) -> int:
    text, pos = m.line(pos)
    if len(text) < 2 or text[:1] not in b"'\"" or text[-1:] != text[:1]:
        raise CorruptFile("a string of the pickle has no quotes")
    inner = _STRING_ESCAPE.sub(lambda hit: _unescape(hit[1]), text[1:-1].decode("latin-1"))
    m.stack.append(_old_string(inner.encode("latin-1")))
    return pos


def _unescape(code: str) -> str:
    return chr(int(code[1:], 16)) if code[0] == "x" and len(code) == 3 else _ESCAPES.get(code, "\\" + code)


@opcode("V")
def _text_unicode(m: Machine, pos: int) -> int:
    text, pos = m.line(pos)
    m.stack.append(_UNICODE_ESCAPE.sub(lambda hit: chr(int(hit[1] or hit[2], 16)), text.decode("latin-1")))
    return pos


# containers


@opcode("]", "\x8f")
def _empty_list(m: Machine, pos: int) -> int:
    m.stack.append([])
    return pos


@opcode("}")
def _empty_dict(m: Machine, pos: int) -> int:
    m.stack.append({})
    return pos


@opcode("t", "\x91")
def _tuple(m: Machine, pos: int) -> int:
    items = tuple(m.stack)
    m.stack = m.marks.pop()
    m.stack.append(items)
    return pos


def _short_tuple(code: str, count: int) -> None:
    def push(m: Machine, pos: int) -> int:
        stack = m.stack
        if len(stack) < count:
            raise CorruptFile("the pickle takes more from its stack than there is")
        stack[-count:] = [tuple(stack[-count:])]
        return pos

    HANDLERS[ord(code)] = push


for _code, _count in {"\x85": 1, "\x86": 2, "\x87": 3}.items():
    _short_tuple(_code, _count)


@opcode("l")
def _list(m: Machine, pos: int) -> int:
    items = m.pop_mark()
    m.stack.append(items)
    return pos


@opcode("d")
def _dict(m: Machine, pos: int) -> int:
    items, mapping = m.pop_mark(), dict[Any, Any]()
    m.set_items(mapping, items)
    m.stack.append(mapping)
    return pos


@opcode("s")
def _setitem(m: Machine, pos: int) -> int:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])
    return pos


@opcode("u")
def _setitems(m: Machine, pos: int) -> int:
    items = m.pop_mark()
    m.set_items(m.stack[-1], items)
    return pos


@opcode("a")
def _append(m: Machine, pos: int) -> int:
    value = m.stack.pop()
    m.append(m.stack[-1], [value])
    return pos


@opcode("e", "\x90")
def _appends(m: Machine, pos: int) -> int:
    items = m.pop_mark()
    m.append(m.stack[-1], items)
    return pos


# names and calls


@opcode("c")
def _global(m: Machine, pos: int) -> int:
    start = pos
    module, pos = m.line(pos, 4096)
    name, pos = m.line(pos, 4096)
    m.stack.append(m.name(module.decode("utf-8"), name.decode("utf-8"), start - 1))
    return pos


@opcode("\x93")
def _stack_global(m: Machine, pos: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise UnsafeFile("STACK_GLOBAL with something that is not text")
    m.stack.append(m.name(module, name, pos - 1))
    return pos


@opcode("R")
def _reduce(m: Machine, pos: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)
    return pos


@opcode("\x81")
def _newobj(m: Machine, pos: int) -> int:
    args = m.stack.pop()
    target = m.stack[-1]
    if not (isinstance(target, Name) and (target.inert or target.name in {"OrderedDict", "Size"})):
        raise UnsafeFile("NEWOBJ on something that is not a known class")
    m.stack[-1] = m.call(target, args)
    return pos


@opcode("b")
def _build(m: Machine, pos: int) -> int:
    state = m.stack.pop()
    m.build(m.stack[-1], state)
    return pos


@opcode("Q")
def _binpersid(m: Machine, pos: int) -> int:
    m.stack[-1] = m.persistent(m.stack[-1])
    return pos
