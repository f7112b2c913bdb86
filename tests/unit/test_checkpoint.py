"""Checkpoints as files: facts that are odd, blocks that are read by others, old ones that go."""

import json
import os
import re
from itertools import islice

import numpy as np
import pytest

from agnmpi import momentum
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.division import rounds
from agnmpi.core.leases import Lease, Leases
from agnmpi.core.params import parts
from agnmpi.recovery.checkpoint import (
    center_file,
    folder,
    folders,
    newest,
    prune,
    read_center,
    read_facts,
    read_span,
    read_worker,
    seal,
    set_aside,
    unseal,
    worker_file,
)
from agnmpi.recovery.saver import CenterSaver


def leases(next_step, free):
    return {"next": next_step, "free": free, "committed": next_step - sum(steps for _, steps in free)}


@pytest.mark.parametrize(
    ("fact", "value", "text"),
    [
        ("leases", {"next": 3}, "'leases' is {'next': 3}, which cannot be"),
        ("clock", -1, "'clock' is -1, which cannot be"),
        ("centers", 0, "'centers' is 0"),
        ("layout", {"names": ["w"]}, "'layout' is"),
        ("samples", None, "does not say 'samples'"),
        ("workers", None, "does not say 'workers'"),
        ("seconds", float("nan"), "'seconds' is nan"),
        ("steps", 1 << 70, "'steps' is 11805"),
        ("leases", leases(8, [[0, 4], [2, 4]]), "'leases' is"),
        ("leases", leases(8, [[4, 8]]), "'leases' is"),
        ("leases", leases(8, [[0, 4]]) | {"committed": 9}, "'leases' is"),
        ("leases", leases(8, []), "says that 8 steps are committed, but that c has 0"),
        ("layout", {"names": ["w"], "shapes": [[3]], "offsets": [0, 5], "dtype": "float32"}, "'layout' is"),
    ],
)
def test_a_missing_or_odd_fact_is_named(tmp_path, fact, value, text):
    facts = {
        "centers": 1, "workers": 2, "layout": {"names": ["w"], "shapes": [[3]], "offsets": [0, 3], "dtype": "float32"},
        "samples": 5, "seconds": 0.5,
    }  # fmt: skip
    center = Center(rules.agn(), np.ones(3, "f4"), 2)
    where = folder(tmp_path, 1)
    where.mkdir(parents=True)
    arrays, own = center.save(np.ones(3, "f4"))
    facts |= own
    seal(center_file(where), arrays, facts)
    assert read_center(where)[1] == facts
    facts[fact] = value
    seal(center_file(where), arrays, {key: value for key, value in facts.items() if value is not None or key != fact})
    with pytest.raises(ValueError, match=re.escape(text)):
        read_center(where)
    said = []
    assert newest(tmp_path, said.append) is None
    assert text in said[0]


def a_checkpoint(run, c, center=None, **told):
    """A whole checkpoint of one center and no worker, as a run writes it; returns its folder."""
    layout = {"names": ["w"], "shapes": [[c.size]], "offsets": [0, c.size], "dtype": "float32"}
    where, center = folder(run, 1), center or Center(rules.agn(), c, 1)
    where.mkdir(parents=True, exist_ok=True)
    arrays, facts = center.save(c)
    facts |= {"centers": 1, "workers": 1, "layout": layout, "samples": 0, "seconds": 0.0} | told
    seal(center_file(where), arrays, facts)
    return where


def test_a_lease_of_any_length_takes_no_memory(tmp_path):
    many = 10**12
    where = a_checkpoint(tmp_path, np.ones(3, "f4"), leases=leases(many, [[0, many]]))
    work = Leases(many, 2)
    work.restore(read_center(where)[1]["leases"])
    assert [work.grant(0) for _ in range(2)] == [Lease(0, 2), Lease(2, 2)]
    assert list(islice(rounds(many, 2, 0, 1, many, work.free), 2)) == [Lease(4, 2), Lease(6, 2)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_center_that_is_not_finite_is_neither_written_nor_read(tmp_path, value):
    c = np.array([1, value, 2], "f4")
    with pytest.raises(ValueError, match="'c' holds NaN or infinity"):
        read_center(a_checkpoint(tmp_path, c))
    said, center = [], Center(rules.agn(), c, 1)
    saver = CenterSaver(tmp_path / "run", center, dict, said.append)
    saver.save(c, 5)
    with pytest.raises(RuntimeError, match=r"'c' holds NaN or infinity at step 0: the run has diverged"):
        saver.finish()
    assert folders(tmp_path / "run") == []


def test_what_is_no_file_is_not_opened(tmp_path):
    where = a_checkpoint(tmp_path, np.ones(3, "f4"))
    path, moved = center_file(where), tmp_path / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(ValueError, match="is no file"):
        read_center(where)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no file"):
        read_center(where)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is no file"):
        read_center(where)


def sparse(path, arrays, facts):
    """A safetensors file of zeros, which takes no room on the disk."""
    end, header = 0, {"__metadata__": {"agnmpi": json.dumps(facts), "sha256": "0" * 64}}
    for name, size in arrays.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]}
        end += 4 * size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def test_sizes_beyond_memory_are_refused_before_they_are_read(tmp_path):
    where = a_checkpoint(tmp_path, np.ones(3, "f4"))
    facts = read_facts(where)
    for arrays, text in [
        ({"c": 1 << 40}, "'c' is F32 of shape (1099511627776,), but should be 3 numbers"),
        ({"c": 3, "slot/m": 1 << 40}, "'slot/m' is F32"),
        ({"c": 3, "evil": 3}, "has an array 'evil'"),
        ({"m": 3}, "has no 'c'"),
        ({"c": 3} | {f"slot/{i}": 3 for i in range(1000)}, "has 1001 arrays"),
    ]:
        sparse(center_file(where), arrays, facts)
        with pytest.raises(ValueError, match=re.escape(text)):
            read_center(where)
    sparse(worker_file(where, 0), {"x": 3, "o": 1 << 40}, {})
    with pytest.raises(ValueError, match="'o' is F32"):
        read_worker(where, 0, 3)


@pytest.mark.parametrize(("fact", "value"), [("optimizer_step", "7"), ("clock", None), ("worker", -1)])
def test_a_workers_facts_are_checked(tmp_path, fact, value):
    facts = {"worker": 0, "clock": 2, "optimizer": "adam", "optimizer_step": 3}
    arrays = {name: np.ones(3, "f4") for name in ("x", "o", "slot/m")}
    path = worker_file(tmp_path, 0)
    seal(path, arrays, facts)
    assert read_worker(tmp_path, 0, 3)[1] == facts
    seal(path, arrays, facts | {fact: value})
    with pytest.raises(ValueError, match=f"says that {fact!r} is {value!r}"):
        read_worker(tmp_path, 0, 3)


def test_a_part_of_the_vectors_is_read_from_the_files_that_hold_it(tmp_path, monkeypatch):
    size, spans = 10, list(parts(10, 3))
    layout = {"names": ["w"], "shapes": [[size]], "offsets": [0, size], "dtype": "float32"}
    c = np.arange(size, dtype="f4")
    for i, span in enumerate(spans):
        center = Center(rules.agn(), c[span], 1, momentum(0.1))
        arrays, facts = center.save(c[span])
        told = {"centers": 3, "workers": 1, "layout": layout, "samples": 0, "seconds": 0.0}
        folder(tmp_path, 1).mkdir(parents=True, exist_ok=True)
        seal(center_file(folder(tmp_path, 1), i), arrays, {**told, **facts})
    read = []
    monkeypatch.setattr(
        "agnmpi.recovery.checkpoint.unseal", lambda path, *check: read.append(path.name) or unseal(path, *check)
    )
    facts = read_facts(folder(tmp_path, 1))
    assert read == [], "facts are read without the vectors"
    for count in (1, 2, 3, 4):
        for span in parts(size, count):
            arrays = read_span(folder(tmp_path, 1), facts, span)
            np.testing.assert_array_equal(arrays["c"], c[span])
            assert {len(x) for x in arrays.values()} == {span.stop - span.start}
    read.clear()
    read_span(folder(tmp_path, 1), facts, spans[1])
    assert read == ["center-1.safetensors"]


def test_prune_and_set_aside(tmp_path):
    def make(steps, *centers):
        where = folder(tmp_path, steps)
        where.mkdir(parents=True)
        for i in centers:
            center_file(where, i).write_text("")

    for steps, centers in ((1, (0, 1)), (2, ()), (3, (0, 1)), (4, (0,)), (5, (0, 1)), (6, (0,))):
        make(steps, *centers)
    prune(tmp_path, 2, 2)
    assert [int(found.name[5:]) for found in folders(tmp_path)] == [6, 5, 4, 3], "what is newer may be under way"
    prune(tmp_path, 3, 2)
    assert len(folders(tmp_path)) == 4, "not as many whole ones"
    set_aside(tmp_path, folder(tmp_path, 5))
    assert [int(found.name[5:]) for found in folders(tmp_path)] == [5, 4, 3]
    set_aside(tmp_path, None)
    assert folders(tmp_path) == []
    assert [found.name[:24] for found in (tmp_path / "checkpoints").iterdir()] == ["broken-step-000000000006"]
