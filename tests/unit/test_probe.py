"""A trial that is killed, hangs or cannot run means staged, with one clear line; nothing of it can harm the run."""

import platform

import fake_device
import numpy as np
import pytest
from mpi4py import MPI

from agnmpi.cluster import probe
from agnmpi.cluster.probe import Answer
from agnmpi.transport.agreement import ConfigError
from agnmpi.transport.registry import resolve


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AGNMPI_CUDA_AWARE", raising=False)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["sh", "-c", "kill -SEGV $$"], "killed by signal 11"),
        (["sh", "-c", "exit 139"], "killed by signal 11"),  # as an mpiexec tells it
        (["/nonexistent/mpiexec"], "could not be run"),
        (["sh", "-c", "echo no device driver >&2; exit 3"], "code 3: no device driver"),
        (["true"], "code 0: it said nothing"),
    ],
)
def test_what_goes_wrong_means_staged(command, why):
    answer = probe.run(command)
    assert answer[:2] == (False, False)
    assert why in answer.why


def test_a_trial_that_hangs_is_ended():
    answer = probe.run(["sh", "-c", "sleep 100 & wait"], timeout=0.5)
    assert answer == Answer(False, False, "the trial hung for 0.5 s")


@pytest.mark.parametrize(
    ("end", "windows", "why"),
    [
        ("kill -SEGV $$", False, "windows: the trial was killed by signal 11"),
        ("sleep 100 & wait", False, "windows: the trial hung for 1 s"),
        ("echo 'agnmpi.probe [false, \"windows: Put wrong\"]'", False, "windows: Put wrong"),
        ("echo 'agnmpi.probe [true, \"windows passed\"]'", True, "windows passed"),
    ],
)
def test_messages_work_whatever_becomes_of_windows(end, windows, why):
    answer = probe.run(["sh", "-c", f"echo 'agnmpi.probe [true, \"messages passed\"]'; {end}"], timeout=1)
    assert answer[:2] == (True, windows)
    assert answer.why == f"tried on {platform.node()}: messages passed; {why}"


def test_mpiexec_does_not_change_where_the_answer_lies(monkeypatch):
    """Open MPI's adds its own directories to LD_LIBRARY_PATH: what doctor finds without it is for the ranks."""
    before = probe.cache_file({})
    assert probe.cache_file({"LD_LIBRARY_PATH": "/opt/openmpi/lib"}) == before
    assert probe.cache_file({"UCX_TLS": "tcp"}) != before


def test_an_answer_is_kept_for_this_host_and_mpi():
    assert probe.recall() is None
    assert probe.resolve("auto") == Answer(False, False, "not tried on this host yet; type: python -m agnmpi doctor")
    probe.remember(Answer(True, False, "tried on a fake"))
    assert probe.resolve("auto") == Answer(True, False, "tried on a fake")
    assert probe.resolve("auto", {"AGNMPI_CUDA_AWARE": "0"}) == Answer(False, False, "AGNMPI_CUDA_AWARE=0")
    assert probe.resolve("staged") == Answer(False, False, "as asked for")
    for broken in ("[broken", '[true, "of an earlier version"]'):
        probe.cache_file().write_text(broken)
        assert probe.recall() is None
    assert probe.cache_file({"OMPI_MCA_pml": "ucx"}) != probe.cache_file({})
    with pytest.raises(ValueError, match="AGNMPI_CUDA_AWARE must be 0 or 1"):
        probe.resolve("auto", {"AGNMPI_CUDA_AWARE": "yes"})


def test_the_launchers_variables_do_not_reach_the_trial():
    inherited = {
        "PATH": "/bin", "PMI_RANK": "0", "PMIX_RANK": "0", "PRTE_LAUNCHED": "1", "OMPI_COMM_WORLD_SIZE": "2",
        "SLURM_JOB_ID": "7", "OMPI_MCA_pml": "ucx", "OMPI_ALLOW_RUN_AS_ROOT": "1", "MPI_LOCALNRANKS": "2",
    }  # fmt: skip
    kept = probe.stripped(inherited)
    assert kept["PATH"] == "/bin"
    assert kept["OMPI_MCA_pml"] == "ucx"
    assert not {"PMI_RANK", "PMIX_RANK", "PRTE_LAUNCHED", "OMPI_COMM_WORLD_SIZE", "SLURM_JOB_ID"} & set(kept)


X = fake_device.Vector([1, 2])


def test_a_fake_device_is_staged_with_one_line(capfd):
    assert probe.choose_wire(MPI.COMM_SELF, X, resolve("p2p")) == "staged"
    assert capfd.readouterr().err == (
        "agnmpi: wire staged: not tried on this host yet; type: python -m agnmpi doctor\n"
    )


@pytest.mark.parametrize(
    ("transport", "messages", "windows", "wire"),
    [
        ("p2p", True, False, "direct"),
        ("p2p", False, True, "staged"),
        ("rma", True, False, "staged"),
        ("rma", True, True, "direct"),
        ("accumulate", True, True, "staged"),
        ("allreduce", True, True, "staged"),
    ],
)
def test_the_wire_is_what_the_transport_needs(transport, messages, windows, wire, monkeypatch, capfd):
    for trial in ("try_messages", "try_windows"):
        monkeypatch.setattr(probe, trial, lambda _comm, _xp: "")
    probe.remember(Answer(messages, windows, "tried"))
    assert probe.choose_wire(MPI.COMM_SELF, X, resolve(transport)) == wire
    told = capfd.readouterr().err
    assert told.startswith(f"agnmpi: wire {wire}: ")
    assert ("in host memory" in told) == (transport in ("accumulate", "allreduce"))


@pytest.mark.parametrize(("transport", "trial"), [("p2p", "try_messages"), ("rma", "try_windows")])
def test_a_wrong_guess_is_refused(transport, trial, monkeypatch):
    """AGNMPI_CUDA_AWARE=1 where the numbers arrive wrong."""
    monkeypatch.setenv("AGNMPI_CUDA_AWARE", "1")
    monkeypatch.setattr(probe, trial, lambda _comm, _xp: "Recv on rank 1")
    with pytest.raises(ConfigError, match=r"wrong numbers \(Recv on rank 1\).*--wire staged"):
        probe.choose_wire(MPI.COMM_SELF, X, resolve(transport))
    monkeypatch.setattr(probe, trial, lambda _comm, _xp: "")
    assert probe.choose_wire(MPI.COMM_SELF, X, resolve(transport)) == "direct"
    assert probe.choose_wire(MPI.COMM_SELF, np.zeros(2), resolve(transport)) == "staged", "no device, nothing to choose"
