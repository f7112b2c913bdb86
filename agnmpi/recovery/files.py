"""Files that are whole or not there: written under a temporary name, flushed to disk, renamed."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..arrays.backend import Array, to_host


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path`; whoever reads sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, arrays: Mapping[str, Array], facts: Mapping[str, str]) -> None:
    """Write named arrays, and `facts` about them, as a safetensors file."""
    from safetensors.numpy import save as encode

    host = {name: np.ascontiguousarray(to_host(x)) for name, x in arrays.items()}
    write_atomic(path, encode(host, metadata=dict(facts)))


def load(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read back what `save` wrote: the arrays and the facts. Raises ValueError for a file that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
