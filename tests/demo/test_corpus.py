from pathlib import Path

from demo.corpus import held_out_packages, reference_topics, source_documents, topic_documents


def test_sources_leave_out_tests_copies_and_scraps(library: Path) -> None:
    assert [document.module for document in source_documents(library)] == ["alpha", "package"]


def test_a_document_knows_its_package(library: Path) -> None:
    (topic,) = topic_documents(library)
    assert topic.package == "topic-while"
    assert topic.text.startswith("The while statement")


def test_a_build_without_the_reference_has_no_topics(tmp_path: Path) -> None:
    assert reference_topics(tmp_path) == {}


def test_the_split_is_seeded_and_never_holds_out_the_built_ins() -> None:
    packages = {"builtins", *(f"module{index}" for index in range(100))}
    first = held_out_packages(packages, share=0.5, seed=1)
    assert first == held_out_packages(packages, share=0.5, seed=1)
    assert first != held_out_packages(packages, share=0.5, seed=2)
    assert len(first) == 50
    assert "builtins" not in first
