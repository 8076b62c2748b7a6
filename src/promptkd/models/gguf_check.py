"""A GGUF file, walked through once before `gguf` reads it: every size it states must fit into the file.

`gguf` believes them, and would count to 2^60 behind the end of a torn file.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from promptkd.errors import RequestError

__all__ = ["check_gguf"]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number; 8 is a text, 9 an array."""
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS, _MOST_NAME_BYTES = 8, 65_535


class _TornError(Exception):
    """What is wrong with the file."""


def check_gguf(path: Path) -> None:
    """Raises `RequestError` if `path` is no GGUF file, is torn, or states sizes that it does not have."""
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).whole()
    except _TornError as error:
        raise RequestError(f"{path} is no whole GGUF file: {error}. Download or write it anew.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error


class _Walk:
    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def whole(self) -> None:
        if self._take(4) != b"GGUF":
            raise _TornError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _TornError(f"it is of version {version}, and 2 and 3 are known")
        tensors, fields = self._number("<Q"), self._number("<Q")
        self._need(24 * tensors + 13 * fields, f"{tensors} tensors and {fields} fields")
        alignment = 32
        for _ in range(fields):
            key = self._text()
            kind = self._number("<I")
            if key == b"general.alignment" and kind == 4:
                alignment = self._number("<I")
            else:
                self._skip_value(kind, nested=False)
        if alignment < 8 or alignment & (alignment - 1):
            raise _TornError(f"its alignment is {alignment}")
        ends = [self._tensor_end() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        end = start + max(ends, default=0)
        if end > self.size:
            raise _TornError(f"its tensors end at byte {end}, and it has {self.size}")

    def _tensor_end(self) -> int:
        self._text()
        dimensions = self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise _TornError(f"a tensor has {dimensions} dimensions")
        count = 1
        for _ in range(dimensions):
            count *= self._number("<Q")
        kind, offset = self._number("<I"), self._number("<Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _TornError(f"a tensor is of type {kind}, which is unknown") from None
        return offset + -(-count // block) * size

    def _skip_value(self, kind: int, *, nested: bool) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _TEXT:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY and not nested:
            item, length = self._number("<I"), self._number("<Q")
            self._need(length * _SIZES.get(item, 8), f"an array of {length}")
            if item in _SIZES:
                self._skip(length * _SIZES[item])
            else:
                for _ in range(length):
                    self._skip_value(item, nested=True)
        else:
            raise _TornError(f"a field is of type {kind}, which is unknown")

    def _text(self) -> bytes:
        length = self._number("<Q")
        if length > _MOST_NAME_BYTES:
            raise _TornError(f"a name has {length} bytes")
        return self._take(length)

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        self._need(count, f"{count} bytes")
        return self.file.read(count)

    def _skip(self, count: int) -> None:
        self._need(count, f"{count} bytes")
        self.file.seek(count, 1)

    def _need(self, count: int, what: str) -> None:
        at = self.file.tell()
        if at + count > self.size:
            raise _TornError(f"at byte {at} it states {what}, and it ends at byte {self.size}")
