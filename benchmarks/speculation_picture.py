"""The picture of `benchmarks.speculation`: speed over plain decoding, by sequences, for each workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

_COLOURS = {"auto": "#1b6ca8", "model": "#c8553d", "ngram": "#588157", "suffix": "#9d6b9d", "prediction": "#b8860b"}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a panel per workload and temperature, adaptive as lines, the fixed lengths' range as bands.

    Of a group that several parts of a document measured, pass the rows of one.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    figure = Figure(figsize=(4.2 * len(workloads), 3.4 * len(temperatures)), layout="constrained")
    panels = figure.subplots(len(temperatures), len(workloads), sharey="row", squeeze=False)
    for line, temperature in enumerate(temperatures):
        for column, workload in enumerate(workloads):
            own = [row for row in rows if (row["workload"], row["temperature"]) == (workload, temperature)]
            _panel(panels[line][column], own, f"{workload}, temperature {temperature:g}")
        panels[line][0].set_ylabel("speed over plain decoding")
    for panel in panels[-1]:
        panel.set_xlabel("sequences at once")
    legend: dict[str, Any] = {}
    for panel in panels.flat:
        handles, labels = panel.get_legend_handles_labels()
        legend.update(zip(map(str, labels), handles, strict=True))
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _panel(panel: Axes, rows: Sequence[dict[str, Any]], title: str) -> None:
    own = [row for row in rows if row["system"] == "outrider"]
    plain = {row["sequences"]: row["tokens_per_s"] for row in own if row["drafter"] == "none"}
    counts = sorted(plain)
    places = list(range(len(counts)))
    panel.axhline(1.0, color="black", linewidth=0.8)
    for drafter, colour in _COLOURS.items():
        ratios = {
            count: {
                row["draft_length"]: row["tokens_per_s"] / plain[count]
                for row in own
                if (row["drafter"], row["sequences"]) == (drafter, count)
            }
            for count in counts
        }
        if not all(ratios.values()):
            continue
        fixed = [[ratio for length, ratio in ratios[count].items() if length != "adaptive"] for count in counts]
        if all(fixed):
            panel.fill_between(places, list(map(min, fixed)), list(map(max, fixed)), color=colour, alpha=0.12)
        adaptive = [ratios[count]["adaptive"] for count in counts]
        panel.plot(places, adaptive, "o-", color=colour, label=f"{drafter}, adaptive")
    for row in rows:
        if row["system"] != "outrider":
            label = row["system"].replace("_", " ")
            marker = {"transformers": "x", "transformers_assisted": "^"}.get(row["system"], "v")
            place = counts.index(row["sequences"])
            panel.plot(place, row["tokens_per_s"] / plain[row["sequences"]], marker, color="grey", label=label)
    panel.set_xticks(places, list(map(str, counts)))
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
