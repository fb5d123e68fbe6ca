from pathlib import Path

from demo.data import build_corpus, make_data
from demo.recipe import Recipe


def test_held_out_packages_are_in_neither_text_nor_chats(library: Path) -> None:
    corpus = build_corpus(Recipe(held_out_share=0.34), library)
    assert len(corpus.held_out_packages) == 1
    assert {document.package for document in corpus.held_out_documents} == corpus.held_out_packages
    for part in (corpus.train_documents, corpus.train_chats):
        assert not {item.package for item in part} & corpus.held_out_packages


def test_kept_data_is_read_again(tmp_path: Path, library: Path) -> None:
    recipe = Recipe(vocab_size=512, held_out_share=0.34)
    tokenizer, streams = make_data(recipe, tmp_path, library)
    again, same = make_data(recipe, tmp_path, library)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (same.train.tokens == streams.train.tokens).all()
