"""What PyTorch runs must do on real ranks: start it under mpiexec -n 3 with names of checks below.

Several in one start, because the import of torch takes seconds. A check that fails ends the job.
"""

import hashlib
import os
import sys
import tempfile
import time

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import agnmpi.torch
from agnmpi import AGNOptimizer, optimistic, rules

COMM = MPI.COMM_WORLD


def spread(features=8, samples=512):
    """Two classes that a small net tells apart, of features with means and scales far from 0 and 1."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, samples)
    x = rng.normal(size=(samples, features)) + labels[:, None] * np.linspace(2, 0, features)
    x = x * np.linspace(1, 30, features) + 100 * np.arange(features)
    return TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(labels))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.BatchNorm1d(8), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)
    )


def accuracy(model):
    x, y = spread().tensors
    was, _ = model.training, model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean().item()
    model.train(was)
    return right


def digest(model):
    """Of all numbers of a model."""
    whole = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        whole.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def epoch(model, optimizer, batches, spoil=lambda turn: None):
    for turn, (x, y) in enumerate(batches):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        spoil(turn)
        optimizer.step()


def same_numbers(**options):
    """As the same loop written by hand with AGNOptimizer: bit by bit, with one worker."""
    part = COMM.Split(0 if COMM.rank < 2 else MPI.UNDEFINED, COMM.rank)
    if part == MPI.COMM_NULL:
        return
    data = [tuple(t[i : i + 32] for t in spread().tensors) for i in range(0, 512, 32)]
    found = []
    for by_hand in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        if by_hand:
            own = {name: p.detach().numpy() for name, p in model.named_parameters()}
            with AGNOptimizer(None, own, part, 5, **options) as opt:
                for step in opt.steps(33):
                    x, y = data[step % 16]
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    opt.step()
        else:
            with agnmpi.torch.Run(model, optimizer, part, period=5, **options) as run:
                epoch(model, optimizer, run.batches(data, steps=33))
        found.append(digest(model))
    assert found[0] == found[1]
    assert len(set(part.allgather(found[0]))) == 1


def same_numbers_with_a_center_optimizer():
    same_numbers(center_optimizer=optimistic(1.0, span=2), outer_rate=1.0)


def batch_norm():
    """After a run every rank evaluates the same, and well, with buffers that only the workers have moved."""
    for transport in ("p2p", "rma", "auto"):
        model = net(seed=COMM.rank)  # rank 0's numbers count
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        how = {"rule": rules.synchronous()} if transport == "auto" else {"outer_rate": 1.0}
        with agnmpi.torch.Run(model, optimizer, COMM, period=5, transport=transport, **how) as run:
            epoch(model, optimizer, run.batches(DataLoader(spread(), 32, shuffle=True), steps=300))
        assert len(set(COMM.allgather(digest(model)))) == 1, transport
        found = COMM.allgather(accuracy(model))
        assert max(found) - min(found) <= 0.002, found
        assert min(found) > 0.8, (transport, found)
        assert model[0].num_batches_tracked == 300
        mean = spread().tensors[0].mean(0)
        assert ((model[0].running_mean - mean).abs() < 0.3 * mean.abs() + 3).all(), (model[0].running_mean, mean)


def bad_gradient():
    """NaN in one gradient of one worker costs that worker at most two periods, and nobody the run."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    bad, turns, period = [], [], 4

    def spoil(turn):
        if COMM.rank == 2 and turn == 10:
            model[1].weight.grad[0, 0] = torch.nan
        turns.append(turn)
        if turn > 10 and not all(torch.isfinite(p).all() for p in model.parameters()):
            bad.append(turn)

    loader = list(DataLoader(spread(samples=32 * 120), 32))  # each worker takes them all, however fast the other is
    with agnmpi.torch.Run(model, optimizer, COMM, period=period, outer_rate=1.0) as run:
        epoch(model, optimizer, run.batches(loader), spoil)
    assert run.is_center or len(turns) == 120, "it goes on"
    assert len(bad) <= 2 * period
    state = optimizer.state_dict()["state"]
    assert all(torch.isfinite(v).all() for p in state.values() for v in p.values())
    assert accuracy(model) > 0.8


def schedule():
    """A schedule that is to end at 0 ends at 0, on every rank, and each step has the rate of its number."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-9, total_iters=60)
    seen = []
    with agnmpi.torch.Run(model, optimizer, COMM, period=3, scheduler=scheduler) as run:
        for _ in run.batches(DataLoader(spread(), 32), steps=60):
            seen.append(round(60 * (1 - optimizer.param_groups[0]["lr"])))
            optimizer.step()
    everywhere = sorted(step for steps in COMM.allgather(seen) for step in steps)
    assert everywhere == list(range(60))
    assert abs(optimizer.param_groups[0]["lr"]) < 1e-6


def few_digits():
    """Parameters in bfloat16, a center in float32; a turn in two takes a step; frozen ones come from rank 0."""
    torch.manual_seed(COMM.rank)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).bfloat16()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 0.01)
    with agnmpi.torch.Run(model, optimizer, COMM, period=4, outer_rate=1.0, overlap=True) as run:
        for turn, (x, y) in enumerate(run.batches(DataLoader(spread(), 32, shuffle=True), steps=120)):
            F.cross_entropy(model(x.bfloat16() / 100), y).backward()
            if turn % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert len(set(COMM.allgather(digest(model)))) == 1


def evaluation():
    """Rank 0 evaluates the center while it serves, and can stop all from there."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    seen = []

    def look(status):
        seen.append((status.step, accuracy(model)))
        if seen[-1][1] > 0.8:
            run.stop()

    with agnmpi.torch.Run(model, optimizer, COMM, period=5, outer_rate=1.0) as run:
        run.evaluate(look, every=50)
        epoch(model, optimizer, run.batches(DataLoader(spread(), 32, shuffle=True), steps=100_000))
        assert run.status.step < 100_000
    assert bool(seen) == (COMM.rank == 0)
    assert accuracy(model) > 0.7
    assert len(set(COMM.allgather(digest(model)))) == 1


def dealt():
    """Each sample of an epoch once, over all workers, however far a loader prefetches, and in two loops."""
    for processes in (0, 2):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        dataset = TensorDataset(*spread().tensors, torch.arange(512))
        with agnmpi.torch.Run(model, optimizer, COMM, period=3) as run:
            sampler = run.sampler(dataset, batch=20, epochs=2)
            loader = DataLoader(dataset, batch_sampler=sampler, num_workers=processes)
            seen = []
            for steps in (7, None):
                for x, y, indices in run.batches(loader, steps):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    if len(seen) == 2 and COMM.rank == 1:
                        model[1].weight.grad[:] = torch.nan  # its steps go to the other
                    optimizer.step()
                    seen.append(indices.tolist())
        assert run.status.step == 52, run.status.step
        counts = np.bincount([i for part in COMM.allgather(seen) for batch in part for i in batch], minlength=512)
        assert (counts >= 2).all(), "refused steps were computed again"
        assert counts.sum() <= 2 * 512 + 3 * 20, counts.sum()


def left():
    """A loop over dealt batches is left by `break`, on each rank after another step; the next takes the rest."""
    model, taken = net(), 0
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with agnmpi.torch.Run(model, optimizer, COMM, period=3) as run:
        loader = DataLoader(spread(), batch_sampler=run.sampler(spread(), batch=16, epochs=4))
        for most in (5 + COMM.rank, 1000):
            for turn, (x, y) in enumerate(run.batches(loader), 1):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                taken += 1
                if turn == most:
                    break
    assert sum(COMM.allgather(taken)) == 4 * 32


def late_evaluation():
    """An evaluation that is under way when a loop ends sees what it was given, and the model is the center then."""
    seen, moved, model = [], 0.0, nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def evaluate(held):
        first = held.weight.item()
        time.sleep(0.3)
        seen.append((first, held.weight.item()))
        return {"w": first}

    directory = COMM.bcast(tempfile.mkdtemp())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with agnmpi.torch.Run(model, optimizer, COMM, 5, monitor=agnmpi.Monitoring(directory, evaluate, every=20)) as run:
        for _loop in range(2):
            for _ in run.turns(60):
                optimizer.zero_grad()
                (-model.weight.sum()).backward()  # w grows by 0.01
                optimizer.step()
            time.sleep(0.5)  # of one's own, longer than the evaluation
            w = COMM.allgather(model.weight.item())
            assert len(set(w)) == 1, w
            assert w[0] > moved, "what the loop has trained is gone"
            moved = w[0]
    assert [a for a, b in seen if a != b] == []
    assert bool(seen) == run.is_center


def own_data():
    """Without a number of steps each worker goes through its own loader, once."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(spread(samples=32 * (COMM.rank + 3)), 32)
    turns = 0
    with agnmpi.torch.Run(model, optimizer, COMM, period=2) as run:
        for _ in run.batches(loader):
            optimizer.step()
            turns += 1
    assert turns == (0 if run.is_center else COMM.rank + 3)


def rows(indices):
    """A collate function that a spawned process can import."""
    return torch.stack([x for x, _ in indices]), torch.stack([y for _, y in indices])


def from_processes(method):
    """A loader with two processes of its own, which import this module, and MPI with it, where they are not forks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(spread(), 32, shuffle=True, num_workers=2, multiprocessing_context=method, collate_fn=rows)
    with agnmpi.torch.Run(model, optimizer, COMM, period=3) as run:
        epoch(model, optimizer, run.batches(loader, steps=10))
    assert len(set(COMM.allgather(digest(model)))) == 1, method


def fork():
    from_processes("fork")


def spawn():
    from_processes("spawn")


def forkserver():
    from_processes("forkserver")


def compiled():
    """A model that torch.compile has wrapped, before its first call."""
    model = net()
    wrapped = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with agnmpi.torch.Run(wrapped, optimizer, COMM, period=3) as run:
        epoch(wrapped, optimizer, run.batches(DataLoader(spread(), 32, shuffle=True), steps=30))
    assert len(set(COMM.allgather(digest(model)))) == 1


def accelerate():
    """Accelerate sees one process, whatever the launcher has set, and prepares what the run trains."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 1
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(spread(), 32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with agnmpi.torch.Run(model, optimizer, COMM, period=3) as run:
        for x, y in run.batches(loader, steps=30):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
    assert len(set(COMM.allgather(digest(model)))) == 1


def main():
    assert not any(name.startswith(("PMI_", "PMIX_", "OMPI_COMM")) for name in os.environ)
    for name in sys.argv[1:]:
        globals()[name]()
        COMM.Barrier()
        if COMM.rank == 0:
            print(f"{name} holds", flush=True)


if __name__ == "__main__":
    main()
