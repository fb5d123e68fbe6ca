"""The training text: sources of the Python standard library of the running interpreter."""

import ast
import hashlib
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "config",
        "encodings",  # character tables
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",  # read as text by `reference_topics`
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
SKIPPED_FILES = frozenset({"antigravity.py", "this.py", "sitecustomize.py", "usercustomize.py"})
SMALLEST_FILE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus and the dotted name of the module it came from."""

    module: str
    text: str

    @property
    def package(self) -> str:
        """Top-level module name: the unit of the held-out split."""
        return self.module.partition(".")[0]


def stdlib_folder() -> Path:
    """Folder of the standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def module_name(path: Path, root: Path) -> str:
    """Dotted name of the module stored at `path` under `root`; a package's `__init__` is the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_documents(root: Path) -> Iterator[Document]:
    """Every wanted source file under `root`, in path order, each text once."""
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if any(folder in SKIPPED_FOLDERS or folder.startswith("config-") for folder in folders):
            continue
        if path.name in SKIPPED_FILES or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < SMALLEST_FILE_CHARS or digest in seen:
            continue
        seen.add(digest)
        yield Document(module_name(path, root), text)


def reference_topics(root: Path) -> dict[str, str]:
    """The language reference by topic, as `help()` prints it; empty where the build leaves it out.

    The file is one large dict literal, so it is parsed rather than imported.
    """
    path = root / "pydoc_data" / "topics.py"
    if not path.exists():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return topics
    return {}


def topic_documents(root: Path) -> list[Document]:
    """The language reference as documents, one a topic; each topic is its own module in the split."""
    return [Document(f"topic-{name}", text) for name, text in sorted(reference_topics(root).items())]


def held_out_packages(packages: set[str], share: float, seed: int) -> frozenset[str]:
    """A seeded choice of about `share` of the packages; the built-in module is always trained on."""
    candidates = sorted(packages - {"builtins"})
    count = round(share * len(candidates))
    return frozenset(random.Random(seed).sample(candidates, count))


def python_version() -> str:
    """Version of the interpreter whose library is read, as `3.11.7`."""
    return ".".join(map(str, sys.version_info[:3]))
