"""Tables and pictures from the finished cells."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from cells import DIVERGED, METHODS, PUBLISHED, Cell

CHANCE = 0.1  # accuracy before the first evaluation: ten classes
COLORS = {
    "alone": "#8a8f98", "AGN": "#1f6fd6", "AEASGD": "#e69f00", "DOWNPOUR": "#c8443c", "DynSGD": "#8c6bb1",
    "AGN r=1": "#12977a", "AGN r=2": "#7fc241", "AGN stale": "#b5498f", "AGN r=1 momentum": "#5b4bb7",
    "AGN DyLU": "#4fb3d9", "AGN r=1 DyLU": "#0c5f4d",
}  # fmt: skip


def cell_of(row: dict) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


def group(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The cells that differ in nothing but the seed, by (scene, method, n, λ)."""
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        groups.setdefault((row["scene"], row["method"], row["workers"], row["period"]), []).append(row)
    return groups


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and the least and the greatest if there are several."""
    said = f"{mean(values):.{digits}f}"
    return said + (f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else "")


def efficiency(a: dict, b: dict) -> float:
    """E(a, b) = ∫₀ᵐ f_a / ∫₀ᵐ f_b: f validation accuracy of the center over virtual time, m the shorter run's end."""
    curves = [[(0.0, CHANCE), *((time, accuracy) for time, _, accuracy, _ in row["curve"])] for row in (a, b)]
    end = min(curve[-1][0] for curve in curves)
    areas = []
    for curve in curves:
        times, values = np.array(curve).T
        grid = np.unique(np.append(times[times < end], end))
        f = np.interp(grid, times, values)
        areas.append(float(np.sum(np.diff(grid) * (f[1:] + f[:-1]) / 2)))
    return areas[0] / areas[1]


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def tables(rows: list[dict]) -> str:
    """All that the cells say, as Markdown."""
    groups = group(rows)
    size = rows[0]["size"]
    methods = [m for m in METHODS if any(key[1] == m and key[0] == "equal" for key in groups) and m != "alone"]
    pairs = sorted({key[2:] for key in groups if key[0] == "equal"} - {(1, 1)}, key=lambda p: (p[0] / p[1], p))
    text = (
        f"MNIST, MLP 784-{'-'.join(map(str, size['widths']))}-10, batch 128, {size['epochs']:g} epochs over all "
        f"workers, Adam 0.001 at the workers, agnmpi {rows[0]['agnmpi']}. Accuracy of the center on the 10,000 test "
        "images at the end, in %: mean (least–greatest) over the seeds.\n\n"
    )
    if alone := groups.get(("equal", "alone", 1, 1)):
        text += f"One process, Adam alone: {spread([row['accuracy'] for row in alone])}.\n\n"
    lines = []
    for n, period in pairs:
        line = [f"{n}, {period}", f"{n / period:g}"]
        for method in methods:
            same = method == "AGN r=1" and n == period
            found = groups.get(("equal", "AGN" if same else method, n, period), [])
            line.append(("= AGN" if same else spread([row["accuracy"] for row in found])) if found else "")
        for method in ("AGN", "AEASGD", "DOWNPOUR"):
            known = PUBLISHED.get((method, n, period))
            line.append(f"{known:.2f}" if known else "diverges" if (method, n, period) in DIVERGED else "")
        lines.append(line)
    head = ["n, λ", "n/λ", *methods, "AGN, published", "AEASGD, published", "DOWNPOUR, published"]
    text += markdown(head, lines)
    text += "\nTemporal efficiency E(a, b), f the validation accuracy over virtual time; above 1: a is ahead.\n\n"
    versus = [("AGN", "AEASGD"), ("AGN", "DOWNPOUR"), ("AGN r=1", "AGN"), ("AGN r=2", "AGN"), ("AGN r=1", "AEASGD")]
    lines = []
    for n, period in pairs:
        line = [f"{n}, {period}"]
        for a, b in versus:
            first, second = (groups.get(("equal", m, n, period), []) for m in (a, b))
            values = [efficiency(x, y) for x in first for y in second if x["seed"] == y["seed"]]
            line.append(spread(values, 3) if values else "")
        lines.append(line)
    text += markdown(["n, λ", *(f"E({a}, {b})" for a, b in versus)], lines)
    text += "\nStaleness, and other scenes of time.\n\n"
    lines = [
        [
            scene,
            method,
            f"{n}, {period}",
            spread([row["accuracy"] for row in found]),
            spread([row["staleness"]["mean"] for row in found], 1),
            str(max(row["staleness"]["max"] for row in found)),
            f"{mean(row['virtual']['seconds'] for row in found):.2f}",
            f"{mean(row['virtual']['utilisation']['workers'] for row in found):.0%}",
        ]
        for (scene, method, n, period), found in sorted(groups.items(), key=lambda item: (item[0][0], *item[0][2:]))
        if scene != "equal" or method in ("AGN", "AEASGD", "DOWNPOUR")
    ]
    head = ["scene", "rule", "n, λ", "accuracy", "staleness", "largest", "virtual s", "workers busy"]
    return text + markdown(head, lines)


def write_csv(out: Path, rows: list[dict]) -> None:
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Cell._fields, "accuracy", "commits", "staleness_mean", "staleness_max", "virtual_seconds"])
        for row in sorted(rows, key=cell_of):
            stale = row["staleness"]
            numbers = [round(row["accuracy"], 2), row["commits"], round(stale["mean"], 3), stale["max"]]
            writer.writerow([*cell_of(row), *numbers, round(row["virtual"]["seconds"], 3)])


STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6", "axes.labelcolor": "#3c4043", "xtick.color": "#5f6368", "ytick.color": "#5f6368",
    "axes.grid": True, "grid.color": "#eceff1", "axes.axisbelow": True, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False, "savefig.dpi": 110,
}  # fmt: skip


def draw(out: Path, pictures: Sequence[Callable], *given) -> None:
    """Write NAME.png for each of `pictures`, functions NAME(plt, *given) that return a figure."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no matplotlib, no pictures: pip install matplotlib, then --report")
        return
    mpl.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        for picture in pictures:
            figure = picture(plt, *given)
            figure.savefig(out / f"{picture.__name__}.png", bbox_inches="tight", facecolor="white")
            plt.close(figure)


def write_all(
    out: Path, rows: list[dict], write_csv: Callable, tables: Callable, pictures: Sequence[Callable], group: Callable
) -> None:
    """Write results.csv, tables.md and the pictures; print the tables."""
    if not rows:
        print("no finished cell yet")
        return
    write_csv(out, rows)
    text = tables(rows)
    (out / "tables.md").write_text(text)
    draw(out, pictures, group(rows))
    print(text)
    print(f"written to {out}/: results.csv, tables.md, and the pictures")


def write(out: Path, rows: list[dict]) -> None:
    """Write results.csv, tables.md and the pictures of the paper's cells."""
    write_all(out, rows, write_csv, tables, (over_time, over_ratio, staleness), group)


def stretched(accuracy: np.ndarray | float) -> np.ndarray:
    """−log₁₀ of the error: as far from 90 % to 99 % as from 0 to 90 %."""
    return -np.log10(np.maximum(1 - np.asarray(accuracy), 1e-4))


def accuracy_axis(axis, least=0.05, greatest=0.985) -> None:
    ticks = [t for t in (0.1, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99) if least <= t <= greatest]
    axis.set_yticks(stretched(np.array(ticks)), [f"{100 * t:g} %" for t in ticks])
    axis.set_ylim(stretched(least), stretched(greatest))


def _pairs(groups: dict[tuple, list[dict]]) -> list[tuple[int, int]]:
    pairs = {key[2:] for key in groups if key[0] == "equal"} - {(1, 1)}
    if len(pairs) > 12:  # the full grid: the corners and the middle
        pairs &= {(10, 10), (20, 20), (40, 40), (40, 20), (40, 10), (10, 40)}
    return sorted(pairs, key=lambda pair: (pair[0] / pair[1], pair))


def _panels(plt, count: int, height: float):
    columns = min(3 if count <= 6 else 4, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.1 * columns, height * lines), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def over_time(plt, groups):
    """Validation accuracy over virtual time, a panel for each (n, λ)."""
    pairs = _pairs(groups)
    figure, axes = _panels(plt, len(pairs), 3.1)
    handles = {}
    for axis, (n, period) in zip(axes, pairs):
        for method in METHODS:
            found = groups.get(("equal", method, n, period))
            if not found:
                continue
            curves = [np.array([(0.0, 0, CHANCE, 0), *map(tuple, row["curve"])], float) for row in found]
            grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 120)
            values = stretched(np.array([np.interp(grid, curve[:, 0], curve[:, 2]) for curve in curves]))
            strong = method in ("AGN", "AGN r=1")
            (line,) = axis.plot(
                grid, values.mean(axis=0), color=COLORS[method], lw=2.4 if strong else 1.5, zorder=3 + strong
            )
            axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=COLORS[method], alpha=0.13, lw=0)
            handles[method] = line
        if alone := groups.get(("equal", "alone", 1, 1)):
            best = stretched(mean(row["accuracy"] for row in alone) / 100)
            handles["one process, at its end"] = axis.axhline(best, color=COLORS["alone"], ls=(0, (4, 3)), lw=1.2)
        accuracy_axis(axis)
        axis.set_title(f"n = {n}, λ = {period}   (n/λ = {n / period:g})")
        axis.set_xlabel("virtual time, s")
        axis.set_xlim(left=0)
    figure.tight_layout()
    figure.legend(handles.values(), handles.keys(), ncol=len(handles), loc="lower left", bbox_to_anchor=(0.01, 1.0))
    figure.text(
        0.015, 1.06, "Validation accuracy of the center over virtual time: mean, and least to greatest over seeds",
        fontsize=13, fontweight="bold", color="#202124",
    )  # fmt: skip
    return figure


def over_ratio(plt, groups):
    """Final validation accuracy over n/λ."""
    figure, axis = plt.subplots(figsize=(9.2, 5.4))
    methods = [m for m in METHODS if m != "alone" and any(key[:2] == ("equal", m) for key in groups)]
    for i, method in enumerate(methods):
        at = sorted((n / period, n, period) for scene, m, n, period in groups if (scene, m) == ("equal", method))
        shift = 2 ** (0.07 * (i - (len(methods) - 1) / 2))
        named: list[tuple[float, float]] = []
        for j, (ratio, n, period) in enumerate(at):
            ends = np.array([row["accuracy"] / 100 for row in groups["equal", method, n, period]])
            middle, low, high = stretched(ends.mean()), stretched(ends.min()), stretched(ends.max())
            axis.vlines(ratio * shift, low, high, color=COLORS[method], lw=2.5, alpha=0.55)
            crowded = any(ratio == other and abs(middle - value) < 0.05 for other, value in named)
            if i == 0 and sum(other == ratio for other, _, _ in at) > 1 and not crowded:
                named.append((ratio, float(middle)))
                axis.text(
                    ratio * shift / 1.04, middle, f"n = {n}", ha="right", va="center", fontsize=8, color="#5f6368"
                )
            axis.plot(
                ratio * shift, middle, "o", color=COLORS[method], ms=7, mec="white", mew=0.8,
                label=None if j else f"{method} (at n/λ = 1: AGN)" if method == "AGN r=1" else method,
            )  # fmt: skip
    known = [(n / period, value / 100) for (method, n, period), value in PUBLISHED.items() if method == "AGN"]
    x, y = np.array(sorted(known)).T
    axis.plot(x, stretched(y), "s", color="#c4c9cf", ms=7, zorder=1, label="AGN, published (large MLP, 40 epochs)")
    if alone := groups.get(("equal", "alone", 1, 1)):
        best = stretched(mean(row["accuracy"] for row in alone) / 100)
        axis.axhline(best, color=COLORS["alone"], ls=(0, (4, 3)), lw=1.2, label="one process")
    axis.axvspan(2.5, 5.6, color="#fdecea", zorder=0, lw=0)
    axis.text(2.6, stretched(0.985), "n/λ > 2", color="#b3483f", fontsize=10, va="center")
    axis.set_xscale("log", base=2)
    ratios = sorted({key[2] / key[3] for key in groups if key[1] != "alone"})
    axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axis.set_xlim(min(ratios) / 1.35, max(ratios) * 1.35)
    axis.minorticks_off()
    accuracy_axis(axis, 0.05, 0.989)
    axis.set_xlabel("n/λ: workers / communication period")
    axis.set_ylabel("validation accuracy at the end")
    axis.set_title("What holds where n/λ is large, and learns where it is small", fontsize=13, pad=12)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def staleness(plt, groups):
    """How old AGN's commits are."""
    pairs = _pairs(groups)
    figure, axes = _panels(plt, len(pairs), 2.5)
    for axis, (n, period) in zip(axes, pairs):
        for scene, method, color, filled in (
            ("equal", "AGN", COLORS["AGN"], True), ("saturated", "AGN", "#c8443c", False),
            ("stragglers", "AGN", "#12977a", False), ("stragglers", "AGN DyLU", "#5b4bb7", False),
        ):  # fmt: skip
            found = groups.get((scene, method, n, period))
            if not found:
                continue
            width = max(row["staleness"]["histogram"]["width"] for row in found)
            counts = np.zeros(1 + max(row["staleness"]["max"] for row in found) // width)
            for row in found:
                histogram = row["staleness"]["histogram"]
                for i, count in enumerate(histogram["counts"]):
                    counts[i * histogram["width"] // width] += count
            share, edges = counts / counts.sum() / width, np.arange(len(counts) + 1) * width - 0.5
            label = {"equal": "equal workers", "saturated": "saturated center"}.get(scene, f"stragglers, {method}")
            if filled:
                axis.stairs(share, edges, fill=True, color=color, alpha=0.75, label=label)
            else:
                axis.stairs(share, edges, color=color, lw=1.6, label=label)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.1)
        axis.axvline(n - 1, color="#3c4043", ls=(0, (4, 3)), lw=1, label="n − 1")
        axis.set_title(f"n = {n}, λ = {period}")
        axis.set_xlabel("staleness of a commit")
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.grid(False)
        crowded = "right" if axis.get_xlim()[1] > 2.5 * n else "left"
        axis.legend(fontsize=8, loc=f"upper {crowded}")
    figure.suptitle("Staleness of AGN's commits", x=0.01, ha="left", fontsize=13, fontweight="bold", color="#202124")
    figure.tight_layout()
    return figure
