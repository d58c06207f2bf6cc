"""Pickles of strangers, read as data: nothing is imported, nothing is called, and the work is bounded.

A few bytes of pickle can hash for ever (a tuple of itself of itself … as a key), ask for gigabytes (a length, a number of
the memo) or call any function. The standard library's own Python machine is used with these taken out: it is ten times
slower than the one in C, which can be asked none of this. Sets become lists, since their members would be hashed.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, BinaryIO

LONGEST_LINE = 1 << 16  # bytes of a number or name written as text
_INT64 = 2**63
_INT32, _UINT16, _UINT32, _UINT64 = (struct.Struct(form).unpack_from for form in ("<i", "<H", "<I", "<Q"))
_OPCODES = (
    "PROTO FRAME MARK STOP POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GET BINGET LONG_BINGET PUT BINPUT "
    "LONG_BINPUT MEMOIZE PERSID BINPERSID GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ NEWOBJ_EX INST OBJ"
).split()
# The standard library leaves the parts of its machine in Python undeclared.
_machine: Any = pickle


class PlainUnpickler(_machine._Unpickler):
    """Numbers, strings, bytes, tuples, lists, and dicts whose keys are strings or whole numbers of 64 bits.

    A subclass may know more: what `find_class` gives is called with the arguments the pickle has for it, and what
    `build` does with a state is up to it.

    Args:
        file: read from where it stands, and not beyond the pickle's end.
        most_bytes: of the pickle.
        most_steps: instructions carried out; the memory that is taken is at most some hundred bytes each.

    Raises:
        pickle.UnpicklingError: from `load`: it wants something imported, or is beyond the bounds. Damaged pickles raise
            other errors as well, as with the standard library.
    """

    def __init__(self, file: BinaryIO, *, most_bytes: int = 1 << 26, most_steps: int = 4_000_000) -> None:
        super().__init__(_Bounded(file, most_bytes))
        self._steps = most_steps

    def load(self) -> Any:
        frames = self._unframer = _machine._Unframer(self._file_read, self._file_readline)
        self.read, self.readline = frames.read, frames.readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.proto = 0
        self.append = self.stack.append
        known = self.dispatch
        try:
            for _ in range(self._steps):
                code = frames.read(1)
                if not code:
                    raise EOFError("the pickle ends early")
                if code[0] not in known:
                    raise pickle.UnpicklingError(f"instruction {code!r} has no place in plain data")
                known[code[0]](self)
        except _machine._Stop as stop:
            return stop.value
        raise pickle.UnpicklingError(f"it takes more than {self._steps:,} steps")

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")

    def build(self, built: Any, state: Any) -> None:
        """Give a state to what was built; plain data has none."""

    def put(self, place: Any, items: list[Any]) -> None:
        """Keys and values, in turns, into what should be a dict."""
        if not isinstance(place, dict):
            raise pickle.UnpicklingError(f"it sets items of a {type(place).__name__}")
        place.update(plain_items(zip(items[::2], items[1::2], strict=True)))

    # ---- instructions that differ from the standard library's; it finds them in `dispatch` ----------------------------

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self.put(self.stack[-1], items)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put(self.stack[-1], [key, value])

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.put(self.stack[-1], items)

    def _load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    def _load_list_of_marked(self) -> None:
        self.append(self.pop_mark())

    def _load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    def _call(self, function: Any, args: Any) -> None:
        if not callable(function) or type(args) is not tuple:
            raise pickle.UnpicklingError("it calls what is no function")
        self.append(function(*args))

    def _load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self._call(function, args)

    def _load_newobj_ex(self) -> None:
        self.stack.pop()  # keywords: nothing here takes any
        self._load_reduce()

    def _load_obj(self) -> None:
        function, *args = self.pop_mark()
        self._call(function, tuple(args))

    def _load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self._call(self.find_class(module, name), tuple(self.pop_mark()))

    dispatch = {code[0]: _machine._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _OPCODES)}
    dispatch |= {
        pickle.SETITEMS[0]: _load_setitems,
        pickle.SETITEM[0]: _load_setitem,
        pickle.DICT[0]: _load_dict,
        pickle.BUILD[0]: _load_build,
        pickle.REDUCE[0]: _load_reduce,
        pickle.NEWOBJ[0]: _load_reduce,
        pickle.NEWOBJ_EX[0]: _load_newobj_ex,
        pickle.OBJ[0]: _load_obj,
        pickle.INST[0]: _load_inst,
        pickle.EMPTY_SET[0]: lambda self: self.append([]),
        pickle.ADDITEMS[0]: _load_additems,
        pickle.FROZENSET[0]: _load_list_of_marked,
    }


def plain_items(items: Any) -> dict[Any, Any]:
    """A dict of pairs whose keys take no time to hash: strings (Python salts them), and whole numbers of 64 bits, of
    which at most eight share a hash.

    Raises:
        pickle.UnpicklingError: another key.
    """
    made = {}
    for key, value in items:
        if not (type(key) in (str, bool, type(None)) or (type(key) is int and -_INT64 <= key < _INT64)):
            raise pickle.UnpicklingError(f"a {type(key).__name__} is a key in it")
        made[key] = value
    return made


def ordinary_triple(data: bytes) -> tuple[int | str, int | str, str] | None:
    """Two ids (whole numbers of 64 bits, strings of at most 255 bytes) and a string, as Python pickles their tuple.

    Read straight through, at about the speed of the machine in C. None: `PlainUnpickler` has to look; it may be right all
    the same (long strings, a string that stands twice, protocols 0 and 1, other writers).
    """
    try:
        return _ordinary_triple(data)
    except (IndexError, ValueError, struct.error):
        return None


def _ordinary_triple(data: bytes) -> tuple[int | str, int | str, str] | None:
    protocol, framed = data[1], data[1] > 3
    if data[0] != 0x80 or not 2 <= protocol <= 5:
        return None
    if framed and (data[2] != 0x95 or _UINT64(data, 3)[0] != len(data) - 11):
        return None
    at, strings, parts = 11 if framed else 2, 0, []
    for place in (0, 1, 2):
        code = data[at]
        if code == 0x58:  # BINUNICODE
            begin, end = at + 5, at + 5 + _UINT32(data, at + 1)[0]
        elif code == 0x8C and framed:  # SHORT_BINUNICODE
            begin, end = at + 2, at + 2 + data[at + 1]
        elif place == 2:
            return None
        elif code == 0x4A:  # BININT
            parts.append(_INT32(data, at + 1)[0])
            at += 5
            continue
        elif code == 0x4D:  # BININT2
            parts.append(_UINT16(data, at + 1)[0])
            at += 3
            continue
        elif code == 0x4B:  # BININT1
            parts.append(data[at + 1])
            at += 2
            continue
        elif code == 0x8A and data[at + 1] <= 8 and at + 2 + data[at + 1] < len(data):  # LONG1
            end = at + 2 + data[at + 1]
            parts.append(int.from_bytes(data[at + 2 : end], "little", signed=True))
            at = end
            continue
        else:
            return None
        if place < 2 and not 0 < end - begin < 256:
            return None
        parts.append(data[begin:end].decode())
        if framed:  # MEMOIZE
            at = end + 1
            if data[end] != 0x94:
                return None
        else:  # BINPUT
            at = end + 2
            if data[end] != 0x71 or data[end + 1] != strings:
                return None
            strings += 1
    # TUPLE3, its place in the memo, STOP
    return tuple(parts) if data[at:] == (b"\x87\x94." if framed else b"\x87q%c." % strings) else None


class _Bounded:
    """A file that is asked for no more than there may be: readers allocate what a length says before they look."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file, self._left = file, left

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise pickle.UnpicklingError(f"it is longer than the {self._left:,} bytes there may be")
        self._left -= size
        if size <= 1 << 20:
            return self._file.read(size)
        # In pieces: a length beyond the end of the file takes no memory.
        parts = []
        while size and (part := self._file.read(min(size, 1 << 20))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def readline(self) -> bytes:
        line = self._file.readline(min(LONGEST_LINE, self._left))
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise pickle.UnpicklingError("a line in it has no end")
        return line
