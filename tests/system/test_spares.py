"""Spares take the places of lost ranks: the number of workers stays, and every sample is counted once an epoch."""

import numpy as np
import pytest
from launcher import PROBLEMS, QUADRATIC, ULFM, agnmpi, events_of, has_ulfm, result_of

from agnmpi.recovery.files import load

LIMIT = 90
GIVEN = ["--rule", "downpour", "--optimizer", "sgd", "--rate", "1", "--batch", "4", "--period", "3", "--epochs", "8"]
ulfm = pytest.mark.skipif(not has_ulfm(), reason="spares need ULFM, which Open MPI 5 has")
SCHEDULES = [
    ("kill:2@20", 4, 1),
    ("kill:0@40", 4, 2),
    pytest.param("kill:1@20,kill:2@30,kill:3@40", 6, 3, marks=pytest.mark.long),
    pytest.param("kill:0@40,kill:2@50,kill:4@3", 6, 3, marks=pytest.mark.long),
    pytest.param("kill:1@10,kill:2@10", 5, 2, marks=pytest.mark.long),  # all workers at once
    pytest.param("kill:3@0", 4, 1, marks=pytest.mark.long),  # a spare that was never called lives
]


@ulfm
@pytest.mark.parametrize(("faults", "ranks", "spares"), SCHEDULES)
def test_a_spare_takes_the_place_of_a_lost_rank(tmp_path, faults, ranks, spares):
    run = tmp_path / "run"
    given = ["--spares", str(spares), "--set", "options.slow=0.003", "--inject-faults", "--run-dir", run]
    code, output = agnmpi(
        ranks,
        "train",
        f"{PROBLEMS}:Counts",
        *GIVEN,
        *given,
        env={"AGNMPI_FAULTS": faults},
        timeout=LIMIT,
        launcher=ULFM,
    )
    killed = 0 if faults == "kill:3@0" else faults.count("kill")
    assert code == (76 if killed else 0), output
    joined = [event["rank"] for event in events_of(run) if event["event"] == "joined"]
    assert len(set(joined)) == len(joined) == min(killed, spares), output
    count = load(run / "center.safetensors")[0]["count"]
    np.testing.assert_array_equal(count, np.full(240, 8.0))
    assert result_of(run)["workers"] == ranks - 1 - spares


def test_spares_are_refused_where_no_rank_can_be_lost():
    code, output = agnmpi(3, "train", QUADRATIC, "--spares", "1", "--steps", "4", timeout=LIMIT)
    assert code == 2, output
    assert "spares = 1 take the places of lost ranks: start it with mpiexec --with-ft ulfm" in output


@ulfm
def test_one_worker_remains():
    code, output = agnmpi(3, "train", QUADRATIC, "--spares", "2", "--steps", "4", timeout=LIMIT, launcher=ULFM)
    assert code == 2, output
    assert "leave no worker beside the center" in output
