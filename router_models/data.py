"""What routers learn from and are measured on: prompts, and how good some models' answers to them were."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from router_models.errors import DataError
from router_models.metrics import Pair
from router_models.prompt import Prompt

Rows = NDArray[np.intp]

_Types = Mapping[str, pa.DataType]
_TEXT = pa.string()
_DROPPED = {"contaminated": pa.bool_()}

# Fewer labelled prompts are neither learnt from nor judged by.
MIN_LABELS = 30
# Some tasks' metrics leave the range by a little, a translation score below 0 for example; those are clipped.
_SLACK = 0.05


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """One source of prompts with the models that answered them.

    `results` float64 [num_prompts, num_models] in [0, 1], NaN where a model did not answer. `subset` names a domain
    inside the source, "" where none is known.
    """

    source: str
    ids: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    subset: NDArray[np.str_]
    models: tuple[str, ...]
    results: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Rows) -> Group:
        """The given prompts only."""
        ids, prompts = tuple(self.ids[i] for i in rows), tuple(self.prompts[i] for i in rows)
        return Group(self.source, ids, prompts, self.subset[rows], self.models, self.results[rows])

    def of(self, model: str) -> NDArray[np.float64]:
        """One model's results, float64 [num_prompts]; raises DataError naming the models there are."""
        if model not in self.models:
            raise DataError(f"{self.source} has no model {model!r}; it has {', '.join(self.models)}")
        return self.results[:, self.models.index(model)]

    def rows_with(self, *models: str) -> Rows:
        """Prompts that all given models answered; raises DataError if there are none."""
        known = np.all([np.isfinite(self.of(model)) for model in models], axis=0)
        if not known.any():
            raise DataError(f"{self.source} has no prompt that {' and '.join(models)} answered")
        return np.flatnonzero(known)

    def pair(self, strong: str, weak: str) -> Pair:
        """Results of two models; both must have answered all prompts of this group."""
        return Pair(self.of(strong), self.of(weak))


def find(groups: Iterable[Group], source: str) -> Group:
    """The group of that source; raises DataError naming those there are."""
    by_name = {group.source: group for group in groups}
    if source not in by_name:
        raise DataError(f"no source {source!r}; there are {', '.join(sorted(by_name))}")
    return by_name[source]


def read_tables(folder: Path) -> list[Group]:
    """Groups of a folder with `prompts.parquet` and `outcomes.parquet`, joined on `prompt_id`.

    prompts: prompt_id, source, prompt, and where there are such subset and contaminated (left out). outcomes:
    prompt_id, model, score in [0, 1], null or NaN where there is none. Raises DataError where a file or column is
    missing or of another type, an id or a prompt's score by a model is there twice, or a score is out of range.
    """
    path = folder / "prompts.parquet"
    prompts = _columns(path, dict.fromkeys(("prompt_id", "source", "prompt"), _TEXT), {"subset": _TEXT, **_DROPPED})
    scores = folder / "outcomes.parquet"
    outcomes = _columns(scores, {"prompt_id": _TEXT, "model": _TEXT, "score": pa.float64()}, {})
    if twice := _repeated(prompts["prompt_id"]):
        raise DataError(f"{path}: prompt_id {twice} is there twice")
    keep = [i for i, is_dropped in enumerate(prompts["contaminated"]) if not is_dropped]
    results = _by_prompt(scores, outcomes)
    groups = [
        group_of(
            source,
            [(prompts["prompt_id"][i], Prompt.from_text(prompts["prompt"][i]), prompts["subset"][i]) for i in rows],
            results,
        )
        for source, rows in _split(prompts["source"], keep).items()
    ]
    return [group for group in groups if group.models]


def group_of(
    source: str, prompts: Sequence[tuple[str, Prompt, str | None]], results: dict[str, dict[str, float]]
) -> Group:
    """A group of (id, prompt, subset) with results by prompt id and model."""
    models = sorted({model for prompt_id, _, _ in prompts for model in results.get(prompt_id, ())})
    table = np.full((len(prompts), len(models)), np.nan)
    column = {model: i for i, model in enumerate(models)}
    for row, (prompt_id, _, _) in enumerate(prompts):
        for model, score in results.get(prompt_id, {}).items():
            table[row, column[model]] = score
    if np.nanmin(table, initial=0.0) < -_SLACK or np.nanmax(table, initial=1.0) > 1 + _SLACK:
        raise DataError(f"{source}: scores are to be between 0 and 1")
    table = np.clip(table, 0.0, 1.0)
    ids, texts = tuple(p[0] for p in prompts), tuple(p[1] for p in prompts)
    return Group(source, ids, texts, np.array([p[2] or "" for p in prompts], dtype=np.str_), tuple(models), table)


def data_hash(groups: Iterable[Group]) -> str:
    """A digest of sources, prompts and results; equal data in another order of groups has an equal digest."""
    return hashlib.sha256("".join(sorted(map(_group_hash, groups))).encode()).hexdigest()


def prompt_digests(prompts: Iterable[Prompt]) -> NDArray[np.uint32]:
    """Sorted, distinct 32-bit digests of the prompts' texts: to notice prompts that an artifact has seen."""
    return np.unique(np.array([digest(prompt) for prompt in prompts], dtype=np.uint32))


def digest(prompt: Prompt) -> int:
    """Of the prompt's text, or of its structure where a log has not kept the text; 32 bits."""
    content = prompt.text if prompt.turns else repr(prompt.structure)
    return int.from_bytes(hashlib.sha256(content.encode(errors="replace")).digest()[:4], "little")


def _group_hash(group: Group) -> str:
    digest = hashlib.sha256(repr((group.source, group.models)).encode())
    for row in sorted(range(len(group)), key=group.ids.__getitem__):
        prompt = group.prompts[row]
        digest.update(repr((group.ids[row], prompt)).encode(errors="replace"))
        if prompt.structure is not None:
            digest.update(repr(prompt.structure).encode())
        digest.update(group.results[row].tobytes())
    return digest.hexdigest()


def _columns(path: Path, needed: _Types, optional: _Types) -> dict[str, list[Any]]:
    """Columns as these types; all null where an optional one is missing."""
    try:
        table = pq.read_table(path)
        missing = [name for name in needed if name not in table.column_names]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}")
        types = {**needed, **{name: kind for name, kind in optional.items() if name in table.column_names}}
        columns = {name: table.column(name).cast(kind) for name, kind in types.items()}
        found = {name: column.to_pylist() for name, column in columns.items()}
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}") from error
    for name in needed:
        if needed[name] == _TEXT and columns[name].null_count:
            raise DataError(f"{path}: row {found[name].index(None)} has no {name}")
    return {name: [None] * table.num_rows for name in optional} | found


def _repeated(ids: Sequence[str]) -> str | None:
    """An id that is there twice, if there is one."""
    counts = Counter(ids)
    return next((found for found, count in counts.most_common(1) if count > 1), None)


def _split(sources: Sequence[Any], rows: Iterable[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(str(sources[row]), []).append(row)
    return found


def _by_prompt(path: Path, outcomes: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for prompt_id, model, score in zip(outcomes["prompt_id"], outcomes["model"], outcomes["score"], strict=True):
        if score is None or isnan(score):
            continue
        if model in found.setdefault(prompt_id, {}):
            raise DataError(f"{path}: two scores of {model} for prompt_id {prompt_id}")
        found[prompt_id][model] = score
    return found
