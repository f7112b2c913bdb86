"""Agreeing over real messages: alike, with few different strings, and with one for each rank."""

import pytest

from agnmpi.transport.agreement import ConfigError, allgather, raise_on_all, require_equal

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("few", [16, 0], ids=["one by one", "all at once"])
@pytest.mark.parametrize("text", ["", "λ", "long" * 10_000])
def test_strings_are_gathered_by_rank(comm, text, few):
    assert allgather(comm, text, few) == [text] * comm.size
    assert allgather(comm, text * (comm.rank % 2), few) == [text * (rank % 2) for rank in range(comm.size)]
    assert allgather(comm, text + str(comm.rank), few) == [text + str(rank) for rank in range(comm.size)]


def test_refusals_are_heard_of_everywhere(comm):
    def make():
        if comm.rank == 1:
            raise OSError("no room")
        return comm.rank

    with pytest.raises(ConfigError, match=r"^no room \(rank 1\)$"):
        raise_on_all(comm, make)
    assert raise_on_all(comm, lambda: comm.rank) == comm.rank


def test_facts_that_differ_are_named(comm):
    facts = {"period": "3", "rule": "agn"}
    require_equal(comm, facts)
    with pytest.raises(ConfigError, match=r"^period differs between ranks: 3 on ranks? [\d-]+; 4 on rank \d+$"):
        require_equal(comm, facts | {"period": "34"[comm.rank == comm.size - 1]})
    with pytest.raises(ConfigError, match=r"^seed differs between ranks: missing on ranks? [\d-]+; 1 on rank"):
        require_equal(comm, facts | ({"seed": "1"} if comm.rank == comm.size - 1 else {}))
