"""Agreeing costs each rank some bytes, however many ranks and words there are; those who differ are named."""

import numpy as np
import pytest
from fake_comm import FakeWorld
from hypothesis import given, settings
from hypothesis import strategies as st

from agnmpi.cluster.placement import require_equal_model
from agnmpi.core.params import Layout
from agnmpi.transport.agreement import ConfigError, allgather, digest, equal_on_all, raise_on_all, require_equal

RANKS = 1000
SOME = 100  # where each has much to read
MODEL = Layout.of({f"block.{i}.attention.weight": np.zeros((2, 3), "f4") for i in range(300)})
WORDS = sum(map(len, MODEL.names))
OPTIONS = {f"option {i}": "value" for i in range(40)}


def messages(results):
    assert all(isinstance(result, ConfigError) for result in results), results[:3]
    return {str(result) for result in results}


def test_a_thousand_ranks_agree_on_a_model_in_a_few_bytes():
    results, nbytes = FakeWorld(RANKS).run(lambda comm: require_equal_model(comm, MODEL, OPTIONS))
    assert results == [None] * RANKS
    assert max(nbytes) < 100


def test_a_thousand_ranks_agree_that_nobody_refuses():
    results, nbytes = FakeWorld(RANKS).run(lambda comm: raise_on_all(comm, lambda: comm.rank))
    assert results == list(range(RANKS)), "each has its own"
    assert max(nbytes) < 100


def test_who_has_another_model_is_named_in_a_few_kilobytes():
    """One rank has another shape, one another parameter in place of one: words of what differs alone."""
    wide = Layout.of({name: np.zeros((2, 4 if i == 7 else 3), "f4") for i, name in enumerate(MODEL.names)})

    def shapes(comm):
        require_equal_model(comm, wide if comm.rank == 50 else MODEL, OPTIONS)

    results, nbytes = FakeWorld(SOME).run(shapes)
    (text,) = messages(results)
    assert text == (
        "parameter 'block.7.attention.weight' differs between ranks: "
        "shape (2, 3) on ranks 0-49, 51-99; shape (2, 4) on rank 50"
    )
    assert max(nbytes) < 16 * SOME + 40 * (len(MODEL.names) + len(OPTIONS))

    other = Layout.of({name if i != 7 else "other": np.zeros((2, 3), "f4") for i, name in enumerate(MODEL.names)})

    def names(comm):
        require_equal_model(comm, other if comm.rank == 3 else MODEL, OPTIONS)

    results, nbytes = FakeWorld(SOME).run(names)
    (text,) = messages(results)
    assert "parameter 'other' differs between ranks: missing on ranks 0-2, 4-99; shape (2, 3) on rank 3" in text
    assert max(nbytes) < 16 * SOME + 10 * WORDS, "each of the two lists has travelled once"


def test_refusals_name_their_ranks():
    def refuse(comm):
        if comm.rank % 40 == 7:
            raise FileNotFoundError(f"no data {comm.rank // 80}")

    results, nbytes = FakeWorld(SOME).run(lambda comm: raise_on_all(comm, lambda: refuse(comm)))
    assert messages(results) == {"no data 0 (ranks 7, 47)\nno data 1 (rank 87)"}
    assert max(nbytes) < 20 * SOME

    results, _ = FakeWorld(3).run(lambda comm: raise_on_all(comm, lambda: int("x")))
    assert messages(results) == {"invalid literal for int() with base 10: 'x'"}, "all have it: nobody is named"


def test_a_refusal_without_words_is_one():
    def refuse():
        raise ValueError

    results, _ = FakeWorld(2).run(lambda comm: raise_on_all(comm, refuse if comm.rank else int))
    assert messages(results) == {"ValueError (rank 1)"}


def test_what_differs_on_every_rank_is_said_in_short():
    results, _ = FakeWorld(100).run(lambda comm: require_equal(comm, {"samples": str(comm.rank), "period": "3"}))
    (text,) = messages(results)
    assert text.startswith("samples differs between ranks: 0 on rank 0; 1 on rank 1; ")
    assert text.endswith("; … and 95 more")
    assert "period" not in text


@settings(max_examples=30)
@given(texts=st.lists(st.text(max_size=5), min_size=1, max_size=40))
def test_strings_are_gathered_by_rank(texts):
    results, _ = FakeWorld(len(texts)).run(lambda comm: allgather(comm, texts[comm.rank]))
    assert results == [texts] * len(texts)


@pytest.mark.parametrize("values", [(-(2**63), 2**63 - 1), (-(2**63), -(2**63)), (0, -1)])
def test_the_ends_of_the_numbers_are_told_apart(values, monkeypatch):
    """A digest may be any number of 64 bits, the least one, too, whose negative is itself."""
    monkeypatch.setattr("agnmpi.transport.agreement.digest", lambda text: int(text))
    results, _ = FakeWorld(2).run(lambda comm: equal_on_all(comm, str(values[comm.rank])))
    assert results == [len(set(values)) == 1] * 2


def test_digests_are_the_same_in_every_process():
    """Python's own hash of a string is not."""
    assert digest("agn") == 3401208941126732979
