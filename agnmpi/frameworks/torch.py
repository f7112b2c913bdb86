"""PyTorch: a model and its optimizer, trained over MPI in the loop that is there already."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from mpi4py import MPI

from ..arrays import kernels
from ..arrays.backend import Array
from ..core.rules import Rule
from ..loops.agn_optimizer import AGNOptimizer
from ..transport.agreement import raise_on_all
from ..transport.registry import Transport
from .flat_model import FlatModel
from .launcher import hide_launcher_from_children
from .run import Run as AnyRun
from .torch_optimizer import Schedule, reset_of, unwrapped, was_skipped

hide_launcher_from_children()


class Run(AnyRun):
    """Train `model` with `optimizer` over the ranks of `comm`: the loop's body stays as it is.

    Each worker takes λ steps of its own optimizer, commits (x − o)/λ, and takes the center. Rank 0 holds the center:
    its loop over `batches` serves, and yields nothing. The same script runs on every rank.

    Args:
        model: a module on the device of this rank. Its parameters and buffers lie in one vector from now on: convert
            and move it before, wrap it (torch.compile) before its first call or after.
        optimizer: of torch, over the model's parameters. Those that it does not move, or that need no gradient, are
            taken from rank 0 now, and never sent again.
        comm: any communicator; it is duplicated. Rank 0's numbers are those that all begin with.
        period: λ, steps between exchanges; default 10.
        scheduler: of the rate by the step, moved by the steps of all workers; its own `step()` does nothing meanwhile.
        rule, outer_rate, transport, overlap, wait, dylu: as of `AGNOptimizer`.

    Raises:
        TypeError: for what is not a model, an optimizer or a scheduler of this kind.
        ValueError: for models that differ between ranks, or that cannot be trained.

    BatchNorm's running means, and other buffers of finite floating numbers, are averaged at the center; with
    `num_batches_tracked`, the steps of the run, they are the same on all ranks after a pull. A commit that holds NaN is
    refused: its worker goes on from the center, with an optimizer that has forgotten its moments.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        comm: MPI.Intracomm,
        period: int = 10,
        *,
        scheduler: Any = None,
        rule: Rule | None = None,
        outer_rate: float | None = None,
        transport: str | Transport = "auto",
        overlap: bool = False,
        wait: bool = True,
        dylu: bool = False,
    ) -> None:
        self.model, self.optimizer = model, unwrapped(optimizer, "optimizer")
        ours = comm.Dup()
        try:
            self._schedule = raise_on_all(ours, lambda: scheduler and Schedule(scheduler))
            self._flat = FlatModel(model, self.optimizer, ours)
        finally:
            ours.Free()
        self._reset = reset_of(self.optimizer)
        parts = self._flat.parts()
        opt = AGNOptimizer(
            None, parts, comm, period, name="agnmpi.torch.Run", copy=False, buffers=sorted(set(parts) - {"parameters"}),
            rule=rule, outer_rate=outer_rate, transport=transport,
            overlap=overlap, wait=wait, dylu=dylu, on_commit=self._read, on_pull=self._pulled, on_refused=self._refused,
        )  # fmt: skip
        super().__init__(opt, period)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(kernels.threads())
        self._own_randomness(comm)
        self._hook = self.optimizer.register_step_post_hook(self._stepped)

    def _turn(self, step: int) -> None:
        if self._schedule:
            self._schedule.advance(step)

    def _holding(self, x: Array) -> AbstractContextManager[Any]:
        return self._flat.holding(x)

    def close(self) -> None:
        """End it; collective. The model keeps the center; optimizer and scheduler are the caller's again."""
        self._hook.remove()
        if self._schedule:
            self._schedule.release()
        torch.set_num_threads(self._threads)
        super().close()

    def _stepped(self, *_: object) -> None:
        """The optimizer has taken a step."""
        if not was_skipped(self.optimizer):
            self._step()

    def _read(self, _opt: AGNOptimizer) -> None:
        self._flat.pack()

    def _pulled(self, opt: AGNOptimizer) -> None:
        self._flat.unpack()
        self._flat.count(opt.taken)

    def _refused(self, _opt: AGNOptimizer) -> None:
        self._reset()

    def _own_randomness(self, comm: MPI.Intracomm) -> None:
        """Let workers with one seed shuffle and drop out in ways of their own; the first goes on as it would alone."""
        index = comm.rank - (comm.size - self._opt.num_workers)
        if index > 0:
            torch.manual_seed(torch.initial_seed() + index)
