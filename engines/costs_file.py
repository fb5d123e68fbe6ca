"""What was learnt about speed, kept from one start of the process to the next.

A file is a hint, never a condition: one that is missing, damaged or another model's is a fresh start, and a folder that
cannot be written costs a warning. Several replicas may share a file; each writes a whole one, and the last one stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_VERSION = 1
_MAX_BYTES = 1 << 20


def costs_path(configured: str | None, key: str) -> Path | None:
    """Where the costs of `key` are kept: `configured`, in the user's cache if None, nowhere (None) if empty.

    Nowhere as well, with a warning, in a home that is not known. `key` is a file name's worth of letters and digits
    that stands for model, device and whatever else speed depends on.
    """
    try:
        if configured is not None:
            return Path(configured).expanduser() if configured else None
        cache = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG base directory specification has relative paths ignored.
        root = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
        return root / "outrider" / "costs" / f"{key}.json"
    except RuntimeError as error:  # a container's user may have no home at all
        _log.warning("Step costs are not kept: %s", error)
        return None


def load_costs(path: Path, key: str) -> dict[str, Any] | None:
    """What `save_costs` wrote there for this key, None if that cannot be had; the reason is logged."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        document = json.loads(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("Step costs in %s cannot be read, so they are learnt anew: %s", path, error)
        return None
    if not isinstance(document, dict) or document.get("version") != _VERSION or document.get("key") != key:
        _log.warning("Step costs in %s are not this model's on this device, so they are learnt anew", path)
        return None
    costs = document.get("costs")
    if not isinstance(costs, dict):
        _log.warning("Step costs in %s are damaged, so they are learnt anew", path)
        return None
    return costs


def save_costs(path: Path, key: str, costs: dict[str, Any], level: int = logging.WARNING) -> bool:
    """Write `costs`, which JSON can hold, for `load_costs`; whether that worked, and if not, the reason is logged.

    Creates the folder. A reader sees the old file or the new one, never a part.
    """
    partial = None
    try:
        document = json.dumps({"version": _VERSION, "key": key, "costs": costs}, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as stream:
            partial = Path(stream.name)
            stream.write(document)
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # the latter for numbers that JSON has not, and names no file can have
        _log.log(level, "Step costs cannot be kept in %s: %s", path, error)
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()
        return False
    return True
