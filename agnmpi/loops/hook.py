"""A loop of your own that is driven by callbacks."""

from collections.abc import Generator


class Hook:
    """Callbacks for a training loop: begin, after each step, end.

    >>> def loop(step, hook):
    ...     hook.begin()  # on a center rank: serves until the workers are done
    ...     while not hook.should_stop():
    ...         step()
    ...         hook.after_step()
    ...     hook.end()
    """

    def __init__(self, steps: Generator[int, None, None]) -> None:
        self._steps = steps
        self.step_number: int | None = None

    def begin(self) -> None:
        """Start from the center."""
        self.step_number = next(self._steps, None)

    def after_step(self) -> None:
        """Call it after each `minimize`, `apply_gradients` or `step`."""
        self.step_number = next(self._steps, None)

    def should_stop(self) -> bool:
        """Whether no step is left for this rank."""
        return self.step_number is None

    def end(self) -> None:
        """Commit the steps done, and leave."""
        self.step_number = None
        self._steps.close()
