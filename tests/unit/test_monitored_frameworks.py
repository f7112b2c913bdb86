"""Runs of PyTorch and JAX that are shown and written as a run of `agnmpi train` is, in one process."""

import threading
import time
import warnings

import numpy as np
import pytest
from mpi4py import MPI

from agnmpi import Monitoring
from agnmpi.reporting.runs import read

BEST = 2.0  # of the weight w that both fit


def monitored(directory, error, **options):
    """What to monitor; `error(trained)`: of what it is given."""
    monitor = Monitoring(directory, lambda trained: {"error": error(trained)}, every=5, metric="error:min", **options)
    return {"period": 3, "transport": "local", "monitor": monitor}


def torch_run(directory, **options):
    """Returns the run, and how to read w; it passes BEST, and goes on."""
    torch = pytest.importorskip("torch")
    import agnmpi.torch

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = monitored(directory, lambda held: abs(held.weight.item() - BEST), **options)
    run = agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, **given)

    def step():
        optimizer.zero_grad()
        model(-torch.ones(1, 1)).sum().backward()  # w grows by 0.1
        optimizer.step()

    return run, step, lambda held: held.weight.item()


def jax_run(directory, **options):
    """As `torch_run`."""
    jax = pytest.importorskip("jax")
    import agnmpi.jax

    given = monitored(directory, lambda held: abs(float(held["w"][0]) - BEST), **options)
    run = agnmpi.jax.Run({"w": jax.numpy.zeros(1)}, None, MPI.COMM_SELF, **given)
    return run, lambda: run.update({"w": run.params["w"] + 0.1}), lambda held: float(held["w"][0])


@pytest.mark.parametrize("made", [torch_run, jax_run])
@pytest.mark.parametrize("tells", [False, True])
def test_what_is_trained_holds_the_center_while_it_is_evaluated(tmp_path, capsys, made, tells):
    run, step, value = made(tmp_path)
    for _ in run.turns(90):
        if tells:
            run.tell(np.float32(0.5))
        step()
    run.close()
    with run.center() as held:
        last = value(held)
    with run.center(tmp_path / "best.safetensors") as held:
        best = value(held)
    written = read(tmp_path)
    errors = [event["metrics"]["error"] for event in written.events if event["event"] == "evaluation"]
    assert written.state == "done"
    assert written.result["steps"] == 90
    assert errors[0] == BEST, "of the initial parameters"
    assert errors[-1] == pytest.approx(abs(last - BEST), abs=1e-6)
    assert min(errors) == pytest.approx(abs(best - BEST), abs=1e-6) == pytest.approx(written.result["best"]["value"])
    assert min(errors) < errors[-1]
    assert written.result["loss"] == (0.5 if tells else None)
    assert "diverged" not in capsys.readouterr().out


@pytest.mark.parametrize("made", [torch_run, jax_run])
def test_two_threads_hold_a_center_one_after_the_other(tmp_path, made):
    """As those of `evaluate` and of what `monitor` evaluates."""
    run, step, value = made(tmp_path)
    for _ in run.turns(90):
        step()
    run.close()
    own, seen, holds = value(run.model if hasattr(run, "model") else run.params), [], threading.Event()

    def look():
        with run.center(tmp_path / "best.safetensors") as held:
            seen.append(value(held))
            holds.set()
            time.sleep(0.2)
            seen.append(value(held))

    other = threading.Thread(target=look)
    other.start()
    holds.wait(10)
    with run.center() as held:
        other.join(10)
        assert value(held) == pytest.approx(3.0)
    assert seen[0] == seen[1] == pytest.approx(BEST)
    assert value(run.model if hasattr(run, "model") else run.params) == own == pytest.approx(3.0)


@pytest.mark.parametrize("made", [torch_run, jax_run])
def test_a_target_ends_its_loops(tmp_path, made):
    run, step, value = made(tmp_path, stop_at=1.0)
    taken = sum(1 for _ in run.turns(200) if step() is None)
    assert not list(run.turns(10))
    run.close()
    with run.center() as held:
        assert abs(value(held) - BEST) <= 1.0
    assert 10 <= taken < 200
    assert read(tmp_path).result["steps"] == taken


def test_a_loss_is_told_as_it_is(tmp_path):
    """With its graph: torch would warn."""
    torch = pytest.importorskip("torch")
    run, step, _ = torch_run(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in run.turns(5):
            run.tell((run.model.weight**2).sum() + torch.ones(()))
            step()
    run.close()


def test_a_directory_is_enough_and_the_model_is_its_own_again(tmp_path):
    torch = pytest.importorskip("torch")
    import agnmpi.torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, transport="local", monitor=tmp_path)
    for _ in run.turns(4):
        optimizer.zero_grad()
        model(torch.randn(8, 2)).sum().backward()
        optimizer.step()
    run.close()
    own = [t.clone() for t in model.state_dict().values()]
    with run.center(tmp_path / "center.safetensors"):
        assert all(torch.equal(a, b) for a, b in zip(own[:4], model.state_dict().values()))
        model[0].weight.data += 1
    assert all(torch.equal(a, b) for a, b in zip(own, model.state_dict().values()))
    assert np.isfinite(read(tmp_path).result["seconds"])
