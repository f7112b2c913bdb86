"""Runs as they are listed and reported, from files written here: of every state, resumed, cut short, many workers."""

import json
import os
import re
import shutil
import subprocess
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from agnmpi.cli.main import main
from agnmpi.recovery.files import save
from agnmpi.reporting.page import page
from agnmpi.reporting.runs import read


def write(path, *events, options="period = 3\nrule = 'agn'\n", result=None, old=True):
    path.mkdir(parents=True)
    lines = [json.dumps({"time": 0.0, "seconds": 0.0} | event) for event in events]
    (path / "events.jsonl").write_text("\n".join(lines) + "\n")
    (path / "config.toml").write_text(options)
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    if old:
        os.utime(path / "events.jsonl", (time.time() - 3600,) * 2)
    return path


def start(workers=2):
    return {"event": "start", "workers": workers, "period": 3}


def evaluation(step, accuracy, seconds):
    metrics = {"accuracy": accuracy}
    return {
        "event": "evaluation",
        "step": step,
        "epoch": step / 10,
        "seconds": seconds,
        "metrics": metrics,
        "loss": 1.0,
    }


def progress(step, seconds, loss=1.0):
    return {
        "event": "progress", "step": step, "epoch": step / 10, "seconds": seconds, "loss": loss, "staleness_mean": 1.5,
        "staleness_max": 4, "samples_per_second": 320.0, "commits_per_second": 10.0,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """With a lost worker, a best model, a resumption, a checkpoint, and a line that a crash cut short."""
    steps = [{"event": "workers", "seconds": s, "steps": [s, 2 * s], "commits": [s, s]} for s in (5, 10)]
    lost = {"event": "lost", "seconds": 7.0, "rank": 2, "host": "<node>", "step": 50, "uncommitted": []}
    first = [start(), evaluation(0, 0.1, 0.1), progress(40, 4.0), steps[0], lost, evaluation(50, 0.9, 8.0), steps[1]]
    saved = {"event": "checkpoint", "seconds": 9.0, "holds": 50}
    again = [start(1), {"event": "resume", "step": 60}, progress(90, 5.0, loss=None), evaluation(100, 0.8, 6.0)]
    result = {"best": {"metric": "accuracy", "value": 0.9, "step": 50}, "command": "agnmpi train", "stopped": "enough"}
    path = write(tmp_path / "run", *first, saved, *again, {"event": "end", "seconds": 6.5}, result=result)
    with (path / "events.jsonl").open("a") as file:
        file.write('{"event": "prog')
    return path


def test_what_a_run_was(run):
    found = read(run)
    assert found.state == "done"
    assert found.seconds == 9.0 + 6.5, "the time before it was resumed counts"
    assert found.curve("accuracy", "wall") == [(0.1, 0.1), (8.0, 0.9), (15.0, 0.8)]
    assert found.curve("loss", "epoch") == [(4.0, 1.0)], "what is not finite is left out"


@pytest.mark.parametrize(
    ("last", "old", "state"),
    [("end", True, "done"), ("interrupted", True, "interrupted"), ("failed", False, "failed"),
     ("progress", True, "crashed"), ("progress", False, "running")],
)  # fmt: skip
def test_states(tmp_path, last, old, state):
    end = progress(3, 3.0) if last == "progress" else {"event": last}
    assert read(write(tmp_path / "run", start(), end, old=old)).state == state


def test_a_line_for_each_run(tmp_path, run, capsys):
    write(tmp_path / "slow", start(4), progress(20, 200.0), options="period = 30\nrule = 'agn'\n")
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "workers", "time", "epoch", "last", "best", "period"]
    assert re.search(r"/run +done +1 +16 s +9 +accuracy 0\.8000 +accuracy 0\.9000 +3$", first)
    assert re.search(r"/slow +crashed +4 +3 min 20 s +2 +30$", second)
    assert main(["runs", str(tmp_path / "empty")]) == 2
    assert "no runs in" in capsys.readouterr().err


def figures(text):
    """The figures of a page, by title, each as a whole XML document."""
    found = [ElementTree.fromstring(figure) for figure in re.findall(r"<figure>.*?</figure>", text)]
    return {figure.findtext("figcaption"): figure for figure in found}


BEST = {"metric": "accuracy", "value": "0.95", "step": "120", "clock": "40"}


@pytest.mark.parametrize("ends", [None, "interrupted", "end", "complete"])
def test_a_run_that_goes_on_after_its_end_has_no_result_of_before(run, ends):
    """result.json is one of its first 100 steps, or of all: what is shown beside its events must agree with these."""
    save(run / "best.safetensors", {"w": np.zeros(2)}, BEST)
    events = [start(1), {"event": "resume", "step": 100}]
    if ends != "complete":
        events += [evaluation(120, 0.95, 2.0), progress(125, 2.5)]
    new = {"best": {"metric": "accuracy", "value": 0.95, "step": 120}, "steps": 125}
    with (run / "events.jsonl").open("a") as file:
        file.write("\n")
        for event in [*events, *([{"event": ends, **({"result": new} if ends == "end" else {})}] if ends else [])]:
            file.write(json.dumps({"time": 0.0, "seconds": 0.0} | event) + "\n")
    (run / "result.json").write_text((run / "result.json").read_text()[:-1] + ', "samples_per_second": 4567.0}')
    found, text = read(run), page([read(run)])
    if ends == "complete":
        assert (found.best["step"], found.result["stopped"]) == (50, "enough")
        assert "4,567" in text
        return
    assert dict(found.best) == {"metric": "accuracy", "value": 0.95, "step": 120}
    assert ("accuracy, best, at step 120" in text, "best, at step 50" in text) == (True, False)
    assert found.result.get("steps") == (125 if ends == "end" else None)
    if ends != "end":
        assert "4,567" not in text
        assert "it stopped" not in text


def test_the_best_of_a_run_that_is_under_way(tmp_path, capsys):
    path = write(tmp_path / "run", start(), evaluation(120, 0.95, 2.0), progress(125, 2.5), old=False)
    assert not read(path).best
    (path / "best.safetensors").write_bytes(b"not whole")
    assert not read(path).best
    save(path / "best.safetensors", {"w": np.zeros(2)}, BEST)
    assert main(["runs", str(path)]) == 0
    assert re.search(r"running.* accuracy 0\.9500 +accuracy 0\.9500", capsys.readouterr().out)
    assert "the best accuracy" in page([read(path)])


def speeds(text):
    """The cells of the figure of the workers: name, steps/s, from, to."""
    figure = next(figure for title, figure in figures(text).items() if title.startswith("steps/s"))
    told = [cell.text for cell in figure.iter("title")]
    return [re.fullmatch(r"(.+): (.+) steps/s, (.+) s to (.+) s", line).groups() for line in told]


def counts(seconds, *steps):
    return {"event": "workers", "seconds": seconds, "steps": list(steps), "commits": list(steps)}


def test_the_speeds_of_workers_after_a_resume(tmp_path):
    """They count from 0 again: more, by then, than before; and what they did up to a crash nobody knows."""
    first = [start(2), counts(5.0, 50, 100), counts(10.0, 100, 200), progress(330, 14.0)]
    again = [start(2), {"event": "resume", "step": 300}, counts(20.0, 400, 400)]
    text = page([read(write(tmp_path / "run", *first, *again))])
    assert speeds(text) == [
        ("worker 0", "10", "0", "5"), ("worker 0", "10", "5", "10"), ("worker 0", "20", "14", "34"),
        ("worker 1", "20", "0", "5"), ("worker 1", "20", "5", "10"), ("worker 1", "20", "14", "34"),
    ]  # fmt: skip


def test_the_speeds_of_a_long_run_that_was_resumed(tmp_path):
    """Several counts are one interval, and none of these spans a resumption."""
    part = [start(1), *(counts(5.0 * i, 50 * i) for i in range(1, 102))]
    told = speeds(page([read(write(tmp_path / "run", *part, *part))]))
    assert {speed for _, speed, _, _ in told} == {"10"}
    assert 40 < len(told) <= 70


def test_a_run_whose_steps_are_nobody_s_has_no_rows(tmp_path):
    assert "of each worker" not in page([read(write(tmp_path / "run", start(4), progress(40, 4.0)))])


def test_the_page_of_a_run(run):
    text = page([read(run)])
    assert not re.search(r"src=|href=|<script|url\(|https?://(?!www\.w3\.org)", text), "it needs nothing else"
    found = figures(text)
    assert {"accuracy", "training loss", "samples/s", "mean staleness"} <= set(found)
    assert any(title.startswith("steps/s of each worker; darkest: 2 ") for title in found)
    lines = found["accuracy"].findall(".//polyline")
    assert [len(line.get("points").split()) for line in lines] == [3]
    told = [mark.text for mark in found["accuracy"].iter("title")]
    assert any("a worker was lost: rank 2, host <node>" in text for text in told)
    assert {"checkpoint at step 50", "the best accuracy"} <= set(told)
    assert "&lt;node&gt;" in text
    assert "<node>" not in text, "names are not HTML"
    assert "it was resumed" in text
    assert "it stopped: enough" in text


def test_runs_side_by_side(tmp_path, run):
    other = write(tmp_path / "other", start(300), evaluation(5, 0.5, 1.0), progress(5, 1.0), options="period = 7\n",
                  old=False)  # fmt: skip
    target = tmp_path / "report.html"
    assert main(["report", str(run), str(other), "-o", str(target)]) == 0
    text = target.read_text()
    assert len(figures(text)["accuracy"].findall(".//polyline")) == 2
    assert '<tr class="differs"><th>period</th><td>3</td><td>7</td></tr>' in text


def test_a_long_run_makes_a_small_page(tmp_path):
    events = [progress(step, float(step), loss=1 / (step + 1)) for step in range(20_000)]
    count = 300
    for at in range(0, 20_000, 100):
        events.append({"event": "workers", "seconds": float(at + 1), "steps": [at] * count, "commits": [at] * count})
    text = page([read(write(tmp_path / "run", start(count), *events))])
    assert "(logarithmic)" in text
    assert len(text) < 1_000_000
    assert "295–299" in text


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


def test_without_a_browser_a_picture_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["report", str(run), "--png"]) == 2
    assert "install chromium, or open the page" in capsys.readouterr().err
    assert (run / "report.html").is_file()


def test_a_browser_that_fails_says_why(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "chromium").write_text("#!/bin/sh\necho no screen >&2\nexit 3\n")
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert main(["report", str(run), "--png"]) == 2
    assert "drew no picture: no screen" in capsys.readouterr().err
    assert not list(run.glob("picture-*"))


@pytest.mark.long
def test_a_picture_shows_all_of_the_page(run, monkeypatch):
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium here")
    monkeypatch.chdir(run.parent)
    assert main(["report", run.name, "--png"]) == 0
    data = (run / "report.png").read_bytes()
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert width == 2400
    assert height > 3000, "more than a window"
    assert not list(run.glob("picture-*"))


@pytest.mark.long
def test_a_browser_shows_it(tmp_path, run):
    """Chromium draws the page, in light and dark, and has nothing to complain about."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    target, picture = tmp_path / "report.html", tmp_path / "report.png"
    target.write_text(page([read(run)]))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/u",
    ]
    shot = [f"--screenshot={picture}", "--window-size=1200,2000"]
    done = subprocess.run([browser, *options, *shot, target.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size > 50_000, "not an empty page"
