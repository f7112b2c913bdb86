"""Tables and pictures of benchmarks.py."""

from pathlib import Path
from statistics import mean

import numpy as np
from benchmarks import DEFAULT, DIVIDED, EXPERIMENTS, LATENCY, LINKS, ONE, OPTIMISTIC
from drawings import BLUE, GREEN, GREY, ORANGE, RED, reached, title
from report import draw, markdown, spread

PURPLE = "#8c6bb1"
PARALLEL = "data parallel"
COLORS = {ONE: GREY, DEFAULT: BLUE, OPTIMISTIC: GREEN, PARALLEL: RED, "synchronous, λ = 1": RED}
COLORS |= {"DiLoCo": ORANGE, "AEASGD": PURPLE, DIVIDED: "#8fbf9f", "AGN as published": "#9c7347"}
TARGETS = {"Fashion-MNIST": 0.88, "Shakespeare": 2.0}  # the times to reach them are compared
Groups = dict[tuple[str, str, str], list[dict]]


def group(rows: list[dict]) -> Groups:
    """The cells that differ in nothing but the seed, by (experiment, method, link).

    In a rule that meets in rounds the link changes nothing but times: its rows are there for all links.
    """
    groups: Groups = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        rounds = EXPERIMENTS[row["experiment"]].numbers(row["method"]).get("rule") in ("synchronous", "diloco")
        for link in LINKS if row["link"] and rounds else [row["link"]]:
            if link or not row["link"]:
                groups.setdefault((row["experiment"], row["method"], link), []).append(moved(row, link))
        if (row["experiment"], row["method"]) == ("Shakespeare", ONE):
            for link in filter(None, LINKS):
                groups.setdefault(("Shakespeare", PARALLEL, link), []).append(parallel(row, link))
    return groups


def moved(row: dict, link: str) -> dict:
    """`row`, of a rule that meets in rounds, with the times of another link: two transfers of all bytes a round."""
    if row["link"] == link:
        return row
    experiment = EXPERIMENTS[row["experiment"]]
    numbers = experiment.numbers(row["method"])
    in_a_round = experiment.workers * numbers["period"] * numbers["batch"]
    a, b = (1 / LINKS[name] for name in (row["link"], link))
    longer, samples = 2 * 4 * experiment.parameters * (b - a), row["samples"] / row["curve"][-1][1]
    curve = [
        [time + -(-round(epoch * samples) // in_a_round) * longer, epoch, *rest] for time, epoch, *rest in row["curve"]
    ]
    return row | {"link": link, "curve": curve}


def parallel(row: dict, link: str) -> dict:
    """`row`, of one process, as data-parallel training of its batches by all workers, which never wait for each other.

    The mean of their gradients is the gradient of the whole batch, so the numbers are the same. A step takes one nth of
    the time, and two transfers of all bytes.
    """
    experiment = EXPERIMENTS[row["experiment"]]
    steps = row["samples"] / experiment.common["batch"] / row["curve"][-1][1]  # of an epoch
    seconds = experiment.timing["step_time"] / experiment.workers
    seconds += 2 * (4 * experiment.parameters / LINKS[link] + LATENCY)
    curve = [[epoch * steps * seconds, epoch, *rest] for _, epoch, *rest in row["curve"]]
    return row | {"method": PARALLEL, "link": link, "curve": curve}


def gaps(groups: Groups, experiment: str, method: str, link: str) -> list[float]:
    """The metric minus that of one process with the same seed, of each seed that has both."""
    metric = EXPERIMENTS[experiment].metric
    one = {row["seed"]: row[metric] for row in groups.get((experiment, ONE, ""), [])}
    return [row[metric] - one[row["seed"]] for row in groups[experiment, method, link] if row["seed"] in one]


def tables(rows: list[dict]) -> str:
    """All that the cells say, as Markdown."""
    groups, text = group(rows), ""
    for name, experiment in EXPERIMENTS.items():
        mine = {key[1:]: found for key, found in groups.items() if key[0] == name}
        if not mine:
            continue
        digits = 2 if experiment.metric == "accuracy" else 3
        lines = []
        for method in (*experiment.methods, PARALLEL, *experiment.variants):
            for link in LINKS:
                if not (found := mine.get((method, link))):
                    continue
                apart = [] if method in (ONE, PARALLEL) else gaps(groups, name, method, link)
                line = [method, link, str(len(found)), spread([row[experiment.metric] for row in found], digits)]
                line.append(signed(apart, digits))
                line.append(spread([row["curve"][-1][0] for row in found], 0))
                times = [reached(row, TARGETS[name], falls=digits == 3) for row in found]
                line.append("never" if None in times else spread(times, 0))
                line.append(f"{mean(row['staleness']['mean'] for row in found):.1f}")
                lines.append(line)
        head = ["rule", "link", "seeds", experiment.metric + ", %" * (digits == 2), "minus one process", "virtual s"]
        head.append(f"s to {100 * TARGETS[name]:g} %" if digits == 2 else f"s to {TARGETS[name]:g}")
        text += f"**{name}**, n = {experiment.workers}\n\n{markdown([*head, 'staleness'], lines)}\n"
    return text


def fashion(plt, groups: Groups):
    """Accuracy at the end and over virtual time."""
    mine = {key[1]: found for key, found in groups.items() if key[0] == "Fashion-MNIST"}
    methods = [method for method in EXPERIMENTS["Fashion-MNIST"].methods if method in mine]
    figure, (ends, curves) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1.2, 1))
    for y, method in enumerate(methods):
        values, color = [row["accuracy"] for row in mine[method]], COLORS.get(method, BLUE)
        ends.plot(values, [y] * len(values), "o", color=color, alpha=0.35, ms=6, mec="none")
        ends.plot(mean(values), y, "|", color=color, ms=18, mew=2.5)
        ends.text(max(values) + 0.06, y, f"{mean(values):.2f}", va="center", fontsize=9)
        curve = np.mean([[(time, 100 * accuracy) for time, _, accuracy, _ in row["curve"]] for row in mine[method]], 0)
        curves.plot(*curve[1:].T, color=color, lw=2)
    ends.set_yticks(range(len(methods)), [f"{method} ({len(mine[method])})" for method in methods])
    ends.invert_yaxis()
    ends.margins(x=0.12)
    ends.set_title("test accuracy at equal samples, % (seeds)")
    curves.set_title("over virtual time, s (the same colors)")
    _log_seconds(curves)
    curves.set_ylim(bottom=84)
    title(figure, "Fashion-MNIST, a CNN, 8 workers")
    return figure


def _log_seconds(axis) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [tick for tick in (5, 10, 20, 50, 100, 200, 500, 1000, 2000) if low < tick < high]
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()


def shakespeare(plt, groups: Groups):
    """The loss over samples, and over virtual time on two links."""
    mine = {key[1:]: found for key, found in groups.items() if key[0] == "Shakespeare"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    handles = {}
    for axis, link in zip(axes, ("", "1 Gbit/s", "50 Mbit/s"), strict=True):
        for method in (*EXPERIMENTS["Shakespeare"].methods, PARALLEL):
            links = list(LINKS) if not link else [""] if method == ONE else [link]
            found = next((mine[method, name] for name in links if (method, name) in mine), [])
            if not found or (not link and method == PARALLEL):  # which is one process there
                continue
            column = 0 if link else 1
            curve = np.mean([[(point[column], point[2]) for point in row["curve"]] for row in found], 0)
            if not link:
                curve[:, 0] *= found[0]["samples"] / curve[-1, 0] / 1000
            (handles[method],) = axis.plot(*curve[1:].T, color=COLORS.get(method, PURPLE), lw=2, marker="o", ms=3)
        axis.set_title(f"over virtual time, {link}" if link else "at equal samples")
        axis.set_xlabel("virtual seconds" if link else "thousands of samples, over all workers")
        if link:
            _log_seconds(axis)
    axes[0].set_ylim(1.88, 2.6)
    axes[0].set_ylabel("held-out loss of the center")
    figure.legend(handles.values(), handles.keys(), ncol=5, loc="upper left", bbox_to_anchor=(0.01, 0.02))
    title(figure, "Shakespeare's characters, a GPT, 4 workers")
    return figure


def signed(values: list[float], digits: int) -> str:
    """As `spread`, with signs."""
    if not values:
        return ""
    said = f"{mean(values):+.{digits}f}"
    return said + (f" ({min(values):+.{digits}f} to {max(values):+.{digits}f})" if len(values) > 1 else "")


def write(out: Path, rows: list[dict]) -> None:
    """Write benchmarks.md and the pictures."""
    if not rows:
        print("no finished cell yet")
        return
    (out / "benchmarks.md").write_text(tables(rows))
    groups = group(rows)
    found = {key[0] for key in groups}
    pictures = {"Fashion-MNIST": fashion, "Shakespeare": shakespeare}
    draw(out, [picture for name, picture in pictures.items() if name in found], groups)
    print(tables(rows))
