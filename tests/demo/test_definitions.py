from pathlib import Path

import pytest

from demo.corpus import Document, source_documents
from demo.definitions import LONGEST_SOURCE_LINES, Definition, builtin_definitions, source_definitions


@pytest.fixture
def alpha(library: Path) -> dict[str, Definition]:
    document = next(source_documents(library))
    return {definition.name: definition for definition in source_definitions(document)}


def test_documented_public_names_are_found(alpha: dict[str, Definition]) -> None:
    assert {name: definition.kind for name, definition in alpha.items()} == {
        "alpha": "module",
        "alpha.count": "function",
        "alpha.Counter": "class",
        "alpha.Counter.add": "method",
    }


def test_signatures_are_as_written(alpha: dict[str, Definition]) -> None:
    assert alpha["alpha.count"].signature == "(items, start=0)"
    assert alpha["alpha.Counter"].signature == "(start: int=0)"
    assert alpha["alpha.Counter.add"].signature == "(self, amount)"


def test_a_methods_source_is_dedented(alpha: dict[str, Definition]) -> None:
    assert (
        alpha["alpha.Counter.add"].source
        == 'def add(self, amount):\n    """Add an amount."""\n    self.value += amount'
    )


def test_a_long_function_has_no_source() -> None:
    text = 'def f():\n    """Doc."""\n' + "    x = 1\n" * LONGEST_SOURCE_LINES
    (definition,) = source_definitions(Document("m", text))
    assert definition.source is None


def test_a_file_that_does_not_parse_defines_nothing() -> None:
    assert list(source_definitions(Document("m", "print 'two'"))) == []


def test_built_in_names_are_the_ones_users_write() -> None:
    found = {definition.name: definition for definition in builtin_definitions({"builtins": "", "_heapq": "heapq"})}
    assert found["len"].signature == "(obj, /)"
    assert found["dict.get"].kind == "method"
    assert found["heapq.heappush"].package == "heapq"


def test_a_missing_extension_module_is_passed_over() -> None:
    assert list(builtin_definitions({"no_such_module": "x"})) == []
