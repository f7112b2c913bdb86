"""A center on each host, with the ranks of this machine placed on hosts that are told."""

import json
from dataclasses import replace

import numpy as np
import pytest
from launcher import ROOT
from mpi4py import MPI

import agnmpi
from agnmpi import AGNOptimizer, Config, sgd
from agnmpi.bench import problem
from agnmpi.cluster import placement
from agnmpi.cluster.placement import one_center_per_host
from agnmpi.recovery.checkpoint import folders, newest, read_center
from agnmpi.recovery.files import load
from agnmpi.training.job import train
from agnmpi.transport import registry
from agnmpi.transport.agreement import ConfigError

pytestmark = pytest.mark.mpi(min_size=3)

TRANSPORTS = [entry for entry in registry.entries() if entry.capabilities.shards]
# The host of each rank, in a world of `size`.
PLACEMENTS = {
    "block": lambda size: [2 * rank // size for rank in range(size)],
    "cyclic": lambda size: [rank % 2 for rank in range(size)],
    "mixed": lambda size: [0, 1, 1, 2, 0, 2, 3, 3, 3][:size],
    "rank 0 alone": lambda size: [min(rank, 1) for rank in range(size)],
    "one host": lambda size: [0] * size,
}


@pytest.fixture
def placed(monkeypatch, comm):
    """Place the ranks: returns the ranks of the centers."""

    def place(name):
        hosts = PLACEMENTS[name](comm.size)
        monkeypatch.setattr("agnmpi.cluster.setup.hosts", lambda comm: hosts)
        return one_center_per_host(hosts)

    return place


def test_this_machine_is_one_host(comm):
    assert placement.hosts(comm) == [MPI.Get_processor_name()] * comm.size


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_rank_has_its_place_among_those_of_its_host(comm, name, monkeypatch):
    """In whatever order a launcher lists the hosts: cores and GPUs are shared out by it."""
    hosts = PLACEMENTS[name](comm.size)
    monkeypatch.setattr(placement, "hosts", lambda comm: hosts)
    place = placement.place(comm, comm.rank > 0)
    here = [rank for rank in range(comm.size) if hosts[rank] == hosts[comm.rank]]
    assert place.local_size == len(here)
    assert place.worker_index == sum(0 < rank < comm.rank for rank in here)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_sums_are_exact_and_every_rank_has_them(comm, placed, name, transport):
    """Gradient −1, −2, …: each commit adds its place in the vector, so that no block can stand for another."""
    centers = placed(name)
    transport = replace(transport, center_per_host=True)
    gradient = -np.arange(1.0, 8.0)
    with AGNOptimizer(sgd(1.0), {"w": np.full(7, float(comm.rank))}, comm, 3, transport=transport) as opt:
        taken = []
        for total in (20, 10):  # two loops
            for step in opt.steps(total):
                opt.minimize(lambda p: (1.0, {"w": gradient}))
                taken.append(step)
            np.testing.assert_array_equal(opt.center["w"], -gradient * opt.global_step)
            np.testing.assert_array_equal(opt.params["w"], opt.center["w"])
        assert opt.is_center == (comm.rank in centers)
        assert opt.num_workers == comm.size - len(centers)
        assert opt.comm.rank == comm.rank, "the order of ranks is the caller's"
        assert not (opt.is_center and taken)
        everyone = comm.allgather(taken)
        assert sorted(step for steps in everyone for step in steps) == sorted([*range(20), *range(10)])
        assert len(set(comm.allgather(opt.global_step))) == 1


def quadratic(comm, directory, **options):
    given = {"batch": 16, "rate": 0.05, "period": 4, "epochs": 3.0, "evaluate_every": 0.0, **options}
    return Config(f"{ROOT}/tests/support/problems.py:Quadratic", run_dir=directory, **given)


def said(capfd):
    return "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("before", "after", "transport"),
    [("block", "mixed", "p2p"), ("mixed", "one host", "rma"), ("cyclic", "block", "p2p")],
)
def test_resume_with_another_placement(comm, placed, tmp_path, capfd, before, after, transport):
    run = comm.bcast(tmp_path / "run")
    centers = placed(before)
    options = {"centers": "hosts", "transport": transport, "checkpoint_commits": 3, "center_optimizer": "momentum"}
    result = agnmpi.train(quadratic(comm, str(run), center_rate=0.5, **options), comm)
    if comm.rank == 0:
        names = ", ".join(f"rank {rank} on {MPI.Get_processor_name()}" for rank in centers)
        assert f"center{'s' if len(centers) > 1 else ''}: {names}\n" in said(capfd)
        assert (result["workers"], result["samples"]) == (comm.size - len(centers), 3 * 240)
        files = sorted(path.name for path in folders(run)[0].glob("center-*"))
        assert files == [f"center-{i}.safetensors" for i in range(len(centers))]
        assert len(folders(run)) > 1, "a cut on the way, and the end"
        (arrays, facts), *_ = map(read_center, folders(run))  # each is whole, and one cut
        assert (facts["centers"], facts["workers"], facts["steps"]) == (len(centers), result["workers"], 45)
        final, _ = load(run / "center.safetensors")
        layout = facts["layout"]
        whole = np.concatenate([final[key].ravel() for key in layout["names"]])
        np.testing.assert_array_equal(arrays["c"], whole)
    centers = placed(after)
    result = agnmpi.train(quadratic(comm, None, resume=str(run), **{**options, "epochs": 6.0}), comm)
    if comm.rank == 0:
        assert "resumed from step-000000000045: 45 of 90 steps" in said(capfd)
        assert (result["workers"], result["samples"]) == (comm.size - len(centers), 6 * 240)
        assert (result["steps"], result["lost"]) == (90, [])
        assert result["metrics"]["distance"] < 0.76, "0.765 before the first step"
        assert newest(run, pytest.fail)[2]["centers"] == len(centers)


def test_a_silent_worker_is_named_by_its_rank_in_the_world(comm, placed, tmp_path, capfd, monkeypatch):
    """The first worker: in worlds of 4 and more rank 1, before the second center."""
    centers = placed("block")
    monkeypatch.setenv("AGNMPI_FAULTS", "stall:1@2:3")  # by its rank in the world, too
    slow = {"slow": 0.02}  # rank 1 comes to its third step, whoever gets the cores
    options = {"centers": "hosts", "stall_limit": 1.0, "keep_checkpoints": 0, "options": slow}
    train(quadratic(comm, comm.bcast(str(tmp_path / "run")), **options), comm, inject=True)
    if comm.rank == 0:
        assert centers == [0, (comm.size + 1) // 2][: 1 + (comm.size > 3)]
        output = said(capfd)
        assert f"WARNING: rank 1 on {MPI.Get_processor_name()} is silent for" in output
        assert not any(
            f"rank {rank} on" in line
            for rank in range(2, comm.size)
            for line in output.splitlines()
            if "silent" in line
        )


def test_a_rank_that_serves_has_the_threads_of_one(comm, placed, monkeypatch):
    """How the cores of a host are shared depends on who trains there."""
    centers, trains = placed("block"), []
    original = placement.place

    def place(comm, busy, spare):
        trains.append(busy)
        return original(comm, busy, spare)

    monkeypatch.setattr("agnmpi.cluster.setup.place", place)
    AGNOptimizer(sgd(0.1), np.zeros(3), comm, transport=registry.p2p(centers="hosts")).close()
    assert trains == [comm.rank not in centers]


def test_a_spare_has_a_workers_share_of_the_cores_and_takes_none(comm, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)))
    spares = int(comm.size > 2)
    place = placement.place(comm, comm.rank > 0, comm.rank >= comm.size - spares)
    assert place.threads == (12 // (comm.size - 1 - spares) if comm.rank else 1)
    assert place.worker_index == max(0, comm.rank - 1)


def test_the_bench_of_a_problem_measures_with_these_centers(comm, placed, tmp_path):
    centers, file = placed("block"), tmp_path / "bench.json"
    problem.main(comm, quadratic(comm, None, centers="hosts"), problem.Options(["p2p"], 0.02, str(file)))
    if comm.rank == 0:
        report = json.loads(file.read_text())
        assert report["centers"] == len(centers)
        assert [costs["workers"] for costs in report["costs"]] == [comm.size - len(centers)]


def test_ranks_that_differ_are_refused_on_all(comm, tmp_path):
    centers = "hosts" if comm.rank == 0 else 1
    with pytest.raises(ConfigError, match=r"option centers differs between ranks: 'hosts' on rank 0; 1 on rank"):
        agnmpi.train(quadratic(comm, str(tmp_path / "run"), centers=centers), comm)
    with pytest.raises(ConfigError, match="transport differs between ranks: p2p, centers hosts"):
        AGNOptimizer(sgd(0.1), np.zeros(3), comm, transport=registry.p2p(centers=centers))


def test_groups_share_their_host(comm, monkeypatch):
    """Two groups that train at the same time: their workers have devices of their own, and share the cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(4 * comm.size)))
    number = comm.rank % 2
    group = comm.Split(number, comm.rank)
    placement.divide_hosts(comm, group, number)
    copy = group.Dup()
    place = placement.place(copy, trains=True)
    assert place.worker_index == number * group.size + group.rank
    assert place.threads == 4 * comm.size // group.size // 2
    assert placement.place(comm, trains=True).threads == 4
    copy.Free()
    group.Free()
