"""The commands of the README, pasted into a shell."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from launcher import ROOT, mpiexec

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[2:]  # not those that install

QUICK = "agnmpi bench --rounds 20 --quiet 1 --optimizer-size 200000"  # the same tables from fewer rounds
pytestmark = pytest.mark.timeout(1000)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:20])
def test_commands(tmp_path, block):
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn: pip install 'agnmpi[examples]'")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if os.environ.get("AGNMPI_LONG") != "1":
        block = re.sub(r"agnmpi bench(?= +#)", QUICK, block)
    path = shlex.quote(str(Path(sys.executable).parent))
    code, output = mpiexec(0, start=["bash", "-ec", f"PATH={path}:$PATH\n{block}"], cwd=tmp_path, timeout=900)
    assert code == 0, output
    if "line.py" in block:
        assert "w 3.0000" in output
        assert "--keep-checkpoints" in output
    else:
        assert "w = 3.0000" in output
