"""What a measurement was taken on: without it a figure means nothing."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

_ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, str | int]:
    """Date, commit, hardware and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def llama_cpp_missing() -> str | None:
    """What to install for llama.cpp to be measured; None where it is there."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)}: not installed; llama.cpp as a peer needs pip install 'outrider[bench]'"


def describe_llama_cpp() -> dict[str, str | int]:
    """The build that is measured; a figure means little without the instruction sets it was compiled for."""
    import llama_cpp

    return {
        "llama_cpp_python": version("llama-cpp-python"),
        "llama_cpp": llama_cpp.llama_version().decode(),
        "llama_cpp_build": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "not a git checkout"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
