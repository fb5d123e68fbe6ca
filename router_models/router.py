"""The trained router in memory: prompts in, calibrated probabilities of a right answer out, for any known models.

Experts are fitted in layers. Every expert first makes a quick sketch of a prompt (a linear model of its words, trees
over its structure); the sketches of all experts are signals that each expert reads for its final difficulties. A
router trained on top of another one has a second layer that also reads the first one's final difficulties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_models.ability import Ability, typical
from router_models.embedding import SentenceEmbedding
from router_models.errors import UnknownModelError
from router_models.expert import Expert, Linear
from router_models.features import Features, extract
from router_models.guard import Guard, unusual
from router_models.prompt import Prompt
from router_models.structure import FEATURE_NAMES
from router_models.text import weigh, weigh_one

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

# A prompt unlike 99 % of what its expert was fitted and measured on: no calibration is known there.
NOVEL = 0.99
_LOG_CHARS = FEATURE_NAMES.index("log_chars")
_STRONG_SHARE, _WEAK_SHARE = 1 / 3, 1 / 3


@dataclass(frozen=True, eq=False, slots=True)
class TextWeights:
    """All experts' linear models of words: int8 [NUM_COLUMNS, num_factors] times `scale` plus `bias`, float32 each."""

    weights: NDArray[np.int8]
    scale: Floats
    bias: Floats
    idf: Floats

    def predict(self, features: Features) -> Floats:
        """Float32 [num_prompts, num_factors]."""
        if len(features) == 1:
            row = features.counts
            values = weigh_one(row.indices, row.data.copy(), self.idf)
            found = values @ self.weights[row.indices] * self.scale + self.bias
            return np.asarray(found[None, :], dtype=np.float32)
        dense = weigh(features.counts, self.idf) @ self.weights.astype(np.float32)
        return np.asarray(dense * self.scale + self.bias, dtype=np.float32)


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """A model's ability and the expert that it belongs to, which is that of the prompts' own source if `is_own`."""

    expert: int
    ability: Ability
    is_own: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """What the router says of prompts, for models in the order they were asked for.

    `prob_right` float64 [num_prompts, num_models]; `novelty` float64 [num_prompts], 1 where unlike all training data.
    `need` float64 [num_prompts]: how much better the first model is expected to be than the last; `unknown_need`: the
    same if the prompts were of a domain that nothing is known of, None where the two do not differ.
    """

    prob_right: Array
    novelty: Array
    need: Array
    unknown_need: Array | None = None

    @property
    def abstains(self) -> NDArray[np.bool_]:
        """Where the router should not be followed: bool [num_prompts]."""
        return self.novelty > NOVEL

    def adapted(self, share: float) -> Predictions:
        """The same of traffic that is to that share unknown (see `drift`): only the need changes."""
        if self.unknown_need is None:
            return self
        return replace(self, need=(1 - share) * self.need + share * self.unknown_need)


@dataclass(frozen=True, eq=False, slots=True)
class Router:
    """Layers of experts, over one matrix of text weights whose columns follow the experts' factors.

    `embedding`: where some of the experts read one.
    """

    layers: tuple[tuple[Expert, ...], ...]
    text: TextWeights
    seen: NDArray[np.uint32]
    embedding: SentenceEmbedding | None = None

    @property
    def experts(self) -> tuple[Expert, ...]:
        return tuple(expert for layer in self.layers for expert in layer)

    def extract(self, prompts: Sequence[Prompt]) -> Features:
        """All that this router reads of prompts."""
        return extract(prompts, self.embedding)

    def signals(self, features: Features) -> Floats:
        """Everything that a further layer may read: float32 [num_prompts, num_signals]."""
        return self._read(features, len(self.layers))[0]

    def log_odds(self, models: Sequence[str], source: str | None = None) -> Linear:
        """What this router thinks of models, as a linear function of its `signals`: log odds of right answers.

        Each model is asked of the experts that know most of the others too; one that nobody knows is a typical one.
        """
        starts, size = self._places_of_difficulties()
        weights, bias = np.zeros((size, len(models)), np.float32), np.zeros(len(models), np.float32)
        for column, known in enumerate(self._known_by_most(models, source)):
            for index, ability in known.items():
                rows = slice(starts[index], starts[index] + len(ability.discrimination))
                weights[rows, column] += ability.discrimination / len(known)
                bias[column] += ability.intercept / len(known)
        return Linear(weights, bias)

    def candidates(self, models: Sequence[str], source: str | None = None) -> list[list[Candidate]]:
        """For each expert that knows all these models, their abilities; `source` first, and alone if it is one.

        Names match without organisation, case and spelling of version dots. Raises UnknownModelError.
        """
        found = {}
        for i, expert in enumerate(self.experts):
            names = {canonical_name(name): name for name in expert.abilities}
            if all(canonical_name(model) in names for model in models):
                abilities = [expert.abilities[names[canonical_name(model)]] for model in models]
                found[i] = [Candidate(i, ability, expert.source == source) for ability in abilities]
        own = [candidates for i, candidates in found.items() if self.experts[i].source == source]
        if not found:
            raise UnknownModelError(f"no source of this artifact knows {' and '.join(models)} together")
        return own[-1:] or list(found.values())

    def stand_ins(self) -> list[list[Candidate]]:
        """A typical strong and a typical weak model of every expert, for models that nobody knows."""
        found = []
        for i, expert in enumerate(self.experts):
            ranked = sorted(expert.abilities, key=expert.skill)
            abilities = [expert.abilities[name] for name in ranked]
            strong = abilities[-max(1, round(len(ranked) * _STRONG_SHARE)) :]
            weak = abilities[: max(1, round(len(ranked) * _WEAK_SHARE))]
            if len(ranked) > 1:
                found.append([Candidate(i, typical(strong)), Candidate(i, typical(weak))])
        return found

    def predict(self, prompts: Sequence[Prompt] | Features, choices: Sequence[Sequence[Candidate]]) -> Predictions:
        """Probabilities for the models of `choices`: the same models at each of some experts, averaged.

        The need leans towards prompt length where a prompt is unlike what an expert was fitted to: by as much as that
        helped on subjects left out of its own source, altogether where the prompts are of another source.
        """
        features = prompts if isinstance(prompts, Features) else self.extract(prompts)
        signals, text = self._read(features, len(self.layers) - 1, self._layer_of(choices))
        answers = [self._ask(features, signals, text, models) for models in choices]
        return Predictions(
            prob_right=np.mean([answer.prob_right for answer in answers], axis=0),
            novelty=np.min([answer.novelty for answer in answers], axis=0),
            need=np.mean([answer.need for answer in answers], axis=0),
            unknown_need=np.mean([answer.adapted(1.0).need for answer in answers], axis=0),
        )

    def _known_by_most(self, models: Sequence[str], source: str | None) -> list[dict[int, Ability]]:
        """For each model its abilities by expert, of the experts that know the most of all `models`."""
        found: list[dict[int, Ability]] = []
        for model in models:
            try:
                known = {c.expert: c.ability for (c,) in self.candidates([model], source)}
            except UnknownModelError:
                known = {}
            found.append(known)
        counts = np.bincount([index for known in found for index in known], minlength=len(self.experts))
        everybody = {i: typical(list(expert.abilities.values())) for i, expert in enumerate(self.experts)}
        return [
            {i: ability for i, ability in known.items() if counts[i] == max(counts[list(known)])} or everybody
            for known in found
        ]

    def _places_of_difficulties(self) -> tuple[list[int], int]:
        """Where among the signals each expert's final difficulties begin, and how many signals there are."""
        starts, place = [], 0
        for layer in self.layers:
            place += 2 * sum(expert.num_factors for expert in layer)
            for expert in layer:
                starts.append(place)
                place += expert.num_factors
        return starts, place

    def _layer_of(self, choices: Sequence[Sequence[Candidate]]) -> int:
        ends = np.cumsum([len(layer) for layer in self.layers])
        deepest = max(models[0].expert for models in choices)
        return int(np.searchsorted(ends, deepest, side="right"))

    def _ask(self, features: Features, signals: Floats, text: Floats, models: Sequence[Candidate]) -> Predictions:
        expert = self.experts[models[0].expert]
        difficulty = expert.difficulty(features, signals, text[:, self._columns(models[0].expert)])
        prob_right = np.column_stack([model.ability.prob_right(difficulty) for model in models])
        novelty = expert.novelty.of(features)
        gap = prob_right[:, 0] - prob_right[:, -1]
        lean = expert.lean if models[0].is_own else 1.0
        guard = Guard(lean, expert.log_chars, expert.usual_gap(models[0].ability, models[-1].ability))
        unknown = guard.unknown_need(gap, features.structure[:, _LOG_CHARS].astype(np.float64))
        return Predictions(prob_right, novelty, gap + unusual(novelty) * (unknown - gap), unknown)

    def _columns(self, index: int) -> slice:
        start = sum(expert.num_factors for expert in self.experts[:index])
        return slice(start, start + self.experts[index].num_factors)

    def _read(self, features: Features, full_layers: int, last: int | None = None) -> tuple[Floats, Floats]:
        """Signals of the layers up to `last`, the first `full_layers` with final difficulties; and the text views."""
        text = self.text.predict(features)
        signals = np.zeros((len(features), 0), np.float32)
        index = 0
        for number, layer in enumerate(self.layers):
            if last is not None and number > last:
                break
            places = range(index, index + len(layer))
            views = [text[:, self._columns(i)] for i in places]
            sketches = [expert.sketch.predict(features.structure) for expert in layer]
            parts = [part for pair in zip(views, sketches, strict=True) for part in pair]
            signals = np.concatenate([signals, *parts], axis=1)
            if number < full_layers and (last is None or number < last):
                final = [e.difficulty(features, signals, v) for e, v in zip(layer, views, strict=True)]
                signals = np.concatenate([signals, *final], axis=1).astype(np.float32)
            index += len(layer)
        return signals, text


def canonical_name(model: str) -> str:
    """A model's name without organisation, case and "meta-", with versions spelt by dots."""
    return model.rsplit("/", 1)[-1].lower().replace("_", ".").removeprefix("meta-")
