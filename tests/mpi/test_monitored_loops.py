"""Loops of one's own that are shown and written as a run of `agnmpi train` is."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from agnmpi import AGNOptimizer, ConfigError, Monitoring, sgd, transports
from agnmpi.core import rules
from agnmpi.recovery.checkpoint import folders
from agnmpi.recovery.files import load
from agnmpi.reporting.page import page
from agnmpi.reporting.runs import read
from agnmpi.training.config import load_run
from agnmpi.transport import registry

pytestmark = pytest.mark.mpi(min_size=2)
TRANSPORTS = [entry for entry in registry.entries() if entry.capabilities.center_ranks]
TARGET = np.linspace(1, 2, 6)


@pytest.fixture
def directory(comm, tmp_path):
    """One directory for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


def distance(params):
    return {"error": float(abs(params["w"] - TARGET).max())}


def made(comm, monitor, **options):
    return AGNOptimizer(sgd(0.1), {"w": np.zeros(6)}, comm, 2, monitor=monitor, **options)


def loss(p):
    return float(((p["w"] - TARGET) ** 2).sum() / 2), {"w": p["w"] - TARGET}


def train(opt, loops=2, steps=120):
    taken = 0
    for _ in range(loops):
        for _ in opt.steps(steps):
            opt.minimize(loss)
            taken += 1
    return taken


def of(run, kind):
    return [event for event in run.events if event["event"] == kind]


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
def test_what_it_writes_is_a_run(comm, directory, transport, capsys):
    seen = []
    monitor = Monitoring(directory, distance, every=50, metric="error:min", batch=4, on_event=seen.append)
    opt = made(comm, monitor, transport=transport)
    taken = comm.allreduce(train(opt))
    opt.close()
    comm.Barrier()
    run = read(directory)
    assert taken == 240
    assert run.state == "done"
    assert run.result["steps"] == 240
    assert run.result["samples"] == 4 * 240
    assert run.result["best"]["metric"] == "error"
    evaluated = [event["metrics"]["error"] for event in of(run, "evaluation")]
    assert evaluated[0] == 2.0, "of the initial parameters"
    assert evaluated[-1] == distance(opt.center)["error"]
    assert run.result["best"]["value"] == min(evaluated) < 0.5
    looks = transport.name != "accumulate"  # there the workers may have taken all steps when rank 0 looks again
    assert len(evaluated) >= 2 + looks
    best, facts = load(directory / "best.safetensors")
    assert distance(best)["error"] == run.result["best"]["value"] == float(facts["value"])
    assert (load(directory / "center.safetensors")[0]["w"] == opt.center["w"]).all()
    assert tomllib.loads((directory / "config.toml").read_text())["period"] == 2
    assert "error" in page([run])
    if comm.rank == 0:
        assert [event["event"] for event in seen] == [event["event"] for event in run.events]
        assert "evaluation at epoch 0: error 2.0000" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"stop_at": 0.5}, {"patience": 2}], ids=str)
def test_a_target_ends_all_loops_on_all_ranks(comm, directory, options):
    def steady(params):
        return {"error": 1.0} if "patience" in options else distance(params)

    opt = made(comm, Monitoring(directory, steady, every=10, metric="error:min", **options))
    taken = comm.allreduce(train(opt, loops=3, steps=10_000))
    assert 0 < taken < 10_000
    assert "error" in opt.stopped
    assert train(opt) == 0, "and those to come"
    opt.close()
    comm.Barrier()
    assert read(directory).result["stopped"] == comm.bcast(opt.stopped)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("monitored", [False, True])
def test_loops_that_are_left_early(comm, directory, checkpoint, monitored):
    options = {"checkpoint": directory} if checkpoint else {}
    opt = made(comm, Monitoring(directory / "run", distance) if monitored else None, **options)
    for _ in range(2):
        for count, _ in enumerate(opt.steps()):
            opt.minimize(loss)
            if count == 4:
                break
    opt.close()
    assert opt.taken == 2 * 5 * opt.num_workers
    comm.Barrier()
    assert not monitored or read(directory / "run").result["steps"] == opt.taken


def test_an_evaluation_that_fails_at_first_ends_it(comm, directory):
    opt = made(comm, Monitoring(directory, lambda params: params["v"]))
    with pytest.raises(RuntimeError, match="the first evaluation has failed, as rank 0 has said"):
        train(opt, steps=100_000)
    opt.close()
    comm.Barrier()
    assert read(directory).state == "failed"
    assert "KeyError: 'v'" in of(read(directory), "evaluation_failed")[0]["error"]


def test_a_loop_that_is_resumed_goes_on_in_its_files(comm, directory):
    monitor = Monitoring(None, distance, every=50, batch=4)
    opt = made(comm, monitor, checkpoint=directory)
    train(opt, loops=1)
    opt.close()
    comm.Barrier()
    with pytest.raises(ConfigError, match="holds another run"):
        made(comm, monitor, checkpoint=directory)
    opt = made(comm, monitor, checkpoint=directory, resume="auto")
    assert comm.allreduce(train(opt)) == 120
    opt.close()
    comm.Barrier()
    run = read(directory)
    assert run.result["samples"] == 4 * 240
    assert [event["step"] for event in of(run, "resume")] == [120]
    assert of(run, "checkpoint") or json.dumps(run.result)


def test_a_loop_that_is_resumed_within_its_first_session_goes_on_in_its_files(comm, directory):
    for total in (40, 100):
        opt = made(comm, Monitoring(None, distance, every=30, batch=4), checkpoint=directory, resume="auto")
        train(opt, loops=1, steps=total)
        opt.close()
        comm.Barrier()
    run = read(directory)
    assert [event["step"] for event in of(run, "resume")] == [40]
    assert [event["step"] for event in of(run, "evaluation")].count(0) == 1, "of the initial parameters"
    assert (run.result["steps"], run.result["samples"]) == (100, 400)
    assert of(run, "evaluation")[-1]["epoch"] == 2.5, "of 40 steps, as at first"


def test_samples_are_those_of_the_steps_in_a_checkpoint(comm, directory):
    for again in (False, True):
        monitor = Monitoring(directory / "run", batch=4)
        opt = made(comm, monitor, checkpoint=directory, checkpoint_every=1e-3, resume="auto")
        stop = opt.stop
        for _ in opt.steps(2000, at_center=lambda _: again or not folders(directory) or stop(), every=2):  # noqa: B023
            opt.minimize(loss)
        opt.close()
        comm.Barrier()
        if comm.rank == 0 and not again:  # as where it is killed: the last is one that was written meanwhile
            shutil.rmtree(folders(directory)[0])
        comm.Barrier()
        if not folders(directory):
            return
    result = read(directory / "run").result
    assert result["samples"] == 4 * result["steps"]


def test_the_short_last_batch_of_an_epoch_is_counted_as_it_is(comm, directory):
    """Three epochs of 4, 4 and 2 samples, in loops that are no multiples of one."""
    opt = made(comm, Monitoring(directory, samples=10, batch=4))
    for steps in (2, 2, 5):
        train(opt, loops=1, steps=steps)
    opt.close()
    comm.Barrier()
    assert read(directory).result["samples"] == 30


def test_what_has_ended_all_loops_ends_those_of_a_run_that_is_resumed(comm, directory):
    taken = []
    for stop_at in (0.5, 0.5, 0.2):
        monitor = Monitoring(directory, distance, every=20, metric="error:min", stop_at=stop_at)
        opt = made(comm, monitor, checkpoint=directory, resume="auto")
        train(opt, steps=2000)
        assert f"stop_at {stop_at}" in opt.stopped
        taken.append(comm.bcast(opt.taken))
        opt.close()
        comm.Barrier()
    assert 0 < taken[0] == taken[1] < taken[2] < 4000


def test_patience_counts_on_in_a_run_that_is_resumed(comm, directory):
    """A metric that never gets better than at first, in parts of one or two evaluations each."""
    for part in range(1, 20):
        monitor = Monitoring(directory, lambda _: {"error": 1.0}, every=20, metric="error:min", patience=8)
        opt = made(comm, monitor, checkpoint=directory, resume="auto")
        train(opt, loops=part, steps=30)
        opt.close()
        if opt.stopped:
            break
    assert "not better in 8 evaluations" in opt.stopped


def test_a_run_that_begins_anew_takes_no_best_of_another(comm, directory):
    for steps in (120, 20):  # the second, whose checkpoints are gone, comes less far
        opt = made(
            comm, Monitoring(directory, distance, every=10, metric="error:min"), resume="auto", checkpoint=directory
        )
        train(opt, loops=1, steps=steps)
        opt.close()
        comm.Barrier()
        best = read(directory).result["best"]
        assert best["step"] <= steps
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(directory / "checkpoints")
        comm.Barrier()


def test_only_what_is_asked_for_is_measured(comm, directory):
    opt = made(comm, directory)
    train(opt)
    opt.close()
    comm.Barrier()
    run = read(directory)
    assert run.state == "done"
    assert not of(run, "evaluation")
    assert not (directory / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 0}, "every must be"),
        ({"metric": "error:min"}, "needs evaluate"),
        ({"metric": "speed", "evaluate": distance}, "speed:max or speed:min"),
        ({"stop_at": 1.0, "evaluate": distance}, "monitor"),
        ({"samples": 0}, "samples must be"),
        ({"batch": 0}, "batch must be"),
        ({"writers": "pigeon"}, "pigeon"),
    ],
)
def test_what_is_refused(comm, directory, options, text):
    with pytest.raises(ConfigError, match=text):
        made(comm, Monitoring(directory / "run", **options))


def test_where_all_ranks_train(comm, directory):
    monitor = Monitoring(directory, distance, every=20, metric="error:min", stop_at=0.5)
    opt = AGNOptimizer(sgd(0.1), {"w": np.zeros(6)}, comm, 2, monitor=monitor, rule=rules.synchronous())
    with pytest.raises(RuntimeError, match="without a number"):
        train(opt)
    for _ in opt.steps():
        opt.minimize(loss)
    assert "error" in opt.stopped
    opt.close()
    comm.Barrier()
    assert read(directory).state == "done"


def test_with_several_centers_and_in_one_process(comm, directory):
    for name, where, transport in (
        ("several", comm, transports.p2p(centers=comm.size - 1)), ("one", MPI.COMM_SELF, transports.local(workers=1)),
    ):  # fmt: skip
        path = directory / name / str(comm.rank if where is MPI.COMM_SELF else 0)
        opt = made(where, Monitoring(path, distance, every=30, metric="error:min"), transport=transport)
        train(opt)
        opt.close()
        comm.Barrier()
        run = read(path)
        assert run.result["steps"] == 240
        assert run.result["best"]["value"] < 0.5
        assert of(run, "evaluation")[-1]["metrics"] == distance(opt.center)


def test_its_run_is_none_of_the_command_lines(comm, directory):
    with made(comm, directory / "run") as opt:
        train(opt, loops=1, steps=20)
    with pytest.raises(ValueError, match=r"is the run of a loop of its own, in .*: start that script again"):
        load_run(directory / "run")
