"""What other ranks print on the terminal where rank 0 shows its bar."""

import io
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from rich.console import Console
from rich.progress import BarColumn

from agnmpi.reporting.terminal import AboveBar, Bar, above_bar


class Screen(io.StringIO):
    """As much of a terminal as is needed: lines, a cursor, and the codes that move it or erase."""

    def __init__(self):
        super().__init__()
        self.rows, self.row, self.column = [""], 0, 0

    def isatty(self):
        return True

    def write(self, text):
        for code, letter, char in re.findall(r"\x1b\[\??([\d;]*)([A-Za-z])|(.)", text, re.DOTALL):
            if letter == "A":
                self.row = max(0, self.row - int(code or 1))
            elif letter == "K":
                self.rows[self.row] = ""
            elif letter == "J":
                self.rows[self.row :] = [self.rows[self.row][: self.column]]
            elif char == "\n":
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif char == "\r":
                self.column = 0
            elif char:
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + char + line[self.column + 1 :]
                self.column += 1
        return len(text)


@pytest.mark.parametrize("width", [80, 140])
def test_what_a_worker_prints_does_not_tear_the_bar(width):
    screen = Screen()
    bar = Bar(BarColumn(), console=Console(file=screen, force_terminal=True, width=width), auto_refresh=False)
    bar.add_task("train", total=3, facts="loss 1.0")
    worker = AboveBar(screen)
    said = [f"worker line {i}" for i in range(5)]
    with bar:
        bar.refresh()
        print(said[0], said[1], sep="\n", file=worker)
        bar.refresh()
        bar.console.print("evaluation at epoch 1")
        bar.refresh()
        for text in ("worker", " line 2\nworker line 3\nworker", " line 4"):
            worker.write(text)
        bar.refresh()
        worker.close()
        bar.refresh()
    shown = [line.rstrip() for line in screen.rows if line.strip()]
    assert shown[:-2] == [*said[:2], "evaluation at epoch 1", *said[2:]]
    assert shown[-1] == "loss 1.0"
    assert "━" in shown[-2]


def test_only_streams_that_go_to_the_terminal_are_changed(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with above_bar("stdout"):
        print("to the screen")
        print("to a file", file=sys.stderr)
    with above_bar():
        print("no bar")
    assert re.sub(r"\x1b\[\d*[AJ]", "", out.getvalue()) == "\rto the screen\n\n\nno bar\n"
    assert err.getvalue() == "to a file\n"


TWO_LOOPS = """
import numpy as np
from mpi4py import MPI
from agnmpi import AGNOptimizer, Monitoring, sgd

opt = AGNOptimizer(sgd(0.1), {"w": np.zeros(1)}, MPI.COMM_SELF, transport="local",
                   monitor=Monitoring("run", lambda params: {"w": float(params["w"][0])}, every=100))
for loop in range(2):
    for step in opt.steps(20):
        opt.minimize(lambda params: (0.0, {"w": params["w"] - 1}))
    print("after loop", loop)
opt.close()
"""


def test_what_is_printed_between_two_loops_stays(tmp_path):
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", TWO_LOOPS]
    with subprocess.Popen(command, stdout=end, stderr=subprocess.STDOUT, cwd=tmp_path) as process:
        os.close(end)
        written = b""
        with suppress(OSError):  # Linux ends a terminal that nobody has open any more like that
            while piece := os.read(terminal, 4096):
                written += piece
    os.close(terminal)
    assert process.returncode == 0, written
    screen = Screen()
    screen.write(re.sub(r"\x1b\[[\d;]*m", "", written.decode()))
    shown = [line.rstrip() for line in screen.rows if line.strip()]
    kinds = [re.match("epoch|loss|after loop .|evaluation at epoch .|done", line)[0] for line in shown[:-1]]
    bar = ["epoch", "loss"]
    assert kinds == [
        "evaluation at epoch 0",
        *bar,
        "after loop 0",
        *bar,
        "after loop 1",
        "evaluation at epoch 2",
        "done",
    ]
