"""A PyTorch run that is trained undisturbed, then trained again and ended at its 80th turn; started once more, it
resumes, and is compared with the first: bit by bit with one worker, within the spread with several.

mpiexec -n 2 python tests/support/torch_resumes.py DIRECTORY kill|raise|INT|USR1 [compile]
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import agnmpi.torch

COMM = MPI.COMM_WORLD
LOOPS, STEPS = 2, 60


def images():
    """Two classes of small images, one brighter on the left."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    x = torch.randn(256, 1, 8, 8, generator=generator)
    x[labels == 1, :, :, :4] += 1
    return TensorDataset(x, labels)


class Training:
    """A CNN with BatchNorm and Dropout, parameter groups, a schedule and a scaler."""

    def __init__(self, compiled, **options):
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 2)
        )
        self.called = torch.compile(self.model) if compiled else self.model
        groups = [{"params": self.model[5].parameters(), "weight_decay": 0.1}, {"params": self.model[:2].parameters()}]
        self.optimizer = torch.optim.AdamW(groups, 0.003)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=7)
        total = LOOPS * STEPS * (COMM.size - 1)
        self.run = agnmpi.torch.Run(
            self.called, self.optimizer, COMM, 5, outer_rate=1.0, stateful=[self.scaler],
            scheduler=torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.01, total), **options,
        )  # fmt: skip

    def train(self, disturb=lambda turn: None):
        turn = 0
        for _ in range(LOOPS):
            loader = DataLoader(images(), 32, shuffle=True)
            for x, y in self.run.batches(loader, steps=STEPS * (COMM.size - 1)):
                loss = F.cross_entropy(self.called(x), y)
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                if self.scaler.get_scale() > 4:
                    self.model[5].bias.grad[:] = torch.inf  # once in eight turns: the scaler takes no step
                self.scaler.step(self.optimizer)
                self.scaler.update()
                turn += 1
                disturb(turn)
        self.run.close()

    def found(self):
        """A digest of the model, of its optimizer at rank 1 and of the scale; and the accuracy."""
        whole = hashlib.sha256()
        slots = [t for each in self.optimizer.state_dict()["state"].values() for t in each.values()]
        slots += [torch.tensor(self.scaler.get_scale()), torch.rand(1)]
        for tensor in [*self.model.state_dict().values(), *COMM.bcast(slots, 1)]:
            whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        self.model.eval()
        x, y = images().tensors
        return whole.hexdigest(), (self.model(x).argmax(1) == y).float().mean().item()


def whole_checkpoint(directory):
    """Whether the newest checkpoint has the states of all workers; of several, one of those that are kept."""
    folders = sorted((directory / "checkpoints").glob("step-*"))
    names = ["center-0", *(f"{kind}-{i}" for i in range(COMM.size - 1) for kind in ("worker", "caller"))]
    if COMM.size == 2:
        folders = folders[-1:]
    return any(all((folder / f"{name}.safetensors").exists() for name in names) for folder in folders)


def main():
    directory, how = Path(sys.argv[1]), sys.argv[2]
    compiled = "compile" in sys.argv[3:]
    first, at = not (directory / "whole").exists(), 80 // (COMM.size - 1)
    COMM.Barrier()

    def disturb(turn):
        if not first or COMM.rank != 1 or turn < at:
            return
        if how in ("INT", "USR1"):
            if turn == at:
                os.kill(os.getpid(), getattr(signal, f"SIG{how}"))
        elif whole_checkpoint(directory):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this run was disturbed")
        else:
            time.sleep(0.05)

    if first:
        undisturbed = Training(compiled)
        undisturbed.train()
        found = undisturbed.found()
        if COMM.rank == 0:
            (directory / "whole").write_text("\n".join(map(str, found)))
    every = 1e-3 if COMM.size == 2 else 0.1  # several workers take longer to write one than it would be kept
    training = Training(compiled, checkpoint=directory, resume="auto", checkpoint_every=every)
    resumed_at = COMM.bcast(training.run.status.step)
    assert first == (resumed_at == 0)
    training.train(disturb)
    assert not first, "it was not disturbed"
    digest, accuracy = training.found()
    expected, of_whole = (directory / "whole").read_text().split("\n")
    assert COMM.size > 2 or digest == expected
    assert accuracy > 0.9, accuracy
    assert abs(accuracy - float(of_whole)) < 0.05, (accuracy, of_whole)
    if COMM.rank == 0:
        print(f"resumed at {resumed_at}: {accuracy}", flush=True)


if __name__ == "__main__":
    main()
