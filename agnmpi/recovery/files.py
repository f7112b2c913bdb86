"""Atomic files: written under a temporary name, flushed to disk, renamed."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np

from ..arrays.backend import Array, current, on_host, to_host

_CHUNK = 8 << 20  # bytes per write: large, so that the interpreter's lock is rarely needed
Shapes: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of each array, by name
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}


class Digest(Protocol):
    """A running checksum (`hashlib`)."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Continue with `data`."""

    def hexdigest(self) -> str:
        """The checksum so far."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` at the end; readers see the old file or the new one.

    If the block raises, `path` is unchanged. The temporary name cannot be guessed, and links are not followed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_directory(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # of a full disk it names none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _flush_directory(directory: Path) -> None:
    """Without this a power failure may lose the new name, though the file's bytes are on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush directories
            raise
    finally:
        os.close(descriptor)


class LineFile:
    """A file to which whole lines are appended, whatever the disk does.

    What cannot be written (a full disk) is said once, and again when it is over; training goes on. A line of which a
    part was written is taken back. If the file is removed, it is made again, with its directory.

    Args:
        path: the file.
        say: called with each message.

    Raises:
        OSError: at first, where it cannot be opened.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._file = path.open("ab", buffering=0)
        self._missing = 0  # lines, since the last that was written

    def write(self, line: str) -> int:
        """Append a line; returns how many before it are missing, if it is the first after these."""
        try:
            if not os.fstat(self._file.fileno()).st_nlink:
                self._make_again()
            self._append(line.encode())
        except OSError as error:
            if not self._missing:
                self._say(f"WARNING: {self._path} cannot be written ({error}); training goes on")
            self._missing += 1
            return 0
        missing, self._missing = self._missing, 0
        if missing:
            self._say(f"{self._path} can be written again; {missing} of its lines are missing")
        return missing

    def _make_again(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = file
        self._say(f"WARNING: {self._path} was removed; it is made again, without its earlier lines")

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        if self._file.write(data) != len(data):
            os.ftruncate(self._file.fileno(), before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: readers see the old file or the new one."""
    with replacing(path) as file:
        file.write(content)


def save(path: Path, arrays: Mapping[str, Array], facts: Mapping[str, str], digest: Digest | None = None) -> None:
    """Write named arrays, and `facts` as metadata, to a safetensors file, without a second copy of any array.

    The safetensors package is not used here: some of its versions copy each array first, and it replaces the given
    file by another. In a thread this holds the interpreter's lock only between two chunks.

    Args:
        path: the file.
        arrays: contiguous ones are written in place, those on a device chunk by chunk.
        facts: the metadata.
        digest: updated, in order of the names, with name, type, shape and bytes of each array; the result is stored
            in the metadata, as `sha256`.

    Raises:
        OSError: from the file system; an earlier file stays.
    """
    names = sorted(arrays)
    with replacing(path) as file:
        file.write(_header(arrays, names, {**facts, **({"sha256": "0" * 64} if digest else {})}))
        for name in names:
            x = arrays[name]
            if digest:
                digest.update(signature(name, x))
            for chunk in chunks(x):
                file.write(chunk)
                if digest:
                    digest.update(chunk)
        if digest:  # known only now; of the same length as the placeholder
            file.seek(0)
            file.write(_header(arrays, names, {**facts, "sha256": digest.hexdigest()}))


def signature(name: str, x: Array) -> bytes:
    """What a checksum covers of an array beside its bytes."""
    return f"{name} {x.dtype} {x.shape}".encode()


def chunks(x: Array) -> Iterator[memoryview]:
    """The bytes of `x`, in order, some megabytes at a time; a device's are copied to the host one by one."""
    flat = np.ascontiguousarray(x).reshape(-1) if on_host(x) else x.reshape(-1)
    step = max(1, _CHUNK // x.itemsize)
    with current(x):  # each thread has its own current device
        for start in range(0, flat.size, step):
            yield to_host(flat[start : start + step]).view(np.uint8).data


def _header(arrays: Mapping[str, Array], names: list[str], facts: Mapping[str, str]) -> bytes:
    """The header of a safetensors file: the length of a JSON text, and that text."""
    header: dict[str, object] = {"__metadata__": dict(facts)}
    start = 0
    for name in names:
        x = arrays[name]
        header[name] = {"dtype": _DTYPES[x.dtype.name], "shape": x.shape, "data_offsets": [start, start + x.nbytes]}
        start += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not stat.S_ISREG(path.lstat().st_mode):  # a FIFO would block for ever
        raise ValueError(f"{path} is no file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def load(path: Path, check: Callable[[Shapes], None] | None = None) -> tuple[dict[str, Array], dict[str, str]]:
    """Read what `save` wrote: the arrays and the facts. Raises ValueError for a file that is not whole.

    `check` is called before any array is read, and may raise ValueError.
    """
    with _opened(path) as file:
        names = list(file.keys())
        pieces = {name: file.get_slice(name) for name in names}
        shapes = {name: (str(piece.get_dtype()), tuple(piece.get_shape())) for name, piece in pieces.items()}
        if odd := [dtype for dtype, _ in shapes.values() if dtype not in _DTYPES.values()]:
            raise ValueError(f"{path} has an array of type {odd[0]}")
        if check is not None:
            check(shapes)
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def load_facts(path: Path) -> dict[str, str]:
    """Read the facts alone. Raises ValueError for a file that is not whole."""
    with _opened(path) as file:
        return dict(file.metadata() or {})
