"""Thousands of broken messages, checkpoints, run directories and configurations: a clear error, or a right load.

With AGNMPI_LONG=1 four hundred thousand. No code is run.
"""

import os
import random
import re
import shutil
import tomllib
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agnmpi import momentum
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import NONE, Lease, Leases
from agnmpi.core.messages import DUPLICATE, MISFIT, REFUSED, WORK, Commit, Reply
from agnmpi.recovery import facts as schema
from agnmpi.recovery.checkpoint import center_file, folder, newest, seal, unseal
from agnmpi.training.config import Config, load

often = pytest.mark.parametrize("times", [1, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])


def mutate(rng, content):
    """Flip, cut, repeat or insert bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content)) if content else 0
        kind = rng.randrange(5)
        if kind == 0 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            content[at:at] = content[at : at + rng.randint(1, 40)]
        elif content:
            content[at] = rng.choice(b'\x00\xff"[]{}=-.e9')
    return bytes(content)


@often
def test_messages(times):
    """Whatever a header says, a center that takes it in checks it first; c stays finite."""
    rng, refused, taken = random.Random(times), [], 0
    good = Commit(1, 5, steps=3, first_step=6, clock=2, requests=WORK, nbytes=24, loss=0.5)
    for _ in range(5000 * times):
        c = np.zeros(3)
        center = Center(rules.agn(), c, 2)
        center.clock, center.leases = 2, Leases(40, 3)
        for _ in range(6):
            center.leases.grant(1)
        header = mutate(rng, good.encode())
        try:
            commit = Commit.decode(header).received_from(1, [24])
            payload = np.ones(3) if commit.nbytes and not commit.flags & MISFIT else None
            reply = center.apply(commit._replace(payload=payload), c)
            assert reply.clock in (2, 3)
            assert reply.status in (REFUSED, DUPLICATE) or not commit.flags & MISFIT
            taken += 1
        except ValueError as error:
            refused.append(str(error))
        assert np.isfinite(c).all()
        try:
            Reply.decode(mutate(rng, Reply(3, applied=(1, 2)).encode()))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 1000
    unclear = [text for text in refused if not re.search(r"header|worker 1 ", text)]
    assert not unclear
    assert taken > 100


@often
def test_checkpoints(tmp_path, times):
    """Only what carries its checksum is read, and then it is what was written."""
    rng, path = random.Random(times), tmp_path / "center-0.safetensors"
    arrays, facts = {"c": np.arange(6, dtype="f4"), "slot/m": np.ones(6)}, {"clock": 3, "leases": {"free": [[1, 2]]}}
    seal(path, arrays, facts)
    content, refused = path.read_bytes(), []
    for _ in range(3000 * times):
        path.write_bytes(mutate(rng, content))
        try:
            found, said = unseal(path)
        except (ValueError, OSError) as error:
            refused.append(str(error))
            continue
        assert said == facts
        for name, x in arrays.items():
            np.testing.assert_array_equal(found[name], x)
    assert len(refused) > 2000
    assert all(str(path) in text for text in refused)


def write_run(run):
    """Two checkpoints of two centers each; c holds the number of steps."""
    for steps in (100, 200):
        center, c = Center(rules.agn(), np.zeros(3), 1), np.full(3, float(steps))
        center.clock = center.steps = steps
        arrays, facts = center.save(c)
        facts |= {"centers": 2, "workers": 1, "samples": steps, "seconds": 1.0}
        facts["layout"] = {"names": ["w"], "shapes": [[6]], "offsets": [0, 6], "dtype": "float64"}
        folder(run, steps).mkdir(parents=True)
        for i in range(2):
            seal(center_file(folder(run, steps), i), arrays, facts)


def damage(rng, run):
    """Do something to a file or directory of it."""
    path = rng.choice(sorted(run.rglob("*")))
    if path.is_file() and rng.random() < 0.4:
        path.write_bytes(mutate(rng, path.read_bytes()))
        return
    there = path.with_name(
        rng.choice(["step-x", "step-" + "9" * 20, "step-000000000150", "center-0.safetensors", "é\n"])
    )
    what = rng.randrange(4)
    if what == 0 and not there.exists():
        path.rename(there)
        return
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if what == 1:
        path.mkdir()
    elif what == 2:
        os.mkfifo(path)
    elif what == 3:
        path.symlink_to(rng.choice([path, run, "/dev/zero", "/nowhere", center_file(folder(run, 100))]))


@often
def test_run_directories(tmp_path, times):
    """The newest whole checkpoint, as it was written, whatever else lies there; each other one is named."""
    rng, found, lost = random.Random(times), {100: 0, 200: 0}, 0
    for i in range(300 * times):
        run, said = tmp_path / str(i), []
        write_run(run)
        for _ in range(rng.randint(1, 3)):
            if any(run.rglob("*")):
                damage(rng, run)
        if (checkpoint := newest(run, said.append)) is None:
            lost += 1
        else:
            _, arrays, facts = checkpoint
            np.testing.assert_array_equal(arrays["c"], np.full(6, float(facts["steps"])))
            found[facts["steps"]] += 1
        assert all("is left out: " in text for text in said)
        shutil.rmtree(run)
    assert min(lost, *found.values()) > 20 * times


COUNTS = st.integers(-2, 30)
ODD = [None, True, -1, 0, 1, 2, 3, 4.5, 1 << 40, 1 << 62, 1 << 70, 1e308, float("nan"), float("inf"), "", "w", "add"]
ODD += [[], [0], [0, 0], [-1, 0], [0, "w"], [[0, 4]], {}, {"next": 3}, {"w": [1]}, [[]] * 3, ...]  # …: left out
PIECES = st.lists(st.tuples(COUNTS, COUNTS).map(list), max_size=4)
LEASES = st.fixed_dictionaries({"next": COUNTS, "free": PIECES, "committed": COUNTS}, optional={"given_up": COUNTS})
LAYOUTS = st.fixed_dictionaries({
    "names": st.lists(st.sampled_from(["w", "b", 3]), max_size=2),
    "shapes": st.lists(st.lists(COUNTS, max_size=2), max_size=2),
    "offsets": st.lists(COUNTS, max_size=3),
    "dtype": st.sampled_from(["float32", 3]),
})  # fmt: skip
FACTS = ("centers", "workers", "layout", "clock", "steps", "applied", "refused", "dropped", "staleness", "leases")
FACTS += ("center_optimizer", "center_optimizer_step", "samples", "seconds", "data", "processed", "given_up", "session")
CHANGES = st.dictionaries(st.sampled_from(FACTS), st.sampled_from(ODD), max_size=2)
SPECIAL = st.fixed_dictionaries({}, optional={"leases": LEASES, "layout": LAYOUTS, "steps": COUNTS})


def check_facts(changes, special):
    """A center whose facts are taken grants each step that is not done, once; any others are refused, by name."""
    center = Center(rules.agn(), np.zeros(3), 2, momentum(0.1))
    center.leases, center.steps = Leases(30, 4), 8
    for worker in (0, 1, 0):
        center.leases.grant(worker)
    for worker, first in ((0, 0), (1, 4)):
        center.leases.commit(worker, Lease(first, 4))
    arrays, facts = center.save(np.ones(3))
    facts |= {"centers": 1, "workers": 2, "samples": 9, "seconds": 0.5}
    facts["layout"] = {"names": ["w"], "shapes": [[3]], "offsets": [0, 3], "dtype": "float64"}
    facts |= special | changes
    facts = {fact: value for fact, value in facts.items() if value is not ...}
    try:
        schema.check_center(facts, "it")
        restored, c = Center(rules.agn(), np.zeros(3), 2, momentum(0.1)), np.zeros(3)
        restored.restore(arrays, facts, c)
    except ValueError as error:
        clear = re.search(r"^it (does not say|says that)|center optimizer", str(error))
        if not clear:
            raise
        return
    assert (c == 1).all()
    if facts["leases"] is None:
        return
    work = Leases(facts["leases"]["next"], 4)
    work.restore(facts["leases"])
    granted = [step for first, steps in iter(lambda: work.grant(0), NONE) for step in range(first, first + steps)]
    assert len(granted) == len(set(granted))
    assert set(granted) <= set(range(work.total))
    assert len(granted) == work.total - facts["leases"]["committed"] - facts["leases"].get("given_up", 0)


@settings(max_examples=200)
@given(CHANGES, SPECIAL)
def test_facts(changes, special):
    check_facts(changes, special)


@pytest.mark.long
@pytest.mark.timeout(3000)
@settings(max_examples=100_000, suppress_health_check=list(HealthCheck))
@given(CHANGES, SPECIAL)
def test_very_many_facts(changes, special):
    check_facts(changes, special)


@often
def test_configurations(tmp_path, times):
    rng, path = random.Random(times), tmp_path / "config.toml"
    content, refused, good = Config(problem="m:P", options={"hidden": 3}).to_toml().encode(), [], 0
    for _ in range(3000 * times):
        path.write_bytes(mutate(rng, content))
        try:
            config = load(str(path))
            for name, value in tomllib.loads(path.read_text()).items():
                assert getattr(config, name) == value
            good += 1
        except ValueError as error:  # UnicodeDecodeError is one
            refused.append(str(error))
    assert len(refused) > 500
    options = "|".join(f.name for f in fields(Config))
    unclear = [
        text for text in refused if not re.search(rf"is no TOML|can't decode byte|{options}|unknown option", text)
    ]
    assert not unclear
    assert good > 20


def test_no_pickle_is_read(tmp_path):
    """A pickle that would run code, in the place of a checkpoint."""
    ran = tmp_path / "ran"
    path = tmp_path / "center-0.safetensors"
    path.write_bytes(b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        unseal(path)
    assert not ran.exists()
