"""Reads texts as UTF-8, with or without a byte-order mark, and JSON; what is encoded or written otherwise is refused with its place."""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


# The bytes of a file from the first to the one before the second. It holds the rows whose first byte is among them.
Span = tuple[int, int]

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

_OTHER_KINDS = {
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save the spreadsheet as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet", "save it as CSV in UTF-8"),
    b"PAR1": ("a Parquet file", "give it the ending .parquet"),
}


def read_lines(path: str | Path, span: Span | None = None) -> Iterator[str]:
    """The lines of a file, or of a span of it, each with its line ending.

    Raises:
        FileNotFoundError: If there is no such file, or it is a pipe or a device, which could be waited for without an end.
        ValueError: If it is not encoded as UTF-8; names the line and byte, and how to convert it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            begin, stop = (0, None) if span is None else (_line_begin(file, byte) for byte in span)
            file.seek(begin)
            part = file if stop is None else io.BufferedReader(_Bytes(file, stop - begin))
            lines = io.TextIOWrapper(part, encoding="utf-8" if begin else "utf-8-sig", newline="")
            for number, line in enumerate(lines, 1):
                if "\0" in line:
                    encoding = "UTF-16BE" if line.startswith("\0") else "UTF-16LE"
                    raise _no_text(path, f"{line_name(number, span)} holds a zero byte", encoding)
                yield line
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def line_name(number: int, span: Span | None = None) -> str:
    """What messages call the line `number` of a file or of a span, counted from 1: nobody has counted the lines before a span."""
    return f"line {number}" if span is None else f"line {number} from byte {span[0]}"


def _line_begin(file: BinaryIO, byte: int) -> int:
    """Where the first line begins that begins at `byte` or behind it."""
    if byte == 0:
        return 0
    file.seek(byte - 1)
    while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass
    return file.tell()


class _Bytes(io.RawIOBase):
    """The next `size` bytes of `file`."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._size))
        self._size -= len(data)
        buffer[: len(data)] = data
        return len(data)


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. ValueError that begins with `where` if it is none, an object has a key twice, or it is nested too deep."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a surrogate pair, which is not a character") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _not_utf8(path: str | Path) -> ValueError:
    """Says where `path` stops being UTF-8."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                for mark, encoding in _MARKS.items():
                    if line.startswith(mark):
                        return _no_text(path, f"line 1 begins with the mark of {encoding}", encoding)
            try:
                line.decode()
            except UnicodeDecodeError as error:
                place = f"line {number}, byte {error.start + 1} is 0x{line[error.start]:02X}"
                return _no_text(path, place, "WINDOWS-1252")
    return ValueError(f"{path} changed while it was read")


def _no_text(path: str | Path, place: str, encoding: str) -> ValueError:
    """The error of a file that is not UTF-8, at `place`: a file of another kind, or a text that is most likely in `encoding`."""
    with open(path, "rb") as file:
        head = file.read(8)
    for mark, (kind, remedy) in _OTHER_KINDS.items():
        if head.startswith(mark):
            return ValueError(f"{path} is not text but {kind}: {remedy}")
    remedy = f"Convert it: iconv -f {encoding} -t UTF-8 {path} > NEW"
    if encoding == "WINDOWS-1252":  # which any bytes may be
        remedy += " (WINDOWS-1252 is Western Europe's: give the encoding that it was saved in)"
    return ValueError(f"{path} is not encoded as UTF-8: {place}. {remedy}")
