"""Lightning: a callback of a few lines; the module, its data and its Trainer stay as they are.

mpiexec -n 3 python examples/torch_lightning.py
"""

import lightning
import torch
from mpi4py import MPI
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch_mnist import images, network

import agnmpi.torch


class AGN(lightning.Callback):
    """Exchanges over MPI, in the course of `steps` of all workers."""

    def __init__(self, steps, **options):
        self.steps, self.options = steps, options

    def on_train_start(self, trainer, module):
        self.run = agnmpi.torch.Run(module, trainer.optimizers[0], MPI.COMM_WORLD, **self.options)
        self.turns = self.run.turns(self.steps)
        trainer.should_stop = next(self.turns, None) is None  # a center rank has served, and trains no more

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = next(self.turns, None) is None

    def on_train_end(self, *_):
        self.run.close()


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network(size=8)

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.003)


def main():
    train, test = images()
    lightning.seed_everything(0, verbose=False)
    module = Digits()
    trainer = lightning.Trainer(
        max_epochs=-1, accelerator="cpu", devices=1, callbacks=[AGN(400, period=5, outer_rate=1.0)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    module.eval()
    x, y = test.tensors
    right = (module.network(x).argmax(1) == y).float().mean()
    print(f"rank {MPI.COMM_WORLD.rank}: {right:.4f} of the test set are right")


if __name__ == "__main__":
    main()
