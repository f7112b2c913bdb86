"""Explanations and warnings about the numbers of a run."""

from ..core.rules import CommitInfo, Rule


def advice(rule: Rule, workers: int, period: int, adds: bool = True) -> list[str]:
    """Advice about n/λ, or the effective outer rate instead, for this run; empty for other rules than agn.

    `adds`: the center adds commits; where an optimizer steps it, a round is no number of mean displacements.

    Source: arXiv:1710.02368, section 4 (unstable above 2); slow where a round moves the center by less than a mean
    displacement: ours, in virtual time.
    """
    if rule.name != "agn":
        return []
    ratio = workers / period
    lines = [f"n/λ = {workers}/{period} = {ratio:.3g} (workers / communication period)"]
    if rule.accumulates:
        return lines
    if rule.weighs:
        weight = rule.weight(CommitInfo(workers - 1, 1, period, workers))
        if not weight:
            late = f"with {workers} workers a commit is {workers - 1} others late"
            return [*lines, f"WARNING: {late}, and the rule drops it: such steps are taken again"]
        ratio *= weight
        lines.append(f"effective outer rate {ratio:.3g}: what a round of {workers} ordinary commits counts")
    if not adds:
        return lines
    if ratio > 2:
        lines.append(
            "WARNING: above 2 AGN becomes unstable: expect worse accuracy or divergence; "
            f"use a period of at least {-(-workers // 2)}, fewer workers, or an outer rate of 1"
        )
    elif ratio < 0.8:
        lines.append(
            f"note: each round of commits moves the center by only {ratio:.3g} mean displacements, so progress "
            f"per sample is slow at first; a shorter period (about {max(1, workers)}), or an outer rate of 1, often "
            "learns more per sample"
        )
    return lines
