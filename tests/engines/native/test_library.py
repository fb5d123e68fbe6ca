"""Finding the kernels: another build, none, and one that does not fit."""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
from pathlib import Path

import pytest

from engines.native import attention
from engines.native.library import library

load = library.__wrapped__  # without the memory of the first call


def test_the_kernels_layout_of_their_arguments_is_ours() -> None:
    kernels = library()
    if kernels is None:
        pytest.skip("the kernels are not built")
    kernels.outrider_attention_args_bytes.restype = ctypes.c_int64
    assert kernels.outrider_attention_args_bytes() == ctypes.sizeof(attention._AttentionArgs)


def test_kernels_of_another_version_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = ctypes.util.find_library("c")
    assert other is not None
    monkeypatch.setenv("OUTRIDER_KERNELS", other)
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert "another version" in caplog.text


def test_what_is_no_library_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_text("no library")
    monkeypatch.setenv("OUTRIDER_KERNELS", str(broken))
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert "cannot be loaded" in caplog.text
