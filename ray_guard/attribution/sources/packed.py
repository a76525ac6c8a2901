"""The bytes of a log, however it was packed: gzip, zstd, bzip2, xz, tar, UTF-16, Parquet. Runs later, on any machine.

Found out by the first bytes, since names lie; what is packed twice is unpacked twice. An archive's files follow one
another.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from ray_guard.attribution.sources import foreign

DAMAGE: Final = (
    OSError,
    EOFError,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    pa.ArrowException,
)
"""What reading raises where a packed file is cut or damaged."""
_AHEAD: Final = 1 << 18
_LAYERS: Final = 3
_TAR_AT: Final = 257
_BLOCK: Final = 512
_ZSTD_FED: Final = 1 << 12
"""Bytes of zstd that are unpacked at once. A few may stand for very many: 4 KiB for 128 MiB."""


class Foreign(ValueError):
    """A file that holds no lines; what it is instead."""


def unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    """The stream of a log's lines.

    Args:
        file: the log as it lies there, at its begin.
        path: of the same file; Parquet is read from its end.

    Raises:
        Foreign: it is something else.
        One of :data:`DAMAGE`, then or while it is read.
    """
    stream = _layers(file, path)
    if what := foreign.file(_begin(stream)):
        raise Foreign(what)
    return stream


def _layers(file: BinaryIO, path: Path | None) -> BinaryIO:
    """What is inside, all layers down. ``path`` is None within an archive."""
    stream = cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", file), _AHEAD))
    for _ in range(_LAYERS):
        opened = _opened(stream, path)
        if opened is None:
            break
        stream = cast("BinaryIO", io.BufferedReader(opened, _AHEAD))
    return stream


def _begin(stream: BinaryIO) -> bytes:
    return cast("io.BufferedReader", stream).peek(1)


def _opened(stream: BinaryIO, path: Path | None) -> io.RawIOBase | None:
    """What is inside, one layer down; None where the stream is no packing that is known."""
    magic = _begin(stream)
    if magic[:4] == b"PAR1" and path is not None:
        return _Pieces(_rows(path))
    if magic[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and magic[2:4] != b"\0\0":
        return _Pieces(_transcoded(stream))
    if magic[:4] == b"\x28\xb5\x2f\xfd" or magic[1:4] == b"\x2a\x4d\x18":  # a frame, or one to be skipped
        return _Pieces(_zstd(stream))
    if magic[_TAR_AT : _TAR_AT + 5] == b"ustar" and path is not None:
        return _Pieces(_members(stream))
    for begin, opener in _OPENERS:
        if magic.startswith(begin):
            return _Pieces(_read_on(opener(stream)))
    return None


_OPENERS: Final[tuple[tuple[bytes, Callable[[Any], Any]], ...]] = (
    (b"\x1f\x8b", lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)


def _read_on(packed: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> Iterator[bytes]:
    """Piece by piece, so that damage costs nothing of what is before it."""
    while piece := packed.read1(_AHEAD):
        yield piece


def _members(stream: BinaryIO) -> Iterator[bytes]:
    """The files of an archive, each from a line of its own on. Python's own reader takes a damaged one for its end."""
    while block := stream.read(_BLOCK):
        if not any(block):
            continue  # the end, as which nothing need be the last
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        held = _held(stream, header.size)
        if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            piece, inside = b"", _layers(cast("BinaryIO", _Pieces(held)), None)
            while data := inside.read(_AHEAD):
                yield (piece := data)
            if piece and not piece.endswith(b"\n"):
                yield b"\n"
        for _ in held:  # of what is no file, or was not read to its end
            pass
        stream.read(-header.size % _BLOCK)


def _held(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        piece = stream.read(min(size, _AHEAD))
        if not piece:
            raise EOFError("the archive ended before its last file did")
        size -= len(piece)
        yield piece


def _zstd(stream: BinaryIO) -> Iterator[bytes]:
    """All frames of a file. zstandard's own reader takes a cut file for a whole one."""
    frame = None
    while data := stream.read(_ZSTD_FED):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the zstd file ended before its last frame did")


def _transcoded(stream: BinaryIO) -> Iterator[bytes]:
    """UTF-16 as UTF-8: what Windows makes of a redirected output."""
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    while data := stream.read(1 << 16):
        yield decoder.decode(data).encode("utf-8", "replace")
    yield decoder.decode(b"", final=True).encode("utf-8", "replace")


def _rows(path: Path) -> Iterator[bytes]:
    """Parquet's rows as JSON lines, as a cloud's flow logs are stored in a bucket."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=10_000):
            rows = (json.dumps(row, default=str) for row in batch.to_pylist())
            yield "".join(f"{row}\n" for row in rows).encode()


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces of any size."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        size = min(len(buffer), len(self._piece))
        buffer[:size] = self._piece[:size]
        self._piece = self._piece[size:]
        return size
