"""What can be asked about: documented names of the standard library, with signature and source where there is one."""

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from demo.corpus import Document

Kind = Literal["module", "class", "function", "method"]

# Extension modules have no source to read but are what people ask about first: module, and the name users know it by.
BUILTIN_MODULES = {
    "builtins": "",
    "posix": "os",
    "math": "math",
    "cmath": "cmath",
    "itertools": "itertools",
    "time": "time",
    "sys": "sys",
    "gc": "gc",
    "array": "array",
    "zlib": "zlib",
    "marshal": "marshal",
    "_bisect": "bisect",
    "_collections": "collections",
    "_datetime": "datetime",
    "_functools": "functools",
    "_heapq": "heapq",
    "_io": "io",
    "_operator": "operator",
    "_random": "random",
    "_struct": "struct",
}
LONGEST_SOURCE_LINES = 24


@dataclass(frozen=True, slots=True)
class Definition:
    """One documented name.

    `name` is the dotted name a user would write; `signature` is the call as written after it, `(a, b=1)`, or None;
    `source` is the dedented text of a short function, or None.
    """

    name: str
    kind: Kind
    package: str
    doc: str
    signature: str | None = None
    source: str | None = None


def is_public(name: str) -> bool:
    """Whether no part of the dotted name is private; dunder names count as private."""
    return not any(part.startswith("_") for part in name.split("."))


def source_definitions(document: Document) -> Iterator[Definition]:
    """Documented public modules, classes, functions and methods of one source file, in file order."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    if not is_public(document.module):
        return
    doc = ast.get_docstring(tree)
    if doc:
        yield Definition(document.module, "module", document.package, doc)
    yield from _body_definitions(tree.body, document, document.module, inside_class=False)


def _body_definitions(
    body: Sequence[ast.stmt], document: Document, prefix: str, inside_class: bool
) -> Iterator[Definition]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        doc = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                yield Definition(name, "class", document.package, doc, _constructor_signature(node))
            yield from _body_definitions(node.body, document, name, inside_class=True)
        elif doc:
            kind: Kind = "method" if inside_class else "function"
            yield Definition(name, kind, document.package, doc, _signature(node), _short_source(node, document.text))


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def _constructor_signature(node: ast.ClassDef) -> str | None:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            arguments = ast.unparse(member.args)
            return f"({arguments.partition(', ')[2] if arguments.startswith('self') else arguments})"
    return None


def _short_source(node: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> str | None:
    first_line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines()[first_line - 1 : node.end_lineno]
    if len(lines) > LONGEST_SOURCE_LINES:
        return None
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines).rstrip()


def builtin_definitions(modules: Mapping[str, str] = BUILTIN_MODULES) -> Iterator[Definition]:
    """Documented public names of the extension modules that this interpreter has, methods of their classes included."""
    for module_name, public_name in modules.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # posix is not on Windows, and a build may leave any of them out
            continue
        prefix = f"{public_name}." if public_name else ""
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not (isinstance(value, type) or inspect.isroutine(value)):
                continue
            yield from _object_definition(prefix + name, value, public_name or module_name)
            if isinstance(value, type) and not issubclass(value, BaseException):
                for member_name, member in sorted(vars(value).items()):
                    if not member_name.startswith("_") and inspect.isroutine(member):
                        full_name = f"{prefix}{name}.{member_name}"
                        yield from _object_definition(full_name, member, public_name or module_name, method=True)


def _object_definition(name: str, value: object, package: str, method: bool = False) -> Iterator[Definition]:
    doc = inspect.getdoc(value)
    if not doc:
        return
    kind: Kind = "method" if method else "class" if isinstance(value, type) else "function"
    try:
        signature: str | None = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        signature = None
    yield Definition(name, kind, package, doc, signature)
