"""What `import agnmpi` shows, what it brings in, and when."""

import importlib
import pydoc
import subprocess
import sys

import numpy as np
import pytest

import agnmpi

HOME = {"train": "agnmpi.training.job", "simulate": "agnmpi.simulation.simulate"}


def in_a_new_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_all_is_what_dir_shows():
    assert dir(agnmpi) == sorted(agnmpi.__all__)
    assert len(set(agnmpi.__all__)) == len(agnmpi.__all__)


@pytest.mark.parametrize("name", agnmpi.__all__)
def test_each_public_name_is_there_and_is_documented(name):
    value = getattr(agnmpi, name)
    assert isinstance(value, str) or value.__doc__
    assert name not in HOME or value.__module__ == HOME[name]


def test_help_tells_of_all():
    text = pydoc.plain(pydoc.render_doc(agnmpi))
    for name in set(agnmpi.__all__) - {"__version__"}:  # which it shows as VERSION
        assert name in text


def test_what_is_not_there_is_named():
    with pytest.raises(AttributeError, match="module 'agnmpi' has no attribute 'cosine'"):
        _ = agnmpi.cosine


def test_rules_and_schedules_are_modules_of_the_public_face():
    schedules = importlib.import_module("agnmpi.schedules")
    assert schedules is agnmpi.schedules
    assert importlib.import_module("agnmpi.rules") is agnmpi.rules
    assert schedules.warmup(schedules.cosine(1.0, 10), 2)(0) == 0.5


@pytest.mark.parametrize("first", ["import agnmpi.insitu", "from agnmpi import insitu", "import agnmpi; agnmpi.insitu"])
def test_insitu_is_one_module_however_it_is_imported(first):
    code = f"{first}; import agnmpi.insitu as a; from agnmpi import insitu as b; print(a is b is agnmpi.insitu, b.Run)"
    assert in_a_new_python(f"import agnmpi; {code}").startswith("True <class 'agnmpi.frameworks.insitu.Run")
    for name in ("Run", "Status", "Surrogate"):
        assert getattr(importlib.import_module("agnmpi.insitu"), name).__doc__


def test_nothing_initialises_mpi_but_what_speaks_it():
    code = (
        "import sys, agnmpi; dir(agnmpi); agnmpi.Config, agnmpi.Problem, agnmpi.Interrupted, agnmpi.Degraded;"
        "print('mpi4py.MPI' in sys.modules, end=' '); agnmpi.AGNOptimizer; print('mpi4py.MPI' in sys.modules)"
    )
    assert in_a_new_python(code) == "False True"


def test_an_own_optimizer_can_be_written_with_public_names_alone():
    state_of = agnmpi.sgd(1.0)
    doubled = agnmpi.Optimizer(
        "doubled", state_of.init, lambda g, state, x, **how: state_of.update(g, state, x, **how | {"scale": 2.0})
    )
    x = np.zeros(2)
    assert doubled.update(np.ones(2), doubled.init(x), x).step == 1
    assert x.tolist() == [-2, -2]
