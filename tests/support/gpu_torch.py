"""A PyTorch model on a GPU, on a side stream, against the same on the CPU:   python tests/support/gpu_torch.py

Also in bfloat16, and what a run adds to a step outside of exchanges. Needs no CuPy. mpiexec -n 3 works, too.
"""

import torch
from framework_overhead import MODELS, with_torch
from mpi4py import MPI
from torch import nn

import agnmpi.torch


def trained(device, dtype=torch.float32):
    """The numbers of a model with BatchNorm after 40 steps with λ = 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 4)).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(64, 32, generator=generator), torch.randn(64, 4, generator=generator)) for _ in range(10)]
    part = MPI.COMM_WORLD.Split(0 if MPI.COMM_WORLD.rank < 2 else MPI.UNDEFINED)
    if part == MPI.COMM_NULL:
        return {}
    transport = "local" if part.size == 1 else "auto"
    with agnmpi.torch.Run(model, optimizer, part, period=4, transport=transport) as run:
        for x, y in run.batches(data, steps=40):
            loss = ((model(x.to(device, dtype)) - y.to(device, dtype)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def main():
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        expected = trained("cpu", dtype)
        with torch.cuda.stream(torch.cuda.Stream()):
            found = trained("cuda", dtype)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)
        print(f"rank {MPI.COMM_WORLD.rank}: {dtype} on a side stream gives the numbers of the CPU", flush=True)
    if MPI.COMM_WORLD.size == 1:
        for name, shapes in MODELS.items():
            print(f"torch on the GPU, {name}: {with_torch(shapes, 'cuda'):.4f} ms a step")


if __name__ == "__main__":
    main()
