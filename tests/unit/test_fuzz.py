"""Ten thousand broken messages, checkpoints and configurations: a clear error or a right load, and no code is run."""

import random
import re
import tomllib
from dataclasses import fields

import numpy as np
import pytest

from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Leases
from agnmpi.core.messages import DUPLICATE, MISFIT, REFUSED, WORK, Commit, Reply
from agnmpi.recovery.checkpoint import seal, unseal
from agnmpi.training.config import Config, load


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


def test_messages():
    """Whatever a header says, a center that takes it in checks it first; c stays finite."""
    rng, refused, taken = random.Random(0), [], 0
    good = Commit(1, 5, steps=3, first_step=6, clock=2, requests=WORK, nbytes=24, loss=0.5)
    for _ in range(5000):
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


def test_checkpoints(tmp_path):
    """Only what carries its checksum is read, and then it is what was written."""
    rng, path = random.Random(1), tmp_path / "center-0.safetensors"
    arrays, facts = {"c": np.arange(6, dtype="f4"), "slot/m": np.ones(6)}, {"clock": 3, "leases": {"free": [[1, 2]]}}
    seal(path, arrays, facts)
    content, refused = path.read_bytes(), []
    for _ in range(3000):
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


def test_configurations(tmp_path):
    rng, path = random.Random(2), tmp_path / "config.toml"
    content, refused, good = Config(problem="m:P", options={"hidden": 3}).to_toml().encode(), [], 0
    for _ in range(3000):
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
