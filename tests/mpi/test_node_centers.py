"""Node centers, with the ranks of this machine placed on hosts that are told."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from conditions import touch_when_said, until
from launcher import ROOT
from mpi4py import MPI

import agnmpi
from agnmpi import AGNOptimizer, Config, sgd, transports
from agnmpi.cluster.placement import node_centers
from agnmpi.core import rules
from agnmpi.recovery.checkpoint import folders, read_center, worker_file
from agnmpi.recovery.files import load
from agnmpi.training.job import train
from agnmpi.transport.agreement import ConfigError

pytestmark = pytest.mark.mpi(min_size=5)

# The host of each rank, in a world of `size`.
PLACEMENTS = {
    "two hosts": lambda size: [int(rank >= size // 2) for rank in range(size)],
    "rank 0 alone": lambda size: [min(rank, 1) for rank in range(size)],
    "cyclic": lambda size: [*(rank % 2 for rank in range(size - 1)), 1],
    "a lone worker": lambda size: [0, 2, *[1] * (size - 2)],
    "one host": lambda size: [0] * size,
}
STEPS = 64


@pytest.fixture
def placed(monkeypatch, comm):
    """Place the ranks: returns the groups of the hosts that have a node center."""

    def place(name):
        hosts = PLACEMENTS[name](comm.size)
        monkeypatch.setattr("agnmpi.cluster.setup.hosts", lambda comm: hosts)
        groups = node_centers(hosts)
        assert bool(groups) == (name != "one host")
        return groups

    return place


def optimizer(x, comm, period, overlap=False, **options):
    """One whose caller moves x; commits are displacements, so that c adds up what all have done."""
    transport = transports.p2p(node_centers=True, **options)
    return AGNOptimizer(None, x, comm, period, rule=rules.downpour(), transport=transport, overlap=overlap)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_step_is_committed_once_and_every_rank_has_the_sum(comm, placed, name, overlap):
    """Element i counts how often step i was committed; several loops, one without a step."""
    serving = [0, *(node for node, *_ in placed(name))]
    x, expected = np.full(STEPS, float(comm.rank)), np.zeros(STEPS)
    with optimizer(x, comm, 3, overlap) as opt:
        for total in (50, 7, 0, STEPS):
            taken = []
            for step in opt.steps(total):
                x[step] += 1
                opt.step()
                taken.append(step)
            expected[:total] += 1
            everyone = comm.allgather(taken)
            assert sorted(step for steps in everyone for step in steps) == list(range(total))
            np.testing.assert_array_equal(x, expected)
            (center,) = opt.center.values()
            np.testing.assert_array_equal(center, expected)
            assert len(set(comm.allgather(opt.global_step))) == 1
            assert not (comm.rank in serving and taken)
        assert opt.is_center == (comm.rank in serving)
        assert opt.num_workers == comm.size - len(serving)


@pytest.mark.parametrize("broken", ["one", "of every host but one", "all"])
def test_workers_that_break_off_leave_their_steps_to_the_others(comm, placed, broken):
    groups = placed("two hosts")
    leaves = {"one": [comm.size - 1], "of every host but one": groups[0][1:], "all": range(comm.size)}[broken]
    x = np.zeros(200)
    with optimizer(x, comm, 4) as opt:
        taken = []
        for step in opt.steps(200):
            x[step] += 1
            opt.step()
            taken.append(step)
            if comm.rank in leaves and len(taken) == 6:
                break
        opt.finish()
        steps = sorted(step for steps in comm.allgather(taken) for step in steps)
        assert len(set(steps)) == len(steps)
        assert (steps == list(range(200))) == (broken != "all")
        np.testing.assert_array_equal(np.flatnonzero(x), steps)
        np.testing.assert_array_equal(x[steps], 1)


@pytest.mark.parametrize("options", [{}, {"encoding": "int8", "pull_encoding": "int8"}], ids=["float32", "int8"])
def test_a_long_vector_adds_up(comm, placed, options):
    """In several pieces, with one message buffer: c is the number of commits; each pull is whole, of its clock."""
    placed("two hosts")
    x = np.zeros(300_000, np.float32)
    with optimizer(x, comm, 1, overlap=True, message_buffers=1, **options) as opt:
        for _ in opt.steps(24):
            (center,) = opt.center.values()
            assert options or center.min() == center.max() == opt.clock
            x += 1
            opt.step()
        (center,) = opt.center.values()
        np.testing.assert_allclose(center, 24, atol=0 if not options else 0.5)
        np.testing.assert_array_equal(center, x)
        assert len(set(comm.allgather(center.tobytes()[:4000]))) == 1


def quadratic(comm, directory, **options):
    given = {"batch": 16, "rate": 0.05, "period": 4, "epochs": 4.0, "evaluate_every": 0.0, **options}
    return Config(f"{ROOT}/tests/support/problems.py:Quadratic", run_dir=directory, node_centers=True, **given)


def said(capfd):
    return "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ("two hosts", "rank 0 alone", {"overlap": True}),
        ("a lone worker", "two hosts", {"outer_rate": 1.0, "staleness_cap": 0, "options": {"slow": 0.005}}),
        ("cyclic", "one host", {"encoding": "int8", "pull_encoding": "bf16", "options": {"unused": 600}}),
    ],
)
def test_a_run_is_saved_and_resumed_with_other_hosts(comm, placed, tmp_path, capfd, before, after, options):
    run = comm.bcast(tmp_path / "run")
    groups = placed(before)
    workers = comm.size - 1 - len(groups)
    result = agnmpi.train(quadratic(comm, str(run), checkpoint_commits=5, checkpoint_workers="all", **options), comm)
    assert (result is None) == bool(comm.rank)
    if comm.rank == 0:
        output, host = said(capfd), MPI.Get_processor_name()
        names = ", ".join(f"rank {node} on {host} for {len(of)} workers" for node, *of in groups)
        assert f"node center{'s' if len(groups) > 1 else ''}: {names}\n" in output
        assert f"n/λ = {workers}/4" in output
        assert (result["workers"], result["steps"], result["samples"]) == (workers, 60, 4 * 240)
        assert len(folders(run)) > 1, "on the way, and at the end"
        _, facts = read_center(folders(run)[0])
        assert (facts["centers"], facts["workers"], facts["steps"]) == (1, workers, 60)
        assert facts["leases"]["free"] == []
        assert all(worker_file(folders(run)[0], i).is_file() for i in range(workers))
        for _, facts in map(read_center, folders(run)):  # what is committed and what is granted again are all
            free = sum(steps for _, steps in facts["leases"]["free"])
            assert facts["leases"]["next"] - free == facts["leases"]["committed"] == facts["steps"]
    groups = placed(after)
    result = agnmpi.train(quadratic(comm, None, resume=str(run), **{**options, "epochs": 8.0}), comm)
    if comm.rank == 0:
        output = said(capfd)
        assert "resumed from step-000000000060: 60 of 120 steps" in output
        assert ("no host but that of rank 0 has three ranks" in output) == (not groups)
        assert (result["steps"], result["samples"]) == (120, 8 * 240)
        assert result["workers"] == comm.size - 1 - len(groups)
        assert result["metrics"]["distance"] < 0.76, "0.765 before the first step"
        assert (result["dropped"] > 0) == ("staleness_cap" in options)
        assert load(run / "center.safetensors")[0]


def test_a_silent_worker_is_named_by_its_node_center(comm, placed, tmp_path, capfd, monkeypatch):
    ((node, silent, *_),) = placed("two hosts")
    monkeypatch.setenv("AGNMPI_FAULTS", f"stall:{silent}@2:2.5")
    options = {"stall_limit": 0.5, "keep_checkpoints": 0, "epochs": 20.0, "options": {"slow": 0.02}}
    train(quadratic(comm, comm.bcast(str(tmp_path / "run")), **options), comm, inject=True)
    if comm.rank == node:
        assert f"WARNING: rank {silent} on {MPI.Get_processor_name()} is silent for" in said(capfd)


def test_ranks_that_differ_are_refused_on_all(comm):
    transport = transports.p2p(node_centers=comm.rank == 0)
    with pytest.raises(ConfigError, match="node_centers differs between ranks: True on rank 0; False on rank"):
        AGNOptimizer(sgd(0.1), np.zeros(3), comm, transport=transport)


def test_a_worker_that_is_late_is_named_by_its_node_center(comm, placed, tmp_path, monkeypatch):
    """It is late until then."""
    ((node, *_),) = placed("two hosts")
    late, x, said = comm.size - 1, np.zeros(4), Path(comm.bcast(str(tmp_path / "said")))
    monkeypatch.setattr("agnmpi.loops.warner.WAIT", 1.0)
    if comm.rank == node:
        touch_when_said(monkeypatch, said, "in steps()")
    with optimizer(x, comm, 1) as opt, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if comm.rank == late:
            until(said.exists, "nobody says anything")
        for _ in opt.steps(None):
            x += 1
            opt.step()
            break
        opt.finish()
    texts = [str(warning.message) for warning in told]
    assert comm.rank != node or any(f"rank {late} is not in steps()" in text for text in texts)
