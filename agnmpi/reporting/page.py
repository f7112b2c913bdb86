"""A report about runs: one HTML page with figures that needs nothing else, neither files nor scripts."""

from collections.abc import Sequence
from html import escape
from math import nan
from typing import Any

from .figures import Line, chart, heatmap
from .goodput import goodput
from .runs import Run, differences, digits, duration, workers

_COLOURS = "".join(f".line.c{i}{{stroke:var(--c{i})}}.dot.c{i}{{fill:var(--c{i})}}" for i in range(8))
_STYLE = """
:root { --ink:#1f2430; --soft:#667085; --line:#e4e7ec; --back:#f7f8fa; --card:#fff;
  --c0:#2563eb; --c1:#ea580c; --c2:#059669; --c3:#9333ea; --c4:#dc2626; --c5:#0891b2; --c6:#ca8a04; --c7:#db2777;
  --good:#059669; --bad:#dc2626; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e8ee; --soft:#98a2b3; --line:#2c3340; --back:#11141a;
  --card:#191d26; --c0:#60a5fa; --c1:#fb923c; --c2:#34d399; --c3:#c084fc; --c4:#f87171; --c5:#22d3ee; --c6:#facc15;
  --c7:#f472b6; --good:#34d399; --bad:#f87171; } }
* { box-sizing:border-box } body { margin:0; background:var(--back); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif; }
main { max-width:1120px; margin:0 auto; padding:28px 20px 60px; }
h1 { font-size:24px; margin:0 0 2px; } h2 { font-size:17px; margin:34px 0 10px; }
.sub { color:var(--soft); margin:0 0 18px; overflow-wrap:anywhere; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:0 0 12px; }
.tile,figure,.scroll { background:var(--card); border:1px solid var(--line); border-radius:10px; }
.tile { padding:10px 14px; } .tile b { display:block; font-size:21px; line-height:1.3; overflow-wrap:anywhere; }
.tile span { color:var(--soft); font-size:13px; }
.grid2 { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr)); gap:14px; }
figure { margin:0; padding:12px 12px 4px; } figcaption { font-weight:600; margin:0 4px 4px; }
svg { width:100%; height:auto; display:block; }
.grid { stroke:var(--line); stroke-width:1 } .tick,.axis { font-size:11px; fill:var(--soft) }
.line { fill:none; stroke-width:2; stroke-linejoin:round } .dot { stroke:var(--card); stroke-width:1 }
.mark { stroke-width:1.5 } .mark.bad { stroke:var(--bad); stroke-dasharray:4 3 }
.mark.good { stroke:var(--good); stroke-dasharray:2 3 } .mark.note { stroke:var(--soft) } .cell { fill:var(--c0) }
.legend { margin:0 0 12px; padding:0; list-style:none; display:flex; flex-wrap:wrap; gap:4px 18px; }
.legend i { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:7px; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; width:100%; font-size:14px; }
th,td { text-align:left; padding:5px 12px; border-top:1px solid var(--line); vertical-align:top; }
tr:first-child th { border-top:0; } th { color:var(--soft); font-weight:600; white-space:nowrap; }
td { font-variant-numeric:tabular-nums; overflow-wrap:anywhere; } .differs { font-weight:700; }
.done { color:var(--good) } .crashed,.failed { color:var(--bad) } .foot { color:var(--soft); font-size:13px; }
pre { margin:0; white-space:pre-wrap; font-size:12px; }
"""
_TOLD = {
    "lost": "a worker was lost", "joined": "a spare took its place", "failover": "another rank became the center",
    "alone": "one rank was left", "given_up": "steps were given up",
    "evaluation_failed": "an evaluation failed", "changed": "it was resumed with other options",
    "resume": "it was resumed", "interrupted": "it was interrupted", "failed": "it failed",
}  # fmt: skip
_BAD = {"lost", "failover", "failed", "evaluation_failed"}


def page(runs: Sequence[Run]) -> str:
    """The report about one run or several, as HTML."""
    names = [run.path.name for run in runs]
    names = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [_head(runs[0])] if len(runs) == 1 else [_legend(names), _compare(runs, names)]
    parts += [_learning(runs, names), _behaviour(runs, names), _workers(runs, names), _happened(runs, names)]
    parts.append(_options(runs, names))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · agnmpi</title><style>{_STYLE}{_COLOURS}</style></head><body><main>{''.join(parts)}"
        '<p class="foot">Dashed red lines: a loss or a failure; dotted green ones: the best; short ticks at the '
        "bottom: checkpoints. Point at any of them to read more.</p></main></body></html>\n"
    )


def _tile(value: str, name: str, kind: str = "") -> str:
    return f'<div class="tile"><b class="{kind}">{escape(value)}</b><span>{escape(name)}</span></div>'


def _head(run: Run) -> str:
    """What one run was, and how it ended."""
    tiles = [_tile(run.state, "state", run.state)]
    evaluated, progress = run.of("evaluation"), run.of("progress")
    if evaluated:
        tiles += [_tile(digits(value), f"{name}, last") for name, value in evaluated[-1]["metrics"].items()][:3]
    if best := run.best:
        tiles.append(_tile(digits(best["value"]), f"{best['metric']}, best, at step {best['step']:,}"))
    if (good := goodput(run.events)) is not None:
        tiles.append(_tile(f"{good:.1%}", "goodput"))
    if progress:
        tiles.append(_tile(f"{progress[-1]['epoch']:.4g}", "epochs"))
        rate = run.result.get("samples_per_second") or progress[-1]["samples_per_second"]
        tiles.append(_tile(digits(rate), "samples/s"))
        tiles.append(
            _tile(digits(progress[-1]["staleness_mean"]), f"mean staleness, at most {progress[-1]['staleness_max']}")
        )
    tiles += [_tile(duration(run.seconds), "of training"), _tile(str(workers(run)), "workers")]
    o = run.options
    moved = f"{o.get('optimizer')} {o.get('rate', '')}"
    what = f"{o.get('problem', '')} · rule {o.get('rule')}, period {o.get('period')}, {moved}"
    return f'<p class="sub">{escape(what)}<br>{escape(str(run.path))}</p><div class="tiles">{"".join(tiles)}</div>'


def _legend(names: Sequence[str]) -> str:
    items = (f'<li><i style="background:var(--c{i % 8})"></i>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _compare(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A row for each of several runs: how it ended, and what differs."""
    differ = [name for name in differences(runs) if name != "problem"][:12]
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))[:4]
    rows = [["run", "state", "workers", "time", *metrics, "best", *differ]]
    for run, name in zip(runs, names):
        last = run.of("evaluation")
        values = [digits(last[-1]["metrics"].get(metric)) if last else "–" for metric in metrics]
        best = run.best
        values.append(f"{best['metric']} {digits(best['value'])}" if best else "–")
        rows.append(
            [name, run.state, str(workers(run)), duration(run.seconds), *values, *(_text(run, d) for d in differ)]
        )
    return _table(rows)


def _table(rows: Sequence[Sequence[str]], bold: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = []
    for i, row in enumerate(rows[1:]):
        first, *cells = (escape(cell) for cell in row)
        kind = ' class="differs"' if i in bold else ""
        body.append(f"<tr{kind}><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _section(title: str, figures: Sequence[str]) -> str:
    found = [figure for figure in figures if figure]
    return f'<h2>{escape(title)}</h2><div class="grid2">{"".join(found)}</div>' if found else ""


def _marks(run: Run, x: str) -> list[tuple[float, str, str]]:
    """Losses, checkpoints and the best of a run, along the axis `x`."""
    marks, epoch = list[tuple[float, str, str]](), 0.0
    for event in run.events:
        epoch = event.get("epoch", epoch)
        at = event["wall"] if x == "wall" else epoch
        if event["event"] in _BAD:
            marks.append((at, _what(event), "bad"))
        elif event["event"] == "checkpoint":
            marks.append((at, f"checkpoint at step {event['holds']:,}", "note"))
        if event["event"] == "evaluation" and event["step"] == run.best.get("step"):
            marks.append((at, f"the best {run.best['metric']}", "good"))
    return marks


def _curves(runs: Sequence[Run], names: Sequence[str], metric: str, x: str, dots: bool) -> list[Line]:
    return [
        Line(name, run.curve(metric, x), i, dots, _marks(run, x) if len(runs) == 1 else ())
        for i, (run, name) in enumerate(zip(runs, names))
    ]


def _learning(runs: Sequence[Run], names: Sequence[str]) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    figures = []
    for metric, dots in [*((metric, True) for metric in metrics), ("loss", False)]:
        for x in ("epoch", "wall"):
            label = "training loss" if metric == "loss" and not dots else metric
            figures.append(chart(label, _curves(runs, names, metric, x, dots), x))
    return _section("Learning", figures)


def _behaviour(runs: Sequence[Run], names: Sequence[str]) -> str:
    shown = (
        ("samples_per_second", "samples/s"),
        ("commits_per_second", "commits/s"),
        ("staleness_mean", "mean staleness"),
    )
    return _section(
        "Throughput and staleness",
        [chart(label, _curves(runs, names, name, "wall", False), "wall", zero=True) for name, label in shown],
    )


def _workers(runs: Sequence[Run], names: Sequence[str], most: int = 60) -> str:
    """Where each worker's steps went, in time: at most `most` rows, of several workers each."""
    figures = []
    for run, name in zip(runs, names):
        edges, columns = _speeds(run)
        count = max(map(len, columns), default=0)
        size = -(-count // most) or 1
        groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
        rows = [[_mean(column[group.start : group.stop]) for column in columns] for group in groups]
        title = "steps/s of each worker" if len(runs) == 1 else f"steps/s of each worker: {name}"
        labels = [f"worker {g[0]}" if len(g) == 1 else f"{g[0]}–{g[-1]}" for g in groups]
        figures.append(heatmap(title, rows, edges, labels, "steps/s"))
    return _section("Workers", figures)


def _speeds(run: Run, most: int = 60) -> tuple[list[float], list[list[float]]]:
    """Steps/s of each worker in about `most` intervals of a run, none where nobody knows; their edges in seconds."""
    events = run.of("start", "workers")
    every = -(-len(events) // most) or 1
    edges, columns, before, skipped = [0.0], list[list[float]](), list[int](), 0
    for event, following in zip(events, [*events[1:], None]):
        seconds = event["wall"] - edges[-1]
        if event["event"] == "start":  # they count from 0; what came after the last count, before a crash, is lost
            before, skipped = [], 0
            if seconds >= 0.2:
                edges.append(event["wall"])
                columns.append([])
            continue
        skipped += 1
        ends = following is None or following["event"] == "start"
        if seconds < 0.2 or (skipped < every and not ends):
            continue
        now, skipped = event["steps"], 0
        columns.append([(new - old) / seconds for new, old in zip(now, [*before, *[0] * len(now)])])
        edges.append(event["wall"])
        before = now
    return edges, columns


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan


def _happened(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = [["run", "at", "what"]]
    for run, name in zip(runs, names):
        rows += [[name, duration(event["wall"]), _what(event)] for event in run.events if event["event"] in _TOLD]
        if stopped := run.result.get("stopped"):
            rows.append([name, duration(run.seconds), f"it stopped: {stopped}"])
    return f"<h2>What happened</h2>{_table(rows[:200])}" if len(rows) > 1 else ""


def _what(event: dict[str, Any]) -> str:
    left_out = ("event", "time", "seconds", "wall", "epoch", "clock", "loss", "uncommitted")
    facts = {name: value for name, value in event.items() if name not in left_out}
    told = ", ".join(f"{name} {str(value)[-300:]}" for name, value in facts.items())
    return _TOLD[event["event"]] + (f": {told}" if told else "")


def _options(runs: Sequence[Run], names: Sequence[str]) -> str:
    """All options, those that differ in bold; then what the result says of where it ran."""
    differ = differences(runs)
    keys = [
        *differ,
        *(name for name in dict.fromkeys(name for run in runs for name in run.options) if name not in differ),
    ]
    rows = [["option", *names], *([name, *(_text(run, name) for run in runs)] for name in keys)]
    facts = ("command", "hosts", "mpi", "agnmpi", "versions")
    rows += [[name, *(_listed(run.result.get(name, "–")) for run in runs)] for name in facts]
    return f"<h2>Configuration</h2>{_table(rows, range(len(differ)) if len(runs) > 1 else ())}"


def _text(run: Run, name: str) -> str:
    return str(run.options.get(name, "–"))


def _listed(value: Any) -> str:
    return ", ".join(f"{name} {of}" for name, of in value.items()) if isinstance(value, dict) else str(value)
