"""Checkpoints as files: facts that are odd, blocks that are read by others, old ones that go."""

import re

import numpy as np
import pytest

from agnmpi import momentum
from agnmpi.core import rules
from agnmpi.core.center import Center
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
    seal,
    set_aside,
    unseal,
)


@pytest.mark.parametrize(
    ("fact", "value", "text"),
    [
        ("leases", {"next": 3}, "'leases' is {'next': 3}, which cannot be"),
        ("clock", -1, "'clock' is -1, which cannot be"),
        ("centers", 0, "'centers' is 0"),
        ("layout", {"names": ["w"]}, "'layout' is"),
        ("samples", None, "does not say 'samples'"),
        ("workers", None, "does not say 'workers'"),
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
    monkeypatch.setattr("agnmpi.recovery.checkpoint.unseal", lambda path: read.append(path.name) or unseal(path))
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
