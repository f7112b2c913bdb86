import pytest
from conformance import CHECKS, SIZES, LocalWorld


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("n", SIZES[:2])
def test_conformance(check, workers, n):
    check(LocalWorld(workers), n)
