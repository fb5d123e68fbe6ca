"""Finds and loads the compiled kernels, once a process."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_log = logging.getLogger(__name__)

ISA_NAMES = ("portable", "avx2", "avx512")

# Of the calls and structures that the kernels export: whoever changes one of them counts up, here and in src/isa.cpp.
_INTERFACE = 2


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they were not built; the log says so once, with the reason.

    OUTRIDER_KERNELS names another build of them, for example one under a sanitizer.
    """
    path = os.environ.get("OUTRIDER_KERNELS") or _installed()
    if path is None:
        _log.warning(
            "the CPU kernels are not built (a C++17 compiler is needed when Outrider is installed); "
            "CPU engines use torch alone, which is several times slower"
        )
        return None
    try:
        kernels = ctypes.CDLL(path)
    except OSError as error:
        _log.warning("the CPU kernels cannot be loaded (%s); CPU engines use torch alone", error)
        return None
    if not _is_of_this_version(kernels):
        _log.warning("the CPU kernels (%s) are of another version; install Outrider again. CPU engines use torch", path)
        return None
    return kernels


def _is_of_this_version(kernels: ctypes.CDLL) -> bool:
    try:
        return int(kernels.outrider_interface()) == _INTERFACE
    except AttributeError:  # older than the number itself
        return False


def _installed() -> str | None:
    spec = importlib.util.find_spec("engines.native._kernels")
    return None if spec is None else spec.origin


def isa_name() -> str | None:
    """The instruction set in use, of ISA_NAMES; None without kernels."""
    kernels = library()
    return None if kernels is None else ISA_NAMES[kernels.outrider_isa()]


@contextmanager
def isa_limited_to(name: str) -> Iterator[str]:
    """Use no better instruction set than `name` meanwhile, in the whole process; yields the one in use. For tests."""
    kernels = library()
    assert kernels is not None, "there are no kernels"
    try:
        yield ISA_NAMES[kernels.outrider_limit_isa(ISA_NAMES.index(name))]
    finally:
        kernels.outrider_limit_isa(len(ISA_NAMES) - 1)
