"""Builds the CPU kernels beside the Python packages; everything else about the project is in pyproject.toml.

Where no compiler is found, or it is too old, installation goes on without them and the engine uses torch alone.
OUTRIDER_SANITIZE=address builds them under that sanitizer (see `make sanitize`).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("engines/native/src")
# One translation unit per instruction set; the rest is compiled for any machine. Which one runs is decided at run time.
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": [
        *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "cd", "bf16", "vnni")),
        "-mfma",
        "-Wno-uninitialized",  # GCC's own header is warned about (its bug 105593)
        "-Wno-maybe-uninitialized",
    ],
}


class BuildKernels(build_ext):
    """build_ext with the flags of each source file's instruction set, and as many files at once as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        compile_one, compile_some = self.compiler._compile, self.compiler.compile

        def compile_for(
            obj: str, src: str, ext_: str, cc_args: list[str], extra: list[str], pp_opts: list[str]
        ) -> None:
            stem = Path(src).stem
            machine = next((flags for suffix, flags in INSTRUCTION_SETS.items() if stem.endswith(suffix)), [])
            compile_one(obj, src, ext_, cc_args, [*extra, *(machine if self._is_x86() else [])], pp_opts)

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [obj for objs in pool.map(lambda src: compile_some([src], **options), sources) for obj in objs]

        self.compiler._compile, self.compiler.compile = compile_for, compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile, self.compiler.compile = compile_one, compile_some

    def _is_x86(self) -> bool:
        return "x86_64" in self.plat_name or "amd64" in self.plat_name


def kernels() -> Extension:
    sanitizer = os.environ.get("OUTRIDER_SANITIZE")
    checks = [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-g1", "-O1"] if sanitizer else ["-g0", "-O3"]
    return Extension(
        "engines.native._kernels",
        sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
        depends=sorted(str(path) for path in SOURCES.glob("*.h")),
        extra_compile_args=[
            "-std=c++17",
            "-fopenmp-simd",
            "-pthread",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            *checks,
        ],
        extra_link_args=["-pthread", *checks],
        language="c++",
        optional=True,
    )


setup(ext_modules=[kernels()], cmdclass={"build_ext": BuildKernels})
