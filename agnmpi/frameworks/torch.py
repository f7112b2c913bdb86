"""PyTorch: a model and its optimizer, trained over MPI in the loop that is there already."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from ..arrays import kernels
from ..arrays.backend import Array
from ..cluster.placement import check_world
from ..core.optimizers import Optimizer
from ..core.rules import Rule
from ..loops.agn_optimizer import AGNOptimizer
from ..loops.monitoring import Monitoring
from ..recovery.files import replacing
from ..transport.agreement import raise_on_all
from ..transport.registry import Transport
from .flat_model import FlatModel
from .launcher import hide_launcher_from_children
from .run import Run as AnyRun
from .torch_optimizer import Schedule, check_kinds, packed, reset_of, unpacked, unwrapped, was_skipped

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
        stateful: other objects with `state_dict` and `load_state_dict`, such as a GradScaler, that checkpoints hold of
            each worker beside the optimizer, the scheduler, random generators and the place in the data.
        rule, center_optimizer, outer_rate, transport, overlap, wait, dylu, checkpoint, resume, checkpoint_every,
            checkpoint_workers: as of `AGNOptimizer`. Where a run has ended there is `checkpoint`/model.pt, too:
            `model.load_state_dict(torch.load("ckpt/model.pt"))`.
        monitor: as of `AGNOptimizer`: what `agnmpi train` shows and writes. Its `evaluate` is given the model, which
            holds the center.

    Raises:
        TypeError: for what is not a model, an optimizer or a scheduler of this kind.
        ValueError: for models that differ between ranks, or that cannot be trained.

    BatchNorm's running means, and other buffers of finite floating numbers, are averaged at the center; with
    `num_batches_tracked`, the steps of the run, they are the same on all ranks after a pull. A commit that holds NaN is
    refused: its worker goes on from the center, with an optimizer that has forgotten its moments.
    """

    _steps_by = "optimizer.step()"

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        comm: MPI.Intracomm,
        period: int = 10,
        *,
        scheduler: Any = None,
        rule: Rule | None = None,
        center_optimizer: Optimizer | None = None,
        outer_rate: float | None = None,
        transport: str | Transport = "auto",
        overlap: bool = False,
        wait: bool = True,
        dylu: bool = False,
        stateful: Sequence[Any] = (),
        checkpoint: str | Path | None = None,
        resume: str | Path | None = None,
        checkpoint_every: float = 300.0,
        checkpoint_workers: str = "auto",
        monitor: Monitoring | str | Path | None = None,
    ) -> None:
        self.model, self.optimizer = model, unwrapped(optimizer, "optimizer")
        check_world(comm)
        ours = comm.Dup()
        try:
            raise_on_all(ours, lambda: check_kinds(model, self.optimizer))
            self._schedule = raise_on_all(ours, lambda: scheduler and Schedule(scheduler, self.optimizer))
            self._flat = FlatModel(model, self.optimizer, ours)
            self._stateful = raise_on_all(ours, lambda: _checked(stateful))
        finally:
            ours.Free()
        self._reset = reset_of(self.optimizer)
        parts = self._flat.parts()
        opt = AGNOptimizer(
            None, parts, comm, period, name="agnmpi.torch.Run", copy=False, buffers=sorted(set(parts) - {"parameters"}),
            rule=rule, center_optimizer=center_optimizer, outer_rate=outer_rate, transport=transport, overlap=overlap,
            wait=wait, dylu=dylu,
            on_commit=self._read, on_pull=self._pulled, on_refused=self._refused,
            checkpoint=checkpoint, resume=resume, checkpoint_every=checkpoint_every,
            checkpoint_workers=checkpoint_workers, state=self._state, load_state=self._resumed_with,
            monitor=self._monitoring(monitor), tensors=self._flat.tensors,
        )  # fmt: skip
        super().__init__(opt, period, checkpoint)
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

    def _finish(self) -> None:
        super()._finish()
        self._flat.count(self._opt.taken)
        # Else a scheduler that the script steps next warns on ranks where others have taken the steps.
        self.optimizer._opt_called = True

    def _own_state(self) -> dict[str, Array]:
        states = {
            "kind": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._schedule and self._schedule.state(),
            "stateful": [each.state_dict() for each in self._stateful],
            "local": self._flat.local(),
        }
        return {"torch": packed(states)}

    def _set_own_state(self, saved: Mapping[str, Array], within: bool) -> None:
        states = unpacked(saved["torch"])
        if len(states["stateful"]) != len(self._stateful):
            raise ValueError(
                f"the checkpoint holds {len(states['stateful'])} objects that were given as `stateful`, but there are "
                f"{len(self._stateful)} now"
            )
        kind = type(self.optimizer).__name__
        if (saved_kind := states.get("kind", kind)) != kind:
            raise ValueError(f"the checkpoint's optimizer is {saved_kind}, not {kind}: what it has stored does not fit")
        self._flat.set_local(states["local"])
        if not within and not self._schedule:  # the script itself has changed the rates between loops, and does again
            states["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(states["optimizer"])
        if self._schedule and states["scheduler"]:
            self._schedule.restore(states["scheduler"])
        for each, state in zip(self._stateful, states["stateful"]):
            each.load_state_dict(state)

    def _randomness(self, loader: Any = None) -> dict[str, Array]:
        states = {"torch": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state()
        states |= {f"loader {i}": each.get_state() for i, each in enumerate(_generators(loader))}
        return super()._randomness() | {name: state.numpy() for name, state in states.items()}

    def _set_randomness(self, states: Mapping[str, Array], loader: Any = None) -> None:
        super()._set_randomness(states)
        own = {name: torch.tensor(state) for name, state in states.items()}
        torch.set_rng_state(own["torch"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"])
        for i, generator in enumerate(_generators(loader)):
            generator.set_state(own[f"loader {i}"])

    def _write(self, directory: str | Path) -> None:
        """The model, with torch's names, at rank 0."""
        if self._opt.comm.rank:
            return
        model = getattr(self.model, "_orig_mod", self.model)  # of torch.compile
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with replacing(Path(directory) / "model.pt") as file:
                torch.save(model.state_dict(), file)
        except OSError as error:
            warnings.warn(f"agnmpi.torch.Run: model.pt could not be written: {error}", RuntimeWarning, stacklevel=3)

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
        if self._opt.worker > 0:
            torch.manual_seed(torch.initial_seed() + self._opt.worker)


def _checked(stateful: Sequence[Any]) -> Sequence[Any]:
    """Raises TypeError for what has no state to save."""
    for each in stateful:
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise TypeError(f"stateful: {type(each).__name__} has no state_dict and load_state_dict")
    return stateful


def _generators(loader: Any) -> list[torch.Generator]:
    """Those of a DataLoader's own."""
    sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), sampler, getattr(sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
