"""A PyTorch model as a problem of the command line and of simulations, many workers in one process."""

from abc import ABC, abstractmethod

import torch
from torch import nn


class TorchProblem(ABC):
    """The parameters of `network()` become views of the flat vector that a worker trains; buffers are not sent.

    A subclass has `samples`, too. Randomness in training (dropout, augmentation) is best drawn from the batch's
    indices: so that it is the same in one process and on any worker.
    """

    @abstractmethod
    def network(self) -> nn.Module: ...

    @abstractmethod
    def loss(self, model: nn.Module, indices) -> torch.Tensor:
        """The mean loss over these samples."""

    @abstractmethod
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Metrics on held-out data."""

    def init(self, rng):
        torch.manual_seed(int(rng.integers(2**32)))
        self._trained = self.network().train()
        self._measured = self.network().eval()  # its own: evaluations may run in another thread
        return {name: p.detach().numpy().copy() for name, p in self._trained.named_parameters()}

    def gradient(self, params, indices):
        loss = self.loss(_holding(self._trained, params), indices)
        gradients = torch.autograd.grad(loss, list(self._trained.parameters()))
        names = (name for name, _ in self._trained.named_parameters())
        return loss.item(), {name: g.numpy() for name, g in zip(names, gradients, strict=True)}

    def evaluate(self, params):
        with torch.inference_mode():
            return self.measure(_holding(self._measured, params))


def _holding(model, params):
    for name, p in model.named_parameters():
        p.data = torch.from_numpy(params[name])
    return model
