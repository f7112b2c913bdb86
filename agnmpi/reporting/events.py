"""A file of one JSON object per line."""

import json
import time
from math import isfinite
from pathlib import Path
from typing import Any


def json_safe(value: Any) -> Any:
    """Return `value` with NaN and infinities, which JSON lacks, as None.

    >>> json_safe({"loss": float("nan"), "steps": [1, 2.5]})
    {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


class JsonLines:
    """A file of one JSON object per line; each line is flushed, so a killed run leaves complete lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._start = time.monotonic()

    def write(self, event: str, **values: Any) -> None:
        """Append an event with the time (seconds since 1970) and the seconds since the start."""
        stamp = {"event": event, "time": round(time.time(), 3), "seconds": self.seconds()}
        self._file.write(json.dumps(json_safe(stamp | values), allow_nan=False) + "\n")
        self._file.flush()

    def seconds(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._start, 3)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
