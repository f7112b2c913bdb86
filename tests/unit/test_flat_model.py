"""A PyTorch model in one flat vector, and a run of one process: what moves, what is kept, what is refused."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from mpi4py import MPI  # noqa: E402

import agnmpi.torch  # noqa: E402
from agnmpi.frameworks.flat_model import FlatModel  # noqa: E402
from agnmpi.frameworks.launcher import hide_launcher  # noqa: E402
from agnmpi.transport.agreement import ConfigError  # noqa: E402

nn, StepLR = torch.nn, torch.optim.lr_scheduler.StepLR


def net(dtype=None):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2)
    ).to(dtype=dtype, memory_format=torch.channels_last)  # fmt: skip


def data(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 3, 4, 4, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(count)
    ]


def alone(model, optimizer, *args, **options):
    return agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, *args, transport="local", **options)


def train(model, optimizer, batches):
    for x, y in batches:
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def flat(model, optimizer):
    return FlatModel(model, optimizer, MPI.COMM_SELF)


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


def test_tensors_keep_numbers_shapes_and_strides_and_share_the_vector():
    model, plain = net(), net().state_dict()
    vector = flat(model, torch.optim.SGD(model.parameters(), 0.1))
    assert same(model.state_dict(), plain)
    assert model[0].weight.stride() == plain["0.weight"].stride() == (27, 1, 9, 3)
    assert vector.buffers == 2 * 16, "running mean and variance of 4 channels, each from a cache line on"
    with torch.no_grad():
        model[4].bias.fill_(7)
        model[1].running_var.fill_(5)
    assert (vector.x == 7).sum() == 2
    assert (vector.x[-vector.buffers :] == 5).sum() == 4
    vector.x[:] = 3
    assert (model[0].weight == 3).all()


def test_what_is_tied_lies_once_and_what_is_frozen_nowhere():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16, bias=False), "c": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    vector = flat(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    assert vector.x.size == 16 * 16 + 16
    assert model["b"].weight.data_ptr() == model["a"].weight.data_ptr()


def test_buffers_that_cannot_be_averaged_stay():
    model = nn.Linear(16, 16)
    model.register_buffer("mask", torch.full((16,), -torch.inf))
    model.register_buffer("index", torch.arange(16))
    model.register_buffer("cache", torch.ones(16), persistent=False)
    model.register_buffer("mean", torch.ones(16))
    assert flat(model, torch.optim.SGD(model.parameters(), 0.1)).buffers == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_digits_lose_nothing_at_the_center(dtype):
    """Rounding c to the model's dtype and back adds nothing: steps smaller than its digits add up at the center."""
    model = nn.Linear(16, 16, bias=False).to(dtype)
    vector = flat(model, torch.optim.SGD(model.parameters(), 0.1))
    assert vector.x.dtype == np.float32
    start = vector.x.copy()
    for _ in range(10):
        vector.x += 1e-4  # far below one digit of numbers around 0.1
        vector.unpack()
        vector.pack()
    np.testing.assert_allclose(vector.x, start + 1e-3, rtol=0, atol=1e-6)
    assert torch.equal(model.weight.detach().float(), torch.from_numpy(vector.x).view(16, 16).to(dtype).float())
    with torch.no_grad():
        model.weight.add_(1.0)
    before = vector.x.copy()
    vector.pack()
    np.testing.assert_allclose(vector.x - before, 1.0, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_that_were_loaded_are_what_they_are(dtype):
    """What rounding had added to the numbers before is not taken from much smaller ones."""
    model = nn.Linear(16, 16, bias=False).to(dtype)
    vector = flat(model, torch.optim.SGD(model.parameters(), 0.1))
    vector.x += 1e-4
    vector.unpack()
    small = (torch.linspace(-1, 1, 256).view(16, 16) * 2.0**-13).to(dtype)
    model.load_state_dict({"weight": small})
    vector.pack()
    np.testing.assert_array_equal(vector.x[:256].reshape(16, 16), small.float().numpy())


def test_double_stays_double():
    model = nn.Linear(2, 2).double()
    assert flat(model, torch.optim.SGD(model.parameters(), 0.1)).x.dtype == np.float64


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m, o: m.double(), "'weight' is not where it was .* model.double()"),
        (lambda m, o: m.load_state_dict(nn.Linear(2, 2).state_dict(), assign=True), "assign=True"),
        (lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}), "other parameters"),
    ],
)
def test_a_model_that_is_changed_is_named(spoil, says):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    vector = flat(model, optimizer)
    spoil(model, optimizer)
    with pytest.raises(RuntimeError, match=says):
        vector.pack()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), "2 parameters that are not the model's"),
        (lambda m: torch.optim.SGD(m.requires_grad_(False).parameters(), 0.1), "no parameter of the model"),
        (lambda m: torch.optim.SGD(m.to(torch.complex64).parameters(), 0.1), "torch.complex64"),
        (lambda m: torch.optim.SGD(m.to("meta").parameters(), 0.1), "on meta"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, says):
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=says):
        alone(model, make(model))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": len}, "model must be a torch.nn.Module, not builtin_function_or_method"),
        ({"optimizer": "adam"}, "optimizer must be one of torch.optim, not str"),
        ({"optimizer": agnmpi.sgd(0.1)}, "optimizer must be one of torch.optim, not Optimizer"),
        ({"scheduler": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, "scheduler must be one of .*, not SGD"),
        ({"scheduler": StepLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), 3)}, "of another optimizer"),
    ],
)
def test_what_is_not_of_torch_or_not_of_this_model_is_refused(given, says):
    model = nn.Linear(2, 2)
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)} | given
    with pytest.raises(ConfigError, match=says):
        agnmpi.torch.Run(comm=MPI.COMM_SELF, **given)


def test_a_loop_that_takes_no_step_is_warned_of():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = alone(model, optimizer)

    def train():
        for turn, _ in enumerate(run.turns(3)):
            if turn >= 250:
                optimizer.step()

    with pytest.warns(RuntimeWarning, match=r"rank 0: 100 turns .* does it call optimizer.step\(\)\?") as warned:
        train()
    assert len(warned) == 1


def test_a_scheduler_by_the_epoch_may_be_stepped_between_two_loops():
    """Without torch's warning, on a rank that has taken no step."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler, run = StepLR(optimizer, 1), alone(model, optimizer)
    list(run.turns(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_dtensors_are_refused():
    model = nn.Linear(2, 2)
    model.weight.device_mesh = "a mesh"
    with pytest.raises(ConfigError, match="DTensor"):
        alone(model, torch.optim.SGD(model.parameters(), 0.1))


def test_one_worker_and_period_one_is_the_optimizer_alone():
    plain, mine = net(), net()
    batches = data()
    # Not Adam: a bias before BatchNorm has a gradient of rounding alone, which Adam would make a step of.
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9)
    train(plain, optimizer, batches)
    optimizer = torch.optim.SGD(mine.parameters(), 0.1, 0.9)
    run = alone(mine, optimizer, period=1)
    train(mine, optimizer, run.batches(batches, steps=6))
    run.close()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_steps_and_passes_over_a_loader():
    """None: once through the loader; else round and round; a turn without a step counts for none."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with alone(model, optimizer, period=4) as run:
        turns = 0
        for i, (x, y) in enumerate(run.batches(data(3), steps=8)):
            ((model(x) - y) ** 2).mean().backward()
            if i % 2:  # gradients of two batches
                optimizer.step()
                optimizer.zero_grad()
            turns += 1
        assert turns == 16
        assert sum(1 for _ in run.batches([])) == 0
        with pytest.raises(ValueError, match="no batches"):
            next(run.batches([], steps=1))
        seen = []
        for batch in run.batches(data(3)):
            seen.append(batch)
            optimizer.step()
        assert len(seen) == 3


def test_a_step_that_a_scaler_skips_does_not_count():
    model = net()
    for fused in (False, True):
        optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        with alone(model, optimizer, period=2) as run:
            steps = turns = 0
            for x, y in run.batches(data(4), steps=5):
                optimizer.zero_grad()
                scaler.scale(((model(x) - y) ** 2).mean()).backward()
                if turns == 1:
                    model[4].bias.grad[:] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                turns += 1
                steps += turns != 2
            assert (turns, steps) == (6, 5)
            assert all(torch.isfinite(t).all() for t in model.state_dict().values())


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.ASGD], ids=lambda c: c.__name__)
def test_after_a_refusal_the_optimizer_has_forgotten(make):
    """NaN in one gradient costs its period; Adam's moments are gone, Adagrad's sums are what they were at first."""
    model = net()
    optimizer = make(model.parameters(), 0.05)
    batches, losses = data(1) * 40, []
    with alone(model, optimizer, period=2) as run:
        for i, (x, y) in enumerate(run.batches(batches, steps=40)):
            loss = ((model(x) - y) ** 2).mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            if i == 20:
                model[0].weight.grad[0] = torch.nan
            optimizer.step()
    assert sum(not np.isfinite(loss) for loss in losses) <= 4, "two periods"
    assert np.isfinite(losses[26:]).all()
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_the_schedule_follows_the_steps_of_the_run():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 10)
    run, seen = alone(model, optimizer, period=3, scheduler=scheduler), []
    for steps in (4, 6):
        for _ in run.batches(data(2), steps=steps):
            seen.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()  # the script's own: it does nothing now
    np.testing.assert_allclose(seen, 1 - np.arange(10) / 10)
    assert scheduler.get_last_lr()[0] == pytest.approx(0)
    run.close()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(-0.1)
    with pytest.raises(ConfigError, match="follows a metric"):
        alone(model, optimizer, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def test_counters_are_the_steps_of_the_run():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with alone(model, optimizer, period=3) as run:
        train(model, optimizer, run.batches(data(2), steps=7))
        train(model, optimizer, run.batches(data(2), steps=2))
    assert model[1].num_batches_tracked == 9


def test_the_center_can_be_looked_at_and_the_model_comes_back():
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(3, 2).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with alone(model, optimizer, period=4) as run:
            start = model.weight.detach().clone()
            for i, x in enumerate(run.batches([torch.ones(1, 3, dtype=dtype)], steps=8)):
                optimizer.zero_grad()
                model(x).sum().backward()
                optimizer.step()
                if i == 1:
                    own = model.weight.detach().clone()
                    with run.center() as held:
                        assert held is model
                        assert torch.equal(model.weight, start)
                    assert torch.equal(model.weight, own)


def test_sparse_gradients_stay_local():
    model = nn.Embedding(8, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), 0.1)
    with alone(model, optimizer, period=2) as run:
        for i in run.batches([torch.tensor([1, 2])], steps=4):
            optimizer.zero_grad()
            model(i).sum().backward()
            optimizer.step()
    assert model.weight.grad.is_sparse


def test_weight_decay_of_groups_and_threads_are_torchs():
    model = net()
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "weight_decay": 0.5},
            {"params": [*model[1].parameters(), *model[4].parameters()]},
        ],
        0.01,
    )
    threads = torch.get_num_threads()
    with alone(model, optimizer) as run:
        train(model, optimizer, run.batches(data(2), steps=4))
        assert run.workers == 1
        assert not run.is_center
    assert torch.get_num_threads() == threads
    assert len(optimizer.param_groups) == 2


def test_only_the_launchers_variables_are_hidden():
    environment = {"PMI_RANK": "0", "PMIX_ID": "1", "OMPI_COMM_WORLD_RANK": "2", "MPI_LOCALRANKID": "3", "PATH": "/bin"}
    hide_launcher(environment)
    assert environment == {"PATH": "/bin"}
