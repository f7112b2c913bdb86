"""A transport is one entry: setup, command line, bench and conformance suite take it from there."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conformance import CHECKS, declared
from mpi4py import MPI

from agnmpi import AGNOptimizer, sgd
from agnmpi.cluster.setup import Setup, check_setup
from agnmpi.core import rules
from agnmpi.training.config import Config
from agnmpi.transport import registry
from agnmpi.transport.agreement import ConfigError


@pytest.fixture
def carrier_pigeon():
    """Another name for messages within the process."""
    made = replace(registry.local(), name="pigeon", about="by air")
    registry.register(made)
    yield made
    registry.unregister("pigeon")
    assert "pigeon" not in registry.names()


def test_one_entry_is_enough(carrier_pigeon):
    assert "pigeon" in registry.names()
    assert registry.resolve("pigeon", workers=3).workers == 3
    assert Config("m:P", rate=0.1, optimizer="sgd").make_transport().name == "p2p"
    opt = AGNOptimizer(sgd(0.1), np.zeros(2), MPI.COMM_SELF, 2, transport=carrier_pigeon)
    for _ in opt.steps(4):
        opt.minimize(lambda _p: (0.0, [-np.ones(2)]))
    np.testing.assert_allclose(opt.center["0"], 0.2)
    opt.close()
    check_setup(rules.agn(), Setup(carrier_pigeon), 1, sgd(0.1), None)
    with pytest.raises(ConfigError, match="use allreduce"):
        check_setup(rules.synchronous(), Setup(carrier_pigeon), 1, sgd(0.1), None)
    with pytest.raises(ConfigError, match="overlap has no meaning on transport pigeon"):
        check_setup(rules.agn(), Setup(carrier_pigeon, overlap=True), 1, sgd(0.1), None)


def test_use_locking_is_heeded_beside_an_object():
    assert registry.resolve(registry.rma(centers=2), use_locking=False) == registry.accumulate(centers=2)
    sums = registry.accumulate(centers=2)
    assert registry.resolve(sums, use_locking=False) is sums
    with pytest.raises(ValueError, match=r"use_locking=False needs transport 'rma'.* it is 'p2p'"):
        registry.resolve(registry.p2p(), use_locking=False)


def test_the_command_line_and_bench_offer_what_is_registered(tmp_path):
    """In a Python of its own: there the parser is made after the entry."""
    code = (
        "from dataclasses import replace; from agnmpi.transport import registry;"
        "registry.register(replace(registry.p2p(), name='pigeon'));"
        "from agnmpi.cli.arguments import parse;"
        "print(parse(['train', 'm:P', '--transport', 'pigeon']).transport,"
        " parse(['bench', '--transports', 'pigeon']).transports)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout.split() == ["pigeon", "['pigeon']"]


@pytest.mark.parametrize("size", [2, 3, 5, 9])
@pytest.mark.parametrize(
    ("rule", "transport", "center_optimizer", "text"),
    [
        (rules.dynsgd(), registry.accumulate(), None, "weighs commits"),
        (rules.agn("gradient"), registry.accumulate(), sgd(1.0), "no center optimizer"),
        (rules.agn(), registry.accumulate(), sgd(1.0), "no center optimizer"),
        (rules.agn(), registry.allreduce(), None, "use p2p or rma or accumulate"),
        (rules.synchronous(), registry.p2p(), None, "use allreduce"),
        (rules.synchronous(), registry.rma(), None, "use allreduce"),
        (rules.synchronous(), replace(registry.allreduce(), centers=2), None, "centers = 2 needs transport p2p"),
        (rules.agn(), registry.p2p(centers=99), None, "99 centers and at least one worker"),
    ],
)
def test_what_a_transport_lacks_is_refused(rule, transport, center_optimizer, text, size):
    with pytest.raises(ConfigError, match=text):
        check_setup(rule, Setup(transport), size, sgd(1.0), center_optimizer)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("p2p", {"use_locking": False}, "needs transport 'rma'"),
        ("rma", {"center_device": "gpu"}, "center on a GPU needs transport p2p"),
        ("p2p", {"message_buffers": 0}, "at least 1, not 0"),
        ("pigeon", {}, "unknown transport 'pigeon'"),
    ],
)
def test_what_no_transport_can_be_is_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        registry.resolve(name, **options)


@pytest.mark.parametrize("entry", list(registry.entries()), ids=lambda entry: entry.name)
def test_what_is_declared_is_what_is_checked(entry):
    checked = {check.__name__ for check in CHECKS if declared(entry, check)}
    whole = entry.capabilities.whole_pulls and entry.capabilities.exact_clock
    assert ("no_torn_read_and_an_exact_clock" in checked) == whole
    assert len(checked) >= 5


def test_every_capability_is_read():
    """By something else than the entry that declares it."""
    package = Path(registry.__file__).parent.parent
    texts = [p.read_text() for p in package.rglob("*.py") if p.name not in ("registry.py", "ends.py")]
    texts += [(package.parent / "tests/support/conformance.py").read_text(), Path(registry.__file__).read_text()]
    for name in registry.local().capabilities._fields:
        used = [text for text in texts if f".{name}" in text or f'"{name}"' in text]
        assert used, f"nobody reads the capability {name}"
