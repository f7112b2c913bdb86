"""A PyTorch run of one process that is interrupted and started again: bit by bit what it is undisturbed."""

import os
import random
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from mpi4py import MPI  # noqa: E402

import agnmpi.torch  # noqa: E402
from agnmpi import Interrupted  # noqa: E402

nn, F = torch.nn, torch.nn.functional
DataLoader = torch.utils.data.DataLoader


def drawn():
    return np.random.rand()  # noqa: NPY002 - as transforms do


class Noisy(torch.utils.data.Dataset):
    """48 small images, each time with other noise, of three generators."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(48, 1, 6, 6, generator=generator), torch.arange(48) % 3

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return self.x[i] + random.random() + drawn() + torch.rand(()), self.y[i]


class Counted(nn.Module):
    """Counts its calls in a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.01 * (self.calls % 5))


def network(frozen=1.0):
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), Counted(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip
    model[0].bias.requires_grad_(False).fill_(frozen)
    return model


def shuffled(run):
    return DataLoader(Noisy(), 8, shuffle=True)


def seeded(run):
    return DataLoader(Noisy(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))


def dealt(run):
    return DataLoader(Noisy(), batch_sampler=run.sampler(Noisy(), batch=8, epochs=12))


class Script:
    """A script of three loops, with a generator that is drawn from between them. `end`: where it kills itself."""

    def __init__(self, directory, loader=shuffled, end=None, at_epochs=False, frozen=1.0, loops=3, last=20, **options):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - as scripts do
        self.model, self.losses, self.end, self.rates = network(frozen), [], end, []
        decay = [self.model[6].weight]
        rest = [self.model[0].weight, *self.model[1].parameters(), self.model[6].bias]
        groups = [{"params": decay, "weight_decay": 0.1, "lr": 0.02}, {"params": rest}]
        self.optimizer = torch.optim.AdamW(groups, 0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=7)
        scheduler = (
            torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
            if at_epochs
            else torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, 70)
        )
        given = {} if at_epochs else {"scheduler": scheduler}
        self.run = agnmpi.torch.Run(
            self.model, self.optimizer, MPI.COMM_SELF, period=3, transport="local", stateful=[self.scaler],
            **given, **options,
        )  # fmt: skip
        data = loader(self.run)
        try:
            for i in range(loops):
                self.loop(i, self.run.batches(data, steps=last if i == loops - 1 else 20))
                if directory and i == 1:
                    self.run.save(directory)
                self.between = torch.rand(1).item(), drawn(), random.random()  # an evaluation that draws
                if at_epochs:
                    scheduler.step()
        except Interrupted:
            self.interrupted = True
        else:
            self.interrupted = False
        self.run.close()
        self.next = torch.rand(2)

    def loop(self, number, batches):
        for turn, (x, y) in enumerate(batches):
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if self.scaler.get_scale() > 4:
                self.model[6].bias.grad[:] = torch.inf  # once in eight turns: no step, and 4 again
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.losses.append(loss.item())
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            if self.end == (number, turn):
                os.kill(os.getpid(), signal.SIGUSR1)

    def numbers(self):
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        for key, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"{key} {name}": t for name, t in slots.items()}
        return state | {"scale": torch.tensor(self.scaler.get_scale()), "next": self.next}


def same(a, b):
    assert a.keys() == b.keys()
    assert [name for name, x in a.items() if not torch.equal(x, b[name])] == []
    return True


ENDS, LOADERS = [(0, 0), (1, 13), (2, 19)], [shuffled, seeded, dealt]


@pytest.mark.parametrize(
    ("loader", "end"),
    [
        pytest.param(loader, end, marks=[] if LOADERS.index(loader) == ENDS.index(end) else pytest.mark.long)
        for loader in LOADERS
        for end in ENDS
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, loader, end):
    whole = Script(None, loader)
    options = {"checkpoint": tmp_path, "resume": "auto"}
    first = Script(None, loader, end, **options)
    assert first.interrupted
    saved = torch.load(tmp_path / "model.pt")
    assert same(saved, {name: t.cpu() for name, t in first.model.state_dict().items()})
    second = Script(None, loader, **options)
    assert not second.interrupted
    assert first.losses + second.losses == whole.losses
    assert first.rates + second.rates == whole.rates
    assert same(second.numbers(), whole.numbers())
    third = Script(None, loader, **options)
    assert third.losses == []
    assert same(third.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("at_epochs", [False, True])
def test_what_was_saved_between_loops_goes_on_there(tmp_path, at_epochs):
    """Also with a schedule by the epoch, which the script moves itself, again."""
    whole = Script(tmp_path, at_epochs=at_epochs)
    resumed = Script(None, at_epochs=at_epochs, resume=tmp_path)
    assert 0 < len(resumed.losses) < len(whole.losses)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert resumed.rates == whole.rates[-len(resumed.rates) :]
    assert resumed.between == whole.between
    assert same(resumed.numbers(), whole.numbers())


@pytest.mark.parametrize("loader", LOADERS)
def test_a_complete_run_that_is_asked_for_more_steps_goes_on(tmp_path, loader):
    """All it has drawn since lies between: so the numbers are others. What is scheduled goes on, and the data do."""
    whole, options = Script(None, loader), {"checkpoint": tmp_path, "resume": "auto"}
    first, second = Script(None, loader, last=14, **options), Script(None, loader, **options)
    assert first.losses == whole.losses[: len(first.losses)]
    assert first.rates + second.rates == whole.rates
    assert (first.run.status.step, second.run.status.step) == (54, 60)
    assert Script(None, loader, **options).losses == []


def test_restore_by_hand_and_plain_torch_loads_what_is_saved(tmp_path):
    whole = Script(tmp_path, loops=2)
    model = network()
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert same(model.state_dict(), whole.model.state_dict())
    assert model[1].num_batches_tracked == 40
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    with agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, period=3, transport="local") as run:
        with pytest.raises(ValueError, match="no whole checkpoint"):
            run.restore(tmp_path / "elsewhere")
        run.restore(tmp_path)
        assert run.status.step == 40
        assert same(model.state_dict() | {"1.num_batches_tracked": torch.tensor(40)}, whole.model.state_dict())


def test_what_does_not_fit_is_refused(tmp_path):
    Script(None, end=(1, 3), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"frozen parameters \(0.bias\) are not those"):
        Script(None, checkpoint=tmp_path, resume="auto", frozen=2.0)
    model = network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(ValueError, match="TypeError: stateful: int has no state_dict"):
        agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, transport="local", stateful=[3])
    run = agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, transport="local", checkpoint=tmp_path, resume="auto")
    assert list(run.turns(20)) == []
    with pytest.raises(ValueError, match="1 objects that were given as `stateful`, but there are 0"):
        next(run.turns(20))


def layers(a=(3, 4), b=(4, 3), names="ab"):
    made = {"a": nn.Linear(*a), "b": nn.Linear(*b)}
    return nn.ModuleDict({name: made[name] for name in names})


def briefly(model, kind=torch.optim.SGD, end=None, **options):
    """A run of 4 steps, which is interrupted in step `end`."""
    optimizer = kind(model.parameters(), 0.1)
    with agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, transport="local", **options) as run:
        for number in run.turns(4):
            optimizer.zero_grad()
            model["b"](model["a"](torch.ones(2, 3))).sum().backward()
            optimizer.step()
            if number == end:
                os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (layers(b=(4, 4)), r"'b.weight' is \(3, 4\), .* there and \(4, 4\), .* here"),  # as long, with what pads it
        (layers(names="ba"), "in the order of its tensors 'a.weight' there stands where 'b.weight' stands here"),
    ],
)
def test_another_model_is_refused(tmp_path, other, says):
    briefly(layers(), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=says):
        briefly(other, checkpoint=tmp_path, resume="auto")
    briefly(torch.compile(layers()), checkpoint=tmp_path, resume="auto")  # the same: its loop is complete


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        briefly(layers(), checkpoint=tmp_path, end=2)
    with pytest.raises(ValueError, match="the checkpoint's optimizer is SGD, not Adam"):
        briefly(layers(), torch.optim.Adam, checkpoint=tmp_path, resume="auto")


def test_a_model_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "model.pt").mkdir()  # which no file replaces
    with pytest.warns(RuntimeWarning, match=r"model.pt could not be written: .*directory"):
        script = Script(None, checkpoint=tmp_path, loops=1)
    assert len(script.losses) == 22
