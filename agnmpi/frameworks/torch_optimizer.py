"""A PyTorch optimizer and its schedule in a run: the state that a refused commit has spoilt, the position of η."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..arrays.backend import Array


def unwrapped(wrapper: Any, inner: str) -> Any:
    """What `wrapper` wraps in its attribute `inner`, if that has as many steps: Accelerate, Lightning."""
    while hasattr(getattr(wrapper, inner, None), "step"):
        wrapper = getattr(wrapper, inner)
    return wrapper


def check_kinds(model: Any, optimizer: Any) -> None:
    """Raise TypeError for what is not torch's."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not hasattr(optimizer, "register_step_post_hook"):
        raise TypeError(f"optimizer must be one of torch.optim, not {type(optimizer).__name__}")


def reset_of(optimizer: Any) -> Callable[[], None]:
    """What gives `optimizer` the state back that it has now: none, where it makes its state at its first step."""
    if not optimizer.state:
        return lambda: optimizer.state.clear()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return lambda: optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(state)})


def was_skipped(optimizer: Any) -> bool:
    """Whether the step that is being taken changes nothing: a GradScaler has found infinity, the kernel looks there."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


class Schedule:
    """A scheduler of torch, moved by the steps of the run. Its own `step` does nothing meanwhile.

    Raises:
        TypeError: for no scheduler, or one that follows a metric.
        ValueError: for one of another optimizer.
    """

    def __init__(self, scheduler: Any, optimizer: Any) -> None:
        self.scheduler = unwrapped(scheduler, "scheduler")
        if hasattr(self.scheduler, "param_groups") or not hasattr(self.scheduler, "step"):
            raise TypeError(f"scheduler must be one of torch.optim.lr_scheduler, not {type(scheduler).__name__}")
        if unwrapped(getattr(self.scheduler, "optimizer", optimizer), "optimizer") is not optimizer:
            raise ValueError("scheduler moves the rate of another optimizer than the one that is given")
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise TypeError("ReduceLROnPlateau follows a metric, not steps: leave it out, and call its step(metric)")
        self._step, self.at = self.scheduler.step, 0
        self.scheduler.step = _do_nothing

    def advance(self, step: int) -> None:
        """Go on to the rate of the step with this number; never back, where steps are granted again."""
        if step <= self.at:
            return
        with warnings.catch_warnings():
            # It warns where it is moved before its optimizer, as it is on all workers but the first.
            warnings.simplefilter("ignore", UserWarning)
            while self.at < step:
                self._step()
                self.at += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"at": self.at} | {name: x for name, x in self.scheduler.state_dict().items() if name != "step"}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned; the rates themselves are the optimizer's."""
        self.at = state.pop("at")
        self.scheduler.load_state_dict(state)

    def release(self) -> None:
        """Let the scheduler move by its own `step` again."""
        self.scheduler.step = self._step


def packed(states: object) -> Array:
    """Tensors and numbers in dictionaries and lists, in the format of `torch.save`."""
    file = io.BytesIO()
    torch.save(states, file)
    return np.frombuffer(file.getbuffer(), np.uint8)


def unpacked(array: Array) -> Any:
    """What was `packed`; on the CPU. No code is run."""
    return torch.load(io.BytesIO(array.tobytes()), map_location="cpu", weights_only=True)


def _do_nothing(*_: object, **__: object) -> None:
    pass
