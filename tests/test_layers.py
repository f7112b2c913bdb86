"""Imports go down the layers only (DESIGN 4), and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "agnmpi"
LAYERS = [
    {"version", "backend", "waiting", "kernels", "schedules", "host_kernels", "options"},
    {
        "params",
        "optimizers",
        "rules",
        "data",
        "checkpoint",
        "metrics",
        "config",
        "timing",
        "problem",
        "agree",
        "hook",
    },
    {"transport.base", "transport.wire", "transport.windows", "transport.stream"},
    {"transport.local", "transport.p2p", "transport.collective", "transport.rma", "transport.serverless"},
    {"transport.sharded", "transport.virtual"},
    {"center", "worker", "record", "faults"},
    {"election", "fit", "wiring", "member", "failover", "probe"},
    {
        "agn",
        "loop",
        "launch",
        "monitor",
        "saver",
        "resuming",
        "survivors",
        "job",
        "run",
        "simulate",
        "replay",
        "floors",
        "bench",
        "bench_exchanges",
        "bench_optimizers",
        "bench_waiting",
        "doctor",
    },
    {"arguments", "cli", "__main__"},
]
# A module may import these from its own layer.
WITHIN = {
    "kernels": {"backend"}, "host_kernels": {"backend"},  # where a vector lies
    "rules": {"optimizers"},  # Optimizer, as a type and as the center's step
    "transport.windows": {"transport.base", "transport.wire"},
    "config": {"optimizers", "rules"},  # the names and numbers it validates
    "problem": {"data", "params"},  # what a step's gradient is
    "wiring": {"fit", "member", "failover"},
    "failover": {"election"},
    "member": {"failover"},
    "simulate": {"launch", "run", "monitor"},
    "replay": {"launch", "simulate"},
    "agn": {"launch", "loop"}, "monitor": set(), "job": {"launch", "monitor", "resuming", "run", "saver", "survivors"},
    "run": {"monitor"},
    "bench": {"bench_exchanges", "bench_optimizers", "bench_waiting", "launch", "monitor"},
    "bench_exchanges": {"floors"}, "bench_waiting": {"bench_exchanges"},
    "doctor": {"launch", "monitor"}, "cli": {"arguments"}, "__main__": {"cli"},
}  # fmt: skip
MPI = {
    "version",
    "transport.p2p",
    "transport.collective",
    "transport.rma",
    "transport.serverless",
    "transport.windows",
    "transport.stream",
    "agree",
    "faults",
    "agn",
    "fit",
    "wiring",
    "member",
    "failover",
    "probe",
    "launch",
    "job",
    "resuming",
    "survivors",
    "bench",
    "bench_exchanges",
    "bench_waiting",
    "floors",
    "doctor",
    "cli",
}
CUPY = {"backend", "transport.wire", "kernels"}


def imports(path):
    """Yield what a module imports, package-relative names for our own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            own = ".".join(filter(None, base))
            yield from [f".{own}"] if own else [f".{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_go_down_the_layers():
    layer_of = {name: i for i, names in enumerate(LAYERS) for name in names}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name.endswith("__init__"):
            continue
        assert name in layer_of, f"{name} has no layer: add it to this table"
        for imported in imports(path):
            top = imported.split(".")[0]
            if imported.startswith("."):
                other = imported[1:]
                down = layer_of[other] < layer_of[name] or other in WITHIN.get(name, ())
                wrong += [] if down else [f"{name} imports {other}"]
            elif (top == "mpi4py" and name not in MPI) or (top == "cupy" and name not in CUPY):
                wrong.append(f"{name} imports {top}")
    assert not wrong


def test_import_is_light():
    """`import agnmpi` brings neither mpi4py nor cupy nor any other package than numpy, ."""
    code = (
        "import sys, numpy; before = set(sys.modules); import agnmpi;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "heavy = new & {'mpi4py', 'cupy', 'rich', 'safetensors', 'threadpoolctl', 'tomli_w', 'matplotlib'};"
        "print(heavy or 'light')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "light", said
