"""Tables and pictures from the finished cells."""

import csv
from pathlib import Path
from statistics import mean

import numpy as np
from report import accuracy_axis, markdown, spread, stretched, write_all
from scenarios import RATES, SCENES, SPEEDS, TARGETS, TUNED, WORKERS, Cell

GREY, BLUE, GREEN, RED, ORANGE, DARK = "#8a8f98", "#1f6fd6", "#12977a", "#c8443c", "#e69f00", "#202124"
COLORS = {
    "synchronous, λ = 1": "#b9bec6", "synchronous, λ = 10": GREY, "DiLoCo": ORANGE, "AGN": BLUE, "r = 1": GREEN,
    "synchronous, λ = 10, rate 0.008": RED, "default": DARK,
}  # fmt: skip
RECOMMENDED = "default"
TITLES = {
    "1 to 16 times": "step times differ by 1, 2, 4, 8, 16",
    "stalls": "step times are random, one worker is 4 × slower",
}
Groups = dict[tuple[str, str], list[dict]]


def group(rows: list[dict]) -> Groups:
    """The cells that differ in nothing but the seed, by (scene, method)."""
    groups: Groups = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        groups.setdefault((row["scene"], row["method"]), []).append(row)
    return groups


def reached(row: dict, target: float, falls: bool = False) -> float | None:
    """Virtual seconds until the center's metric is `target`, between evaluations by a straight line."""
    before = (0.0, 0.0)
    for time, _, value, _ in row["curve"]:
        if value <= target if falls else value >= target:
            share = (target - before[1]) / (value - before[1])
            return before[0] + share * (time - before[0])
        before = time, value
    return None


def steady(row: dict) -> float:
    """Speed up to the last evaluation within nine tenths of the samples, before workers run out of work."""
    last = row["curve"][-1][1]
    time, epoch = next((time, epoch) for time, epoch, *_ in reversed(row["curve"]) if epoch <= 0.9 * last)
    return row["speed"] * (epoch / last) / (time / row["virtual"]["seconds"])


def _times(found: list[dict], target: float) -> list[float]:
    return [time for row in found if (time := reached(row, target)) is not None]


def _said(found: list[dict], target: float) -> str:
    times = _times(found, target)
    said = spread(times, 1) if times else "never"
    return said + (f" in {len(times)} of {len(found)}" if 0 < len(times) < len(found) else "")


def table(groups: Groups, scene: str) -> str:
    """A line for each method in `scene`."""
    lines = []
    for method in SPEEDS:
        if not (found := groups.get((scene, method))):
            continue
        lines.append([
            method,
            str(len(found)),
            spread([100 * steady(row) for row in found], 1),
            spread([100 * row["speed"] for row in found], 1),
            *(_said(found, target) for target in TARGETS),
            spread([row["accuracy"] for row in found]),
            spread([row["staleness"]["mean"] for row in found], 1),
            str(max(row["staleness"]["max"] for row in found)),
            f"{100 * mean(row['dropped'] / (row['commits'] + row['dropped']) for row in found):.1f}",
        ])  # fmt: skip
    head = [
        "rule",
        "seeds",
        "speed, %",
        "with the end, %",
        *(f"s to {100 * target:g} %" for target in TARGETS),
        "accuracy, %",
        "staleness",
        "largest",
        "dropped, %",
    ]
    return markdown(head, lines)


def tuned(groups: Groups) -> dict[str, dict[float, list[float]]]:
    """Final accuracies of the quorum and what it is compared with, by rate, in the first scene."""
    return {
        name: {
            rate: [row["accuracy"] for row in found]
            for rate in RATES
            if (found := groups.get((next(iter(SCENES)), f"{name}, rate {rate:g}")))
        }
        for name in TUNED
    }


def quorum_table(groups: Groups) -> str:
    """Final accuracy for each rate."""
    lines = [
        [name, *(f"{spread(found[rate])}; {len(found[rate])}" if rate in found else "" for rate in RATES)]
        for name, found in tuned(groups).items()
        if found
    ]
    return markdown(["rule", *(f"{rate:g}" for rate in RATES)], lines)


def tables(rows: list[dict]) -> str:
    """All that the cells say, as Markdown."""
    groups, size = group(rows), rows[0]["size"]
    text = (
        f"MNIST, MLP 784-{'-'.join(map(str, size['widths']))}-10, batch {size['batch']}, {size['epochs']:g} epochs "
        f"over all of n = {WORKERS} workers, λ = 10, Adam at the workers, 0.001 but for the default, virtual time, "
        f"agnmpi {rows[0]['agnmpi']}. Mean (least–greatest) over the seeds. Speed: samples per virtual "
        "second in % of what the workers compute together if none ever waits, over the first nine tenths of the "
        "samples, and with the end, where workers wait for the last. s: virtual seconds until the center's accuracy "
        "on the 10,000 test images is there. r: outer rate; R: staleness cap; K commits make one step of rate η.\n"
    )
    for scene in SCENES:
        text += f"\n**{TITLES[scene]}**\n\n{table(groups, scene)}"
    if any(tuned(groups).values()):
        text += (
            "\n**A quorum of K commits**, accuracy in % (seeds) for each rate of Adam, " + TITLES[next(iter(SCENES))]
        )
        text += f"\n\n{quorum_table(groups)}"
    return text


def write_csv(out: Path, rows: list[dict]) -> None:
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = [
            "accuracy",
            "speed",
            "speed_with_the_end",
            *(f"seconds_to_{t}" for t in TARGETS),
            "virtual_seconds",
            "commits",
        ]
        writer.writerow([*Cell._fields, *names, "dropped", "staleness_mean", "staleness_max"])
        for row in sorted(rows, key=lambda row: [str(row[name]) for name in Cell._fields]):
            cell = [row[name] for name in Cell._fields]
            speeds = round(steady(row), 4), round(row["speed"], 4)
            times = [*(reached(row, target) for target in TARGETS), row["virtual"]["seconds"]]
            times = ["" if time is None else round(time, 2) for time in times]
            stale = round(row["staleness"]["mean"], 2), row["staleness"]["max"]
            writer.writerow([*cell, round(row["accuracy"], 2), *speeds, *times, row["commits"], row["dropped"], *stale])


def write(out: Path, rows: list[dict]) -> None:
    """Write results.csv, tables.md and the pictures."""
    pictures = (speed, over_time, cap) + (quorum,) * any(tuned(group(rows)).values())
    write_all(out, rows, write_csv, tables, pictures, group)


def title(figure, text: str) -> None:
    figure.tight_layout()
    figure.suptitle(text, x=0.01, y=1.0, ha="left", va="bottom", fontsize=13, fontweight="bold", color=DARK)


def speed(plt, groups: Groups):
    """Who waits: samples per second of each rule."""
    methods = [method for method in SPEEDS if "R = " not in method and "rate" not in method]
    figure, axes = plt.subplots(1, len(SCENES), figsize=(11, 3.2), sharey=True)
    for axis, scene in zip(axes, SCENES):
        for y, method in enumerate(methods):
            if not (found := groups.get((scene, method))):
                continue
            values = [100 * steady(row) for row in found]
            waits = method == "DiLoCo" or method.startswith("synchronous")
            color = GREEN if method == RECOMMENDED else GREY if waits else "#9fc3ef"
            axis.barh(y, mean(values), color=color, height=0.7)
            axis.hlines(y, min(values), max(values), color=DARK, lw=1.2)
            axis.text(max(values) + 1.5, y, f"{mean(values):.0f} %", va="center", fontsize=9, color=DARK)
        axis.set_title(TITLES[scene])
        axis.set_xlabel("speed, % of all workers' own speeds")
        axis.set_xlim(0, 112)
        axis.set_xticks(range(0, 101, 20))
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    title(figure, "Samples per second: who waits")
    return figure


def over_time(plt, groups: Groups):
    """Accuracy over virtual time."""
    figure, axes = plt.subplots(1, len(SCENES), figsize=(11, 4.2), sharey=True)
    handles = {}
    for axis, scene in zip(axes, SCENES):
        for method, color in COLORS.items():
            if not (found := groups.get((scene, method))):
                continue
            curves = [np.array([(time, accuracy) for time, _, accuracy, _ in row["curve"]]) for row in found]
            grid = np.geomspace(0.2, min(curve[-1, 0] for curve in curves), 150)
            values = stretched(np.array([np.interp(grid, *curve.T) for curve in curves]))
            (handles[method],) = axis.plot(grid, values.mean(axis=0), color=color, lw=2.2)
            axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)
        accuracy_axis(axis, 0.4, 0.965)
        axis.set_xscale("log")
        axis.set_xticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
        axis.set_xlim(left=0.25)
        axis.set_title(TITLES[scene])
        axis.set_xlabel("virtual time, s")
    axes[0].set_ylabel("validation accuracy of the center")
    figure.legend(handles.values(), handles.keys(), ncol=4, loc="upper left", bbox_to_anchor=(0.01, 0.02))
    title(figure, "Validation accuracy of the center over virtual time")
    return figure


def cap(plt, groups: Groups):
    """The effect of the staleness cap R, in the first scene."""
    names = {f"R = {name}": f"default, R = {name}" for name in ("n", "2n", "4n")}
    names |= {"none": "default", "none, DyLU": "default, DyLU"}
    scene = next(iter(SCENES))
    panels = {
        "speed, % of all workers' own speeds": lambda found: [100 * steady(row) for row in found],
        f"virtual seconds to {100 * TARGETS[-1]:g} %": lambda found: _times(found, TARGETS[-1]),
        "accuracy at equal samples, %": lambda found: [row["accuracy"] for row in found],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4))
    for axis, (heading, values_of) in zip(axes, panels.items(), strict=True):
        for x, (name, method) in enumerate(names.items()):
            if values := values_of(groups.get((scene, method), [])):
                color = GREEN if method == RECOMMENDED else BLUE
                axis.vlines(x, min(values), max(values), color=color, lw=3, alpha=0.4)
                axis.plot(x, mean(values), "o", color=color, ms=8, mec="white", label=name)
        axis.set_title(heading)
        axis.set_xticks(range(len(names)), names, fontsize=9)
        axis.set_xlim(-0.5, len(names) - 0.5)
        axis.grid(axis="x", visible=False)
    axes[0].set_ylim(0, 105)
    axes[1].set_ylim(0, axes[1].get_ylim()[1] * 1.1)
    axes[2].set_ylim(94.5, 96.5)
    title(figure, f"Commits staler than R are dropped: {TITLES[scene]}")
    return figure


def quorum(plt, groups: Groups):
    """Final accuracy of each quorum over the rate, beside AGN r = 1 and DiLoCo."""
    figure, axis = plt.subplots(figsize=(8, 4.4))
    colors = {"r = 1": DARK, "DiLoCo": ORANGE, "K = 4": BLUE, "K = 8": GREEN, "K = 16": RED}
    for name, found in tuned(groups).items():
        if not found:
            continue
        rates = sorted(found)
        first, *apart = name.split(", ")
        color = colors[first]
        style = {"color": color, "ls": "--" if apart else "-", "marker": "s" if len(apart) == 2 else "o"}
        style |= {"mfc": "white" if apart else color}
        axis.plot(rates, [mean(found[rate]) for rate in rates], label=name, lw=1.8, ms=6, **style)
        for rate in rates:
            axis.vlines(rate, min(found[rate]), max(found[rate]), color=color, lw=3, alpha=0.4)
    axis.set_xscale("log", base=2)
    axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axis.minorticks_off()
    axis.set_xlabel("rate of Adam at the workers")
    axis.set_ylabel("test accuracy at equal samples, %")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 86))  # what is below is in the table
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    title(figure, "A quorum of K commits: direction and length together, or apart")
    return figure
