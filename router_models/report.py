"""What training and evaluation leave behind: the same document as JSON, and as one HTML page without scripts."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from router_models.evaluate import Evaluation, Ranking, SubsetRow

_SIZE, _MARGIN = 320, 36
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}figure{display:inline-block;margin:0}"
    "td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}.no{color:#a00}.yes{color:#060}svg{margin-right:1rem}"
)


HELD_OUT = (
    "Probabilities and novelty are for prompts held out of what made them, ordered as a gateway does that has learnt "
    "from the rest. The baselines are held out with the same prompts."
)


NOT_COMPARED = (
    "Not recommended: nothing could be compared, since no two models answered the same prompts. "
    "outrider replay --router estimates from a log what this artifact would have been worth."
)


@dataclass(frozen=True, slots=True)
class Report:
    """Evaluations of one artifact. `how` says which data the figures were measured on."""

    artifact: str
    feature_version: int
    data_hash: str
    how: str
    evaluations: Sequence[Evaluation]

    def document(self) -> dict[str, object]:
        return {
            "artifact": self.artifact,
            "feature_version": self.feature_version,
            "data_hash": self.data_hash,
            "how": self.how,
            "is_recommended": bool(self.evaluations) and all(e.is_recommended for e in self.evaluations),
            "evaluations": [evaluation.document() for evaluation in self.evaluations],
        }


def write(report: Report, folder: Path) -> None:
    """Write report.json and report.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.document(), indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(as_html(report), encoding="utf-8")


def as_html(report: Report) -> str:
    """One page; every text that comes from data is escaped."""
    parts = [
        f"<h1>Router {_text(report.artifact)}</h1>",
        f"<p>{_text(report.how)}<br>Features {report.feature_version}, data {_text(report.data_hash[:12])}</p>",
        *(map(_section, report.evaluations) if report.evaluations else [f'<p class="no">{NOT_COMPARED}</p>']),
    ]
    head = f'<meta charset="utf-8"><title>Router {_text(report.artifact)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _section(evaluation: Evaluation) -> str:
    verdict = (
        '<p class="yes">Beats its baselines.</p>'
        if evaluation.is_recommended
        else f'<p class="no">Not recommended: {_text("; ".join(evaluation.refusals))}.</p>'
    )
    return "".join(
        [
            f"<h2>{_text(evaluation.source)}: {_text(evaluation.strong_model)} or {_text(evaluation.weak_model)}</h2>",
            f"<p>{evaluation.n} prompts; strong right {evaluation.strong:.3f}, weak {evaluation.weak:.3f}; "
            f"the router abstains on {evaluation.abstention_rate:.1%}; abilities: {_text(evaluation.ability)}.</p>",
            verdict,
            _curves(evaluation),
            _calibration(evaluation),
            _rankings(evaluation),
            _subsets(evaluation.subsets),
        ]
    )


def _curves(evaluation: Evaluation) -> str:
    low = min(quality for _, quality in evaluation.curve)
    high = max(quality for _, quality in evaluation.oracle_curve)
    span = (high - low) or 1.0

    def scaled(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(share, (quality - low) / span) for share, quality in points]

    straight = [(0.0, evaluation.weak), (1.0, evaluation.strong)]
    lines = [
        _line(scaled(straight), "#999", is_dashed=True),
        _line(scaled(evaluation.oracle_curve), "#c80"),
        _line(scaled(evaluation.curve), "#06c"),
    ]
    title = "Quality over the share of strong calls; orange: knowing the outcomes, dashed: random"
    return _picture(title, lines, (f"{low:.2f}", f"{high:.2f}"))


def _calibration(evaluation: Evaluation) -> str:
    found = evaluation.calibration
    bins = ((found.strong_bins, "#06c"), (found.weak_bins, "#c80"))
    lines = [_line([(0.0, 0.0), (1.0, 1.0)], "#999", is_dashed=True)]
    lines += [_line([(mean, rate) for mean, rate, _ in part], colour) for part, colour in bins]
    return _picture(f"Observed over predicted; blue strong, orange weak; error {found.ece:.3f}", lines, ("0", "1"))


def _picture(title: str, lines: Sequence[str], ends: tuple[str, str]) -> str:
    full = _SIZE + 2 * _MARGIN
    frame = f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{_SIZE}" height="{_SIZE}" fill="none" stroke="#ccc"/>'
    labels = (
        f'<text x="2" y="{_MARGIN + 4}" font-size="11">{ends[1]}</text>'
        f'<text x="2" y="{_MARGIN + _SIZE}" font-size="11">{ends[0]}</text>'
    )
    content = f"<title>{_text(title)}</title>{frame}{labels}{''.join(lines)}"
    drawing = f'<svg width="{full}" height="{full}" role="img">{content}</svg>'
    return f"<figure>{drawing}<figcaption>{_text(title)}</figcaption></figure>"


def _line(points: Sequence[tuple[float, float]], colour: str, is_dashed: bool = False) -> str:
    places = " ".join(f"{_MARGIN + x * _SIZE:.1f},{_MARGIN + (1 - y) * _SIZE:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="4"' if is_dashed else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def _rankings(evaluation: Evaluation) -> str:
    names = ("apgr", "apgr_exact", "apgr_stderr", "apgr_within", "cpt50", "cpt80", "regret")
    rows: list[tuple[str, Ranking]] = [("router", evaluation.router)]
    rows += [(name, ranking) for name, ranking in evaluation.baselines.items() if ranking is not None]
    cells = [(name, *(_figure(getattr(ranking, field)) for field in names)) for name, ranking in rows]
    return _table(("", *names), cells)


def _subsets(subsets: Sequence[SubsetRow]) -> str:
    titles = ("subset", "prompts", "strong", "weak", "strong share at 50 %", "apgr_exact")
    cells = [
        (row.name, str(row.n), *map(_figure, (row.strong, row.weak, row.strong_share, row.apgr_exact)))
        for row in subsets
        if row.name
    ]
    return _table(titles, cells) if cells else ""


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _text(value: str) -> str:
    return html.escape(value)
