"""Corpus and tokenizer made once and kept: the streams that training and measuring read."""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from demo.chats import Chat, write_chats
from demo.corpus import (
    Document,
    held_out_packages,
    reference_topics,
    source_documents,
    stdlib_folder,
    topic_documents,
)
from demo.definitions import builtin_definitions, source_definitions
from demo.recipe import Recipe
from demo.stream import TokenStream, concatenate, pack_chats, pack_documents
from demo.tokenizer import save_tokenizer, train_tokenizer

BUILTIN_PASSES = 3  # built-in names are asked about most and are few, so they are worded several times


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents and conversations, split by top-level module."""

    train_documents: list[Document]
    held_out_documents: list[Document]
    train_chats: list[Chat]
    held_out_chats: list[Chat]
    held_out_packages: frozenset[str]


@dataclass(frozen=True, slots=True)
class Streams:
    """The corpus as token rows; `train` is text then chat, the other two are never trained on."""

    train: TokenStream
    held_out_code: TokenStream
    held_out_chat: TokenStream

    def save(self, folder: Path) -> None:
        """Writes the three streams into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.train.save(folder / "train.npy")
        self.held_out_code.save(folder / "held_out_code.npy")
        self.held_out_chat.save(folder / "held_out_chat.npy")

    @classmethod
    def load(cls, folder: Path) -> "Streams":
        """The streams that `save` wrote into `folder`."""
        return cls(
            TokenStream.load(folder / "train.npy"),
            TokenStream.load(folder / "held_out_code.npy"),
            TokenStream.load(folder / "held_out_chat.npy"),
        )


def build_corpus(recipe: Recipe, root: Path | None = None) -> Corpus:
    """The corpus under `root` (default: the running interpreter's standard library)."""
    root = root or stdlib_folder()
    documents = [*source_documents(root), *topic_documents(root)]
    definitions = [definition for document in documents for definition in source_definitions(document)]
    for _ in range(BUILTIN_PASSES):
        definitions += builtin_definitions()
    packages = {document.package for document in documents}
    held_out = held_out_packages(packages, recipe.held_out_share, recipe.seed)
    random.Random(recipe.seed).shuffle(documents)
    chats = write_chats(definitions, reference_topics(root), recipe.seed)
    return Corpus(
        train_documents=[document for document in documents if document.package not in held_out],
        held_out_documents=[document for document in documents if document.package in held_out],
        train_chats=[chat for chat in chats if chat.package not in held_out],
        held_out_chats=[chat for chat in chats if chat.package in held_out],
        held_out_packages=held_out,
    )


def make_data(recipe: Recipe, folder: Path, root: Path | None = None) -> tuple[PreTrainedTokenizerFast, Streams]:
    """Tokenizer and streams, read from `folder` if they are there, else built and kept there."""
    tokenizer_folder = folder / "tokenizer"
    if (folder / "held_out_chat.npy").exists():
        return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder), Streams.load(folder)
    corpus = build_corpus(recipe, root)
    chat_texts = (message["content"] for chat in corpus.train_chats for message in chat.messages)
    texts = itertools.chain((document.text for document in corpus.train_documents), chat_texts)
    tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.max_positions)
    save_tokenizer(tokenizer, tokenizer_folder)
    streams = Streams(
        train=concatenate(
            [pack_documents(corpus.train_documents, tokenizer), pack_chats(corpus.train_chats, tokenizer)]
        ),
        held_out_code=pack_documents(corpus.held_out_documents, tokenizer),
        held_out_chat=pack_chats(corpus.held_out_chats, tokenizer),
    )
    streams.save(folder)
    return tokenizer, streams
