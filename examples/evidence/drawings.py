"""Tables and pictures from the finished cells."""

import csv
from pathlib import Path
from statistics import mean

import numpy as np
from report import accuracy_axis, markdown, spread, stretched, write_all
from scenarios import QUORUMS, SCENES, SPEEDS, TARGET, WORKERS, Cell

GREY, BLUE, GREEN, RED, ORANGE, DARK = "#8a8f98", "#1f6fd6", "#12977a", "#c8443c", "#e69f00", "#202124"
COLORS = {
    "synchronous, λ = 1": "#b9bec6", "synchronous, λ = 10": GREY, "DiLoCo": ORANGE, "AGN": BLUE, "r = 1": GREEN,
    "r = 1, DyLU": "#0c5f4d", "default": DARK,
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


def reached(row: dict, target: float = TARGET) -> float | None:
    """Virtual seconds until the center's validation accuracy is `target`, between evaluations by a straight line."""
    before = (0.0, 0.0)
    for time, _, accuracy, _ in row["curve"]:
        if accuracy >= target:
            return before[0] + (time - before[0]) * (target - before[1]) / (accuracy - before[1])
        before = time, accuracy
    return None


def steady(row: dict) -> float:
    """Speed up to the last evaluation within nine tenths of the samples, before workers run out of work."""
    last = row["curve"][-1][1]
    time, epoch = next((time, epoch) for time, epoch, *_ in reversed(row["curve"]) if epoch <= 0.9 * last)
    return row["speed"] * (epoch / last) / (time / row["virtual"]["seconds"])


def _times(found: list[dict]) -> list[float]:
    return [time for row in found if (time := reached(row)) is not None]


def table(groups: Groups, scene: str) -> str:
    """A line for each method in `scene`."""
    lines = []
    for method in (*SPEEDS, *QUORUMS):
        if not (found := groups.get((scene, method))):
            continue
        times = _times(found)
        said = spread(times, 1) if times else "never"
        lines.append([
            method,
            spread([100 * steady(row) for row in found], 1),
            spread([100 * row["speed"] for row in found], 1),
            said + (f" in {len(times)} of {len(found)}" if 0 < len(times) < len(found) else ""),
            spread([row["accuracy"] for row in found]),
            spread([row["staleness"]["mean"] for row in found], 1),
            str(max(row["staleness"]["max"] for row in found)),
            f"{100 * mean(row['dropped'] / (row['commits'] + row['dropped']) for row in found):.1f}",
        ])  # fmt: skip
    head = [
        "rule",
        "speed, %",
        "with the end, %",
        f"s to {100 * TARGET:g} %",
        "accuracy, %",
        "staleness",
        "largest",
        "dropped, %",
    ]
    return markdown(head, lines)


def tables(rows: list[dict]) -> str:
    """All that the cells say, as Markdown."""
    groups, size = group(rows), rows[0]["size"]
    seeds = max(len(found) for found in groups.values())
    text = (
        f"MNIST, MLP 784-{'-'.join(map(str, size['widths']))}-10, batch {size['batch']}, {size['epochs']:g} epochs "
        f"over all of n = {WORKERS} workers, λ = 10, Adam at the workers, 0.001 but for the default, virtual time, "
        f"agnmpi {rows[0]['agnmpi']}. Mean (least–greatest) over at most {seeds} seeds. Speed: samples per virtual "
        "second in % of what the workers compute together if none ever waits, over the first nine tenths of the "
        "samples, and with the end, where workers wait for the last. s: virtual seconds until the center's accuracy "
        "on the 10,000 test images is there. r: outer rate; R: staleness cap; K commits make one step of rate η.\n"
    )
    for scene in SCENES:
        text += f"\n**{TITLES[scene]}**\n\n{table(groups, scene)}"
    return text


def write_csv(out: Path, rows: list[dict]) -> None:
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["accuracy", "speed", "speed_with_the_end", "seconds_to_target", "virtual_seconds", "commits"]
        writer.writerow([*Cell._fields, *names, "dropped", "staleness_mean", "staleness_max"])
        for row in sorted(rows, key=lambda row: [str(row[name]) for name in Cell._fields]):
            time, cell = reached(row), [row[name] for name in Cell._fields]
            speeds = round(steady(row), 4), round(row["speed"], 4)
            times = "" if time is None else round(time, 2), round(row["virtual"]["seconds"], 2)
            stale = round(row["staleness"]["mean"], 2), row["staleness"]["max"]
            writer.writerow([*cell, round(row["accuracy"], 2), *speeds, *times, row["commits"], row["dropped"], *stale])


def write(out: Path, rows: list[dict]) -> None:
    """Write results.csv, tables.md and the pictures."""
    write_all(out, rows, write_csv, tables, (speed, over_time, cap, quorum), group)


def _title(figure, text: str) -> None:
    figure.tight_layout()
    figure.suptitle(text, x=0.01, y=1.0, ha="left", va="bottom", fontsize=13, fontweight="bold", color=DARK)


def speed(plt, groups: Groups):
    """Who waits: samples per second of each rule."""
    methods = list(SPEEDS)
    figure, axes = plt.subplots(1, len(SCENES), figsize=(11, 3.6), sharey=True)
    for axis, scene in zip(axes, SCENES):
        for y, method in enumerate(methods):
            if not (found := groups.get((scene, method))):
                continue
            values = [100 * steady(row) for row in found]
            color = GREEN if method == RECOMMENDED else GREY if method in list(SPEEDS)[:3] else "#9fc3ef"
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
    _title(figure, "Samples per second: who waits")
    return figure


def over_time(plt, groups: Groups):
    """Accuracy over virtual time."""
    figure, axes = plt.subplots(1, len(SCENES), figsize=(11, 4.2), sharey=True)
    handles = {}
    for axis, scene in zip(axes, SCENES):
        ends = []
        for method, color in COLORS.items():
            if not (found := groups.get((scene, method))):
                continue
            curves = [np.array([(time, accuracy) for time, _, accuracy, _ in row["curve"]]) for row in found]
            ends.append(mean(curve[-1, 0] for curve in curves))
            grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 150)
            values = stretched(np.array([np.interp(grid, *curve.T) for curve in curves]))
            (handles[method],) = axis.plot(grid, values.mean(axis=0), color=color, lw=2.2)
            axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)
        axis.axhline(stretched(TARGET), color=RED, ls=(0, (4, 3)), lw=1)
        accuracy_axis(axis, 0.4, 0.965)
        axis.set_xlim(0, sorted(ends)[len(ends) // 2] * 2 if ends else 1)
        axis.set_title(TITLES[scene])
        axis.set_xlabel("virtual time, s")
    axes[0].set_ylabel("validation accuracy of the center")
    figure.legend(handles.values(), handles.keys(), ncol=len(handles), loc="upper left", bbox_to_anchor=(0.01, 0.02))
    _title(figure, "Validation accuracy of the center over virtual time")
    return figure


def cap(plt, groups: Groups):
    """The effect of the staleness cap R."""
    names = {"R = n": "r = 1, R = n", "R = 2n": "r = 1, R = 2n", "R = 4n": "r = 1, R = 4n", "none": "r = 1"}
    names["DyLU, no R"] = "r = 1, DyLU"
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    for scene, color, shift in zip(SCENES, (BLUE, ORANGE), (-0.09, 0.09)):
        for axis, values_of in zip(axes, (lambda found: [100 * steady(row) for row in found], _times)):
            for x, method in enumerate(names.values()):
                if values := values_of(groups.get((scene, method), [])):
                    axis.vlines(x + shift, min(values), max(values), color=color, lw=2.5, alpha=0.5)
                    label = TITLES[scene] if x == 0 else None
                    axis.plot(x + shift, mean(values), "o", color=color, ms=8, mec="white", label=label)
    axes[0].set_title("speed, % of all workers' own speeds")
    axes[1].set_title(f"virtual seconds to {100 * TARGET:g} %")
    for axis in axes:
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel("commits staler than R are dropped")
        axis.set_ylim(bottom=0, top=axis.get_ylim()[1] * 1.05)
        axis.grid(axis="x", visible=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncol=2, loc="upper left", bbox_to_anchor=(0.01, 0.02))
    _title(figure, "What a cap R on staleness does")
    return figure


def quorum(plt, groups: Groups):
    """Final accuracy of each quorum, beside AGN r = 1 and DiLoCo."""
    methods = ["r = 1", "DiLoCo", *QUORUMS]
    figure, axes = plt.subplots(1, len(SCENES), figsize=(11, 4.6), sharey=True)
    for axis, scene in zip(axes, SCENES):
        for y, method in enumerate(methods):
            if not (found := groups.get((scene, method))):
                continue
            values = stretched(np.array([row["accuracy"] / 100 for row in found]))
            apart = "apart" in method
            color = {"r = 1": GREEN, "DiLoCo": ORANGE}.get(method, RED if apart else BLUE)
            axis.hlines(y, values.min(), values.max(), color=color, lw=2.5, alpha=0.5)
            axis.plot(values.mean(), y, "o", color=color, ms=7, mec="white")
        if best := groups.get((scene, "r = 1")):
            ends = stretched(np.array([row["accuracy"] / 100 for row in best]))
            axis.axvspan(ends.min(), ends.max(), color=GREEN, alpha=0.12, lw=0)
        ticks = np.array([0.1, 0.5, 0.8, 0.9, 0.93, 0.95])
        axis.set_xticks(stretched(ticks), [f"{100 * t:g} %" for t in ticks])
        axis.set_title(TITLES[scene])
        axis.set_xlabel("validation accuracy at equal samples")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    _title(figure, "A quorum of K commits: direction and length together, or apart")
    return figure
