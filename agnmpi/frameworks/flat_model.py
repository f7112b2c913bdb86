"""A PyTorch model whose numbers lie in one flat vector: what is trained, then its buffers."""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from mpi4py import MPI

from ..arrays.backend import Array, empty
from ..transport.agreement import raise_on_all, require_equal
from ..transport.chunks import bcast_in_pieces

Tensor: TypeAlias = Any  # torch's types are not known to the type checker: it is an extra
_DIGEST = "frozen parameters"  # among the names of buffers, which have no blanks
_ALIGNED = 16  # numbers: 64 bytes, a cache line; kernels read faster from there, and the copies of a GPU need 16 bytes


class Kinds(NamedTuple):
    """The tensors of a model by what becomes of them, by their names in `state_dict`."""

    trained: dict[str, Tensor]  # parameters that the optimizer moves
    averaged: dict[str, Tensor]  # buffers of finite floating numbers, such as BatchNorm's
    constant: dict[str, Tensor]  # all others that are saved: they come from rank 0, once
    counters: dict[str, Tensor]  # num_batches_tracked

    @classmethod
    def of(cls, model: Any, optimizer: Any) -> "Kinds":
        """Read them; raises ValueError or TypeError for what cannot be trained."""
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(model.named_parameters())  # a tied one once
        if strangers := len(moved - {id(p) for p in parameters.values()}):
            raise ValueError(
                f"the optimizer moves {strangers} parameters that are not the model's: give Run a module that holds "
                "them all, such as torch.nn.ModuleList([model, loss])"
            )
        for name, p in parameters.items():
            if hasattr(p, "device_mesh"):
                raise TypeError(f"parameter {name!r} is a DTensor: a model that is sharded by itself cannot be trained")
            if p.is_meta or not p.is_floating_point() or p.is_sparse:
                raise TypeError(
                    f"parameter {name!r} is {p.dtype} on {p.device}: give dense floating numbers that exist"
                )
        trained = {name: p for name, p in parameters.items() if p.requires_grad and id(p) in moved}
        if not trained:
            raise ValueError("the optimizer moves no parameter of the model that requires a gradient")
        saved = set(model.state_dict(keep_vars=True))
        buffers = {name: b for name, b in model.named_buffers() if name in saved}
        counters = {name: b for name, b in buffers.items() if name.rpartition(".")[2] == "num_batches_tracked"}
        averaged = {
            name: b
            for name, b in buffers.items()
            if name not in counters and b.is_floating_point() and bool(torch.isfinite(b).all())
        }
        rest = {name: t for name, t in (parameters | buffers).items() if name not in trained | averaged | counters}
        return cls(trained, averaged, rest, counters)

    def facts(self) -> dict[str, str]:
        """What must be equal on all ranks."""
        return {
            f"tensor {name!r}": f"{kind}, {tuple(t.shape)}, {t.dtype}, strides {_strides(t)}"
            for kind, tensors in self._asdict().items()
            for name, t in tensors.items()
        }


class _Piece(NamedTuple):
    """A tensor of the model and its place."""

    name: str
    tensor: Tensor
    view: Tensor  # of the base, with the tensor's shape and strides
    address: int  # of its memory, if that is the view's; 0 for a tensor that is copied
    error: Tensor  # what rounding has added to the numbers that were last copied from the vector; empty if shared


class FlatModel:
    """The numbers of `model` that `optimizer` trains, and its buffers, in one vector; collective.

    Tensors that lie on the vector's device and have its dtype share its memory from now on: on a CPU, NumPy's and MPI's
    memory is the model's. Others (bfloat16, several devices) are copied at exchanges. On a GPU the vector lies there,
    and `x` is pinned host memory, copied at exchanges on torch's current stream.

    Args:
        model: a module; its tensors are moved, so it must stay on its device with its dtypes.
        optimizer: of torch; what it does not move is sent once, from rank 0, now.
        comm: ours; its rank 0's numbers count.

    Raises:
        ConfigError: for models that differ between ranks, or cannot be trained.

    Attributes:
        x: (n,) the numbers, on the host: float64 if all that are trained are, else float32.
        buffers: how many at the end of x are buffers.
        counters: the tensors num_batches_tracked.
        tensors: what lies in x, in order: shape and strides by name.
    """

    def __init__(self, model: Any, optimizer: Any, comm: MPI.Comm) -> None:
        kinds = raise_on_all(comm, lambda: Kinds.of(model, optimizer))
        trained = kinds.trained.values()
        dtype = torch.float64 if all(p.dtype == torch.float64 for p in trained) else torch.float32
        devices = {p.device for p in trained}
        self._device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        facts = {name: text for name, text in kinds.facts().items() if "averaged" not in text}
        require_equal(comm, facts | {"buffers": ", ".join(kinds.averaged)})
        for tensor in (*kinds.constant.values(), *kinds.averaged.values(), *kinds.counters.values()):
            _broadcast(comm, tensor)
        self.counters = list(kinds.counters.values())
        self.tensors = {
            name.replace("_orig_mod.", ""): f"{tuple(t.shape)}, strides {_strides(t)}"  # torch.compile's
            for name, t in (kinds.trained | kinds.averaged).items()
        }
        parameters = {name for name, _ in model.named_parameters()}
        self._frozen = {name: t for name, t in kinds.constant.items() if name in parameters}
        self._local = {name: t for name, t in kinds.constant.items() if name not in parameters}
        self._optimizer, self._model = optimizer, model
        self._moved = sum(len(group["params"]) for group in optimizer.param_groups)

        places, self._parameters = _places(kinds.trained, 0)
        more, size = _places(kinds.averaged, self._parameters)
        self.buffers = size - self._parameters
        self._host = _host_vector(size, dtype, self._device)
        self.x: Array = self._host.numpy()
        self._base = self._host if self._device.type == "cpu" else torch.zeros(size, dtype=dtype, device=self._device)
        self._pieces = [
            self._bind(name, tensor, place)
            for found, tensors in ((places, kinds.trained), (more, kinds.averaged))
            for (name, tensor), place in zip(tensors.items(), found)
        ]
        self._copied = [piece for piece in self._pieces if not piece.address]
        self._owners = {name: _owner(model, name) for name in kinds.trained | kinds.averaged}
        self._to_host()

    def _bind(self, name: str, tensor: Tensor, place: slice) -> _Piece:
        view = self._base[place][: tensor.numel()].as_strided(tensor.shape, _strides(tensor))
        view.copy_(tensor.detach())
        if tensor.dtype == self._base.dtype and tensor.device == self._device:
            tensor.data = view
            return _Piece(name, tensor, view, view.data_ptr(), torch.empty(0))
        return _Piece(name, tensor, view, 0, torch.zeros_like(view))

    def parts(self) -> dict[str, Array]:
        """The parts of `x` by name: "parameters", which gradients move, and "buffers", if there are any."""
        parts = {"parameters": self.x[: self._parameters], "buffers": self.x[self._parameters :]}
        return {name: part for name, part in parts.items() if part.size}

    def pack(self) -> None:
        """Let `x` hold the model's numbers; raises RuntimeError for a model that was changed in another way.

        Of a tensor with fewer digits (bfloat16) without what rounding had added to a center when it was unpacked: a
        commit x − o then holds local steps alone, and a center that comes back has lost nothing.
        """
        self.check()
        for _, tensor, view, _, error in self._copied:
            own = tensor.detach().to(view)
            torch.sub(own, error, out=view)
            # Numbers that were written anew, not moved by steps, are what they are.
            view.copy_(torch.where(view.to(tensor.dtype) == own, view, own))
        self._to_host()

    def unpack(self) -> None:
        """Let the model hold the numbers of `x`, in its own dtypes."""
        if self._base is not self._host:
            self._base.copy_(self._host, non_blocking=True)
        for _, tensor, view, _, error in self._copied:
            tensor.detach().copy_(view)
            torch.sub(tensor.detach(), view, out=error)

    def _to_host(self) -> None:
        if self._base is not self._host:
            self._host.copy_(self._base, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def holding(self, x: Array) -> Generator[Any, None, None]:
        """Within it the model holds the numbers `x` (n,), afterwards its own again, bit by bit."""
        with torch.no_grad():
            own = [self._host.clone(), *(t.detach().clone() for t in self._tensors())]
            self._host.copy_(torch.from_numpy(x))
            self.unpack()
            try:
                yield self._model
            finally:
                for tensor, saved in zip((self._host, *self._tensors()), own):
                    tensor.detach().copy_(saved)

    def _tensors(self) -> list[Tensor]:
        """All beside the host's vector that hold numbers: the vector on a device, copied tensors, their errors."""
        base = [] if self._base is self._host else [self._base]
        return base + [t for _, tensor, _, _, error in self._copied for t in (tensor, error)] + self.counters

    def check(self) -> None:
        """Raise RuntimeError for a tensor that was rebound, or what the optimizer moves since."""
        for name, tensor, _, address, _ in self._pieces:
            owner, leaf = self._owners[name]
            now = getattr(owner, leaf)
            if now is not tensor or (address and now.data_ptr() != address):
                raise RuntimeError(
                    f"{name!r} is not where it was when agnmpi.torch.Run was made: model.double(), .to(), .cuda() or a "
                    "load with assign=True has rebound it; do that before, or copy numbers into it (load_state_dict)"
                )
        if self._moved != sum(len(group["params"]) for group in self._optimizer.param_groups):
            raise RuntimeError(
                "the optimizer has other parameters than when agnmpi.torch.Run was made: close it, and make another"
            )

    def local(self) -> dict[str, Tensor]:
        """What this rank alone has: buffers that are not averaged, and which frozen parameters it has found."""
        whole = hashlib.sha256()
        for name, tensor in self._frozen.items():
            whole.update(name.encode() + _bytes(tensor).data)
        return self._local | {_DIGEST: torch.frombuffer(bytearray(whole.digest()), dtype=torch.uint8)}

    def set_local(self, saved: dict[str, Tensor]) -> None:
        """Put back what `local` returned. Raises ValueError where the frozen parameters are others."""
        if not torch.equal(saved[_DIGEST], self.local()[_DIGEST]):
            raise ValueError(
                f"the frozen parameters ({', '.join(self._frozen)}) are not those that the checkpoint's run had: make "
                "them by a seed, or load them (model.pt has them), before agnmpi.torch.Run"
            )
        with torch.no_grad():
            for name, tensor in self._local.items():
                tensor.copy_(saved[name])

    def count(self, steps: int) -> None:
        """Set num_batches_tracked."""
        for tensor in self.counters:
            tensor.fill_(steps)


def _owner(model: Any, name: str) -> tuple[Any, str]:
    """The module that has the tensor `name`, and its name there."""
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of a dense tensor in the order of `tensor`, which keeps channels_last."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def _places(tensors: dict[str, Tensor], start: int) -> tuple[list[slice], int]:
    """The place of each tensor from `start` on, with the numbers behind it up to the next; and the end of all."""
    places = []
    for tensor in tensors.values():
        stop = start + -(-tensor.numel() // _ALIGNED) * _ALIGNED
        places.append(slice(start, stop))
        start = stop
    return places, start


def _host_vector(size: int, dtype: Any, device: Any) -> Tensor:
    """A tensor (size,) of zeros in host memory that MPI reads and writes; pinned for a GPU."""
    if device.type == "cuda":
        return torch.zeros(size, dtype=dtype, pin_memory=True)
    x = empty(size, {torch.float32: "f4", torch.float64: "f8"}[dtype], np.empty(0))
    x[:] = 0
    return torch.from_numpy(x)


def _broadcast(comm: MPI.Comm, tensor: Tensor) -> None:
    """Copy rank 0's numbers into `tensor`, byte by byte."""
    if not tensor.numel():
        return
    flat = _bytes(tensor).copy()
    bcast_in_pieces(comm, flat)
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(flat).view(tensor.dtype).reshape(tensor.shape))


def _bytes(tensor: Tensor) -> Array:
    """Those of its numbers, in order."""
    found: Array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found
