"""What tests wait for, instead of for some time: a loaded machine may be late by any."""

import time
import warnings

import numpy as np


def until(test, what, limit=60.0):
    """Wait until `test()`, without entering MPI; fails after `limit` seconds, which is only against hangs."""
    before = time.monotonic()
    while not test():
        assert time.monotonic() - before < limit, what
        time.sleep(1e-3)


def until_near(opt, target, atol, most=20):
    """Yield for one loop more until the center is that near to `target`: how stale commits are, nobody knows."""
    for _ in range(most):
        yield
        (center,) = opt.center.values()  # the same on every rank
        if np.allclose(center, target, rtol=0, atol=atol):
            return
    np.testing.assert_allclose(center, target, rtol=0, atol=atol)


def touch_when_said(monkeypatch, path, text):
    """Make the file `path` when this process warns of `text`, for the processes that wait until it has."""
    warn = warnings.warn

    def told(message, *given, **options):
        warn(message, *given, **options)
        if text in str(message):
            path.touch()

    monkeypatch.setattr(warnings, "warn", told)
