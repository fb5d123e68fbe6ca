"""Builds speculation from its configuration: lookups, the draft model with its memory, estimates that were kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from drafting.acceptance import Acceptance
from drafting.cost import StepCost
from drafting.draft_length import AdaptiveLength, FixedLength, LengthPolicy
from drafting.draft_model import DraftModel
from drafting.ngram import NgramDrafter
from drafting.prediction import PredictionDrafter
from drafting.prices import Prices
from drafting.protocol import Drafter, Source
from drafting.speculator import Speculator
from drafting.suffix import SuffixDrafter
from engines.attention.interface import AttentionBackend
from engines.config import (
    AutoDrafterConfig,
    DrafterConfig,
    LocalEngineConfig,
    ModelDrafterConfig,
    NoDrafterConfig,
    SuffixDrafterConfig,
)
from engines.cuda_graphs import GraphRunner
from engines.draft_reader import DraftReader
from engines.errors import VocabularyMismatchError
from engines.loading import LoadedModel, resolve_source
from engines.model_runner import ModelRunner
from engines.prepare import prepare_model
from engines.speculation import SpeculativeDecoding
from engines.tokenizer import Tokenizer

Learnt = TypeVar("Learnt", StepCost, Acceptance)
_log = logging.getLogger(__name__)


def load_draft_model(
    config: LocalEngineConfig, tokenizer: Tokenizer, vocab_size: int, backend: AttentionBackend
) -> LoadedModel | None:
    """The configured draft model, None where there is none. `vocab_size`: how many ids the target can yield.

    It is loaded as the target is, and must pass the same parity probe. Raises ModelLoadError and its subclasses,
    VocabularyMismatchError among them.
    """
    drafter = config.drafter
    if not isinstance(drafter, ModelDrafterConfig | AutoDrafterConfig) or drafter.model is None:
        return None
    own = config.model_copy(update={"model": drafter.model, "revision": drafter.revision})
    loaded = prepare_model(own, backend)
    check_vocabulary(tokenizer, Tokenizer.load(resolve_source(drafter.model), drafter.revision), drafter.model)
    if loaded.vocab_size < vocab_size:
        raise VocabularyMismatchError(
            f"The draft model {drafter.model!r} has {loaded.vocab_size} logits for {vocab_size} tokens."
        )
    return loaded


def check_vocabulary(target: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raise VocabularyMismatchError unless both tokenizers mean the same by every id: equal size is not enough."""
    ours, theirs = target.vocabulary(), draft.vocabulary()
    if ours == theirs:
        return
    token_id = next(i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i))
    meant = [_shown(vocabulary.get(token_id)) for vocabulary in (ours, theirs)]
    raise VocabularyMismatchError(
        f"The draft model {name!r} does not share the target's vocabulary: the target has {len(ours)} tokens, the "
        f"draft {len(theirs)}; they first differ at id {token_id}, which is {meant[0]} to the target and {meant[1]} to "
        "the draft."
    )


def make_speculation(
    config: DrafterConfig,
    draft: LoadedModel | None,
    runner: ModelRunner | GraphRunner | None,
    vocab_size: int,
    device: torch.device,
    kept: Mapping[str, Any] | None = None,
) -> SpeculativeDecoding:
    """Speculation as configured. `runner` runs `draft`; `kept` is what `Speculator.state` gave an earlier process."""
    if isinstance(config, NoDrafterConfig):
        return SpeculativeDecoding.off()
    lookups = make_lookups(config)
    sources: list[Source] = list(lookups)
    if draft:
        sources.append("model")
    prices, acceptance = _learnt(kept or {}, sources)
    reader = model = None
    if draft and runner:
        longest = draft.max_position or runner.num_blocks * runner.block_size
        reader = DraftReader(runner, max_position=longest, vocab_size=vocab_size, device=device)
        model = DraftModel(reader, acceptance["model"], prices.draft)
    policy = make_policy(config.draft_length)
    speculator = Speculator(policy, lookups, model, acceptance, prices)
    shares = isinstance(config, SuffixDrafterConfig | AutoDrafterConfig) and config.share_unsalted
    return SpeculativeDecoding(speculator, reader, config.max_draft_tokens, shares)


def make_lookups(config: DrafterConfig) -> dict[Source, Drafter]:
    """The drafters that cost nothing, in the order in which they are asked."""
    kinds: dict[Source, Drafter] = {}
    if config.kind in ("prediction", "auto"):
        kinds["prediction"] = PredictionDrafter()
    if config.kind in ("ngram", "auto"):
        kinds["ngram"] = NgramDrafter()
    if isinstance(config, SuffixDrafterConfig | AutoDrafterConfig):
        kinds["suffix"] = SuffixDrafter(max_history_tokens=config.max_history_tokens)
    return kinds


def make_policy(draft_length: int | str) -> LengthPolicy:
    """The policy for a configured draft length."""
    return FixedLength(draft_length) if isinstance(draft_length, int) else AdaptiveLength()


def _learnt(kept: Mapping[str, Any], sources: Sequence[Source]) -> tuple[Prices, dict[Source, Acceptance]]:
    """Costs, and acceptance by source: kept ones as far as there are any that can be used, or else new ones."""
    prices, acceptance = kept.get("prices"), kept.get("acceptance")
    verify, draft = (_restored(StepCost, prices, name) for name in ("verify", "draft"))
    return Prices(verify, draft), {source: _restored(Acceptance, acceptance, source) for source in sources}


def _restored(kind: type[Learnt], states: object, name: str) -> Learnt:
    state = states.get(name) if isinstance(states, Mapping) else None
    if state is not None:
        try:
            return kind.restore(state)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            _log.warning("what was kept of %s cannot be used, so it is learnt anew: %r", name, error)
    return kind()


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
