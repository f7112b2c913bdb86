"""The model of a run: `export` writes it, `evaluate` measures it. Neither needs MPI."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..arrays.backend import Array, bring, choose
from ..core.params import Layout
from ..recovery.checkpoint import newest, read_center
from ..recovery.files import load, replacing, save
from ..training.config import load_run, newest_config
from ..training.problem import evaluate as measure
from ..training.problem import load_problem


def model(source: Path) -> tuple[dict[str, Array], dict[str, str], str]:
    """The parameters of a run, by name, with facts about them, and where they are from.

    Args:
        source: RUN, where center.safetensors is taken if the run has ended, else its newest checkpoint; a checkpoint,
            RUN/checkpoints/step-N; or a file, such as RUN/best.safetensors.

    Raises:
        ValueError: with the remedy, if there is no model.
    """
    if source.is_file():
        return *load(source), str(source)
    if source.parent.name == "checkpoints" and source.is_dir():
        arrays, facts = read_center(source)
    elif (final := source / "center.safetensors").is_file() and not _older(final, source / "checkpoints"):
        return *load(final), str(final)
    elif source.is_dir() and (found := newest(source, print)):
        source, arrays, facts = found
    else:
        raise ValueError(f"{source} has neither center.safetensors nor a whole checkpoint: give RUN, as train wrote it")
    names, shapes, offsets, dtype = (facts["layout"][name] for name in Layout._fields[:4])
    layout = Layout(tuple(names), tuple(map(tuple, shapes)), tuple(offsets), dtype)
    facts = {"agnmpi": str(facts["agnmpi"]), "clock": str(facts["clock"]), "step": str(facts["steps"])}
    return layout.views(arrays["c"][: layout.size]), facts, str(source)


def _older(file: Path, checkpoints: Path) -> bool:
    """Whether a checkpoint was written after `file`: the run went on."""
    times = [path.stat().st_mtime for path in checkpoints.glob("step-*/center-0.safetensors")]
    return bool(times) and max(times) > file.stat().st_mtime


def export(source: Path, target: Path) -> int:
    """Write the model of `source` to `target`, .safetensors or .npz; returns the exit code.

    Raises ValueError for what cannot be written.
    """
    if target.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{target}: give a name that ends in .safetensors or .npz")
    if target.exists():
        raise ValueError(f"{target} exists: give another name, or remove it")
    arrays, facts, origin = model(source)
    if target.suffix == ".npz":
        with replacing(target) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy 2.4's stubs take the arrays for its flag
    else:
        save(target, arrays, facts)
    print(f"{target}: {len(arrays)} arrays, {sum(x.size for x in arrays.values()):,} numbers, from {origin}")
    return 0


def evaluate(source: Path, device: str) -> int:
    """Print the metrics of the model of `source`, as JSON; returns the exit code.

    Raises ValueError, with the problem's own frames where its code fails.
    """
    arrays, facts, origin = model(source)
    run = next((path for path in (source, *source.parents) if newest_config(path).is_file()), None)
    if run is None:
        raise ValueError(f"{source} lies in no run: there is no config.toml")
    config = load_run(run)
    xp = choose(device, 0)
    problem = load_problem(config.problem, xp, config.options)
    params: Mapping[str, Array] = {name: bring(x, xp.empty(0, x.dtype)) for name, x in arrays.items()}
    print(json.dumps({"model": origin, **facts, "metrics": measure(problem, params)}, indent=2))
    return 0
