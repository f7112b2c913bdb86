"""What is shipped: a source distribution with all that its tests need, and facts about it as CITATION.cff has them."""

import os
import subprocess
import sys
import tarfile
import tomllib

import pytest
from launcher import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BACKEND = PYPROJECT["project"], PYPROJECT["build-system"]


def test_the_authors_are_those_to_cite():
    cited = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["license"] == "BSD-3-Clause"
    for author in PROJECT["authors"]:
        assert f"name: {author['name']}" in cited


def test_a_package_index_and_type_checkers_are_told_what_it_is():
    assert PROJECT["urls"]
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "agnmpi/py.typed").is_file()


@pytest.mark.long
def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if git.returncode:
        pytest.skip("no checkout: what belongs to it is not known")
    source = tmp_path / "source"
    for name in git.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "backend"]
    tried = subprocess.run([*install, *BACKEND["requires"]], capture_output=True, text=True, timeout=120)
    if tried.returncode:
        pytest.skip(f"no build backend: {tried.stderr[-300:]}")
    code = f"from {BACKEND['build-backend']} import build_sdist; build_sdist({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "backend")}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    needed = {name for name in git.stdout.splitlines() if not name.startswith(".")}
    assert needed - shipped == set()
