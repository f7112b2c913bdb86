"""Examples, as a user starts them."""

import importlib.util
import re
import sys

import pytest
from launcher import ROOT, mpiexec


def test_the_script_learns_its_line():
    code, output = mpiexec(3, sys.executable, ROOT / "examples/delayed_nesterov.py")
    assert code == 0, output
    assert "y = 3.0" in output
    assert " x + 1.0" in output or " x + 0.9" in output


@pytest.mark.parametrize(
    ("script", "packages"),
    [
        ("torch_mnist.py", ["torch"]),
        ("jax_digits.py", ["jax", "optax"]),
        ("torch_lightning.py", ["torch", "lightning"]),
    ],
)
def test_frameworks_learn_digits(script, packages):
    for package in [*packages, "sklearn"]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    code, output = mpiexec(3, sys.executable, ROOT / "examples" / script, timeout=150)
    assert code == 0, output
    right = re.findall(r"rank \d: (0\.\d+) of the test set are right", output)
    assert len(right) == 3, output
    assert len(set(right)) == 1, "every rank has the center"
    assert float(right[0]) > 0.9


def test_the_diff_in_the_readme_is_the_example():
    """At most five lines are added to a PyTorch script, and these are so in the example."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "examples/README.md").read_text(), re.DOTALL)
    lines = (ROOT / "examples/torch_mnist.py").read_text().splitlines()
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert 0 < len(added) <= 5
    assert not [line for line in added if line not in lines]
    kept = [line[1:] for line in diff.splitlines() if line.startswith(" ")]
    assert not [line for line in kept if line not in lines]
