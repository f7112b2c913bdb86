"""One training through hundreds of kills: every sample is counted once an epoch, and it learns as undisturbed."""

import pytest
from launcher import has_ulfm
from many_kills import kill_jobs, kill_ranks, undisturbed

pytestmark = pytest.mark.long


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not has_ulfm(), reason="this MPI ends the whole job when a rank dies: no ULFM")
def test_three_hundred_kills_of_ranks(tmp_path):
    told = kill_ranks(300, 0)
    print(told)
    assert told["kills"] == 300
    assert told["failover"] > 0 < told["joined"]
    assert told["accuracy"] == pytest.approx(undisturbed(300, tmp_path), abs=0.02)


@pytest.mark.timeout(600)
def test_goodput_of_jobs_that_are_killed_whole():
    told = kill_jobs(6, 0)
    print(told)
    assert 0.8 < told["goodput without start-up"] < 1.05
    assert told["goodput"] < told["goodput without start-up"]
