"""Folders are the layers: each imports only those above it in this list; heavy packages stay where they belong."""

import subprocess
import sys

from modules import modules

LAYERS = [
    "version", "arrays", "core", "transport", "cluster", "recovery", "reporting", "training", "loops",
    "frameworks", "torch", "jax", "insitu", "simulation", "bench", "cli", "__main__",
]  # fmt: skip
FIRST_WITH = {"mpi4py": "transport", "torch": "frameworks", "jax": "frameworks"}


def test_imports_go_down_the_layers():
    wrong = []
    for parts, imported in modules():
        name, layer = ".".join(parts), parts[0]
        if name == "__init__":
            continue  # the public names, from any layer
        assert layer in LAYERS, f"{name} lies in no layer"
        for other in imported:
            if other.startswith("."):
                up = LAYERS.index(other[1:].split(".")[0]) > LAYERS.index(layer)
            else:
                first = FIRST_WITH.get(other.split(".")[0])
                up = first is not None and LAYERS.index(layer) < LAYERS.index(first) and layer != "version"
                up |= other.split(".")[0] in ("cupy", "numba") and layer != "arrays"
            wrong += [f"{name} imports {other}"] * up
    assert not wrong


def test_import_is_light():
    """`import agnmpi` brings no package but numpy."""
    code = (
        "import sys, numpy; before = set(sys.modules); import agnmpi;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {name for name in said.split() if "cython" not in name} <= {"agnmpi", "numpy"}, said
