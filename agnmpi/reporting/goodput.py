"""What losses have cost a run."""

from collections.abc import Iterable, Mapping
from typing import Any

_SETTLED = 5.0  # seconds after which a run counts as undisturbed again
_YARDSTICK = 5.0  # undisturbed seconds that it takes to say how fast a worker is
_CHANGES = ("start", "lost", "joined", "failover", "alone")  # of the number of workers, which each says


def goodput(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Steps that are in the center, over what the workers alive at each time could have taken undisturbed.

        steps / (r · Σ workers · seconds),  r: steps/s of a worker, in all stretches without a loss

    The interval before the last progress is in none of them: at a run's end workers may have had nothing to do.

    Time counts up to the last progress, also while one center follows another; not between a job's end and its resume.

    Args:
        events: of a run, as in events.jsonl.

    Returns:
        A number up to about 1; None where none was lost, and where less than 5 s were undisturbed.
    """
    workers = steps = 0
    losses = False
    capacity = until_progress = gap = 0.0  # worker-seconds: so far, at the last progress, before the last start
    calm = [0.0, 0.0, 0.0]  # the undisturbed stretches: steps, worker-seconds, seconds
    newest = [0.0, 0.0, 0.0]  # likewise, up to the last progress: not yet among them
    then = calm_from = 0.0
    last: Mapping[str, Any] | None = None  # progress, in this stretch
    for event in events:
        kind, now = event["event"], float(event["time"])
        passed, then = workers * (now - then), now
        if kind == "start":
            gap, passed = passed, 0.0
        capacity += passed + (gap if kind == "failover" else 0.0)
        if kind in _CHANGES:
            workers = int(event.get("workers", workers))  # 0.4.0 did not say
            calm_from, last = now + _SETTLED, None
            losses |= kind in ("lost", "failover")
        elif kind == "progress":
            steps, until_progress = event["step"], capacity
            calm, newest = [sum(pair) for pair in zip(calm, newest)], [0.0, 0.0, 0.0]
            if last is not None:
                seconds = now - last["time"]
                newest = [steps - last["step"], workers * seconds, seconds]
            last = event if now >= calm_from else None
    calm_steps, calm_capacity, calm_seconds = calm
    if not (losses and calm_steps and until_progress) or calm_seconds < _YARDSTICK:
        return None
    return steps * calm_capacity / (calm_steps * until_progress)
