"""What is shipped: a source distribution with all that its tests need, and facts about it as CITATION.cff has them."""

import os
import subprocess
import sys
import tarfile
import tomllib

import pytest
from launcher import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_authors_are_those_to_cite():
    cited = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["license"] == "BSD-3-Clause"
    for author in PROJECT["authors"]:
        assert f"name: {author['name']}" in cited


@pytest.mark.long
def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if git.returncode:
        pytest.skip("no checkout: what belongs to it is not known")
    source = tmp_path / "source"
    for name in git.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    needed = {name for name in git.stdout.splitlines() if not name.startswith(".")}
    assert needed - shipped == set()
