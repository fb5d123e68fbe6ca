from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines.costs_file import costs_path, load_costs, save_costs

COSTS = {"base_s": 0.02, "per_token_s": [0.0, 0.001]}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "costs.json"
    assert save_costs(path, "key", COSTS)
    assert load_costs(path, "key") == COSTS
    assert save_costs(path, "key", {"base_s": 1.0})
    assert load_costs(path, "key") == {"base_s": 1.0}
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_no_file_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_costs(tmp_path / "costs.json", "key") is None
    assert not caplog.records


def test_another_models_costs_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "costs.json"
    save_costs(path, "one", COSTS)
    assert load_costs(path, "other") is None
    assert "not this model's" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"version": 1, "key": "key", "cos',
        b"\xff\xfe\x00",
        b"[]",
        b"3",
        b'{"key": "key", "costs": {}}',
        b'{"version": 2, "key": "key", "costs": {}}',
        b'{"version": 1, "key": "key"}',
        b'{"version": 1, "key": "key", "costs": [1]}',
        b"[" * 200_000,
        b" " * (2 << 20),
    ],
)
def test_a_damaged_file_is_a_warning(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(content)
    assert load_costs(path, "key") is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text
    assert save_costs(path, "key", COSTS)
    assert load_costs(path, "key") == COSTS


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "costs.json"
    assert not save_costs(path, "key", COSTS)
    assert "cannot be kept" in caplog.text
    assert load_costs(path, "key") is None
    assert "cannot be read" in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "costs.json"
    path.mkdir()
    assert not save_costs(path, "key", COSTS)
    assert list(tmp_path.iterdir()) == [path]
    assert "cannot be kept" in caplog.text


def test_numbers_that_json_cannot_hold_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not save_costs(tmp_path / "costs.json", "key", {"base_s": float("nan")})
    assert "cannot be kept" in caplog.text
    assert not list(tmp_path.iterdir())


def test_replicas_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    versions = [{"base_s": float(replica), "padding": [float(replica)] * 5_000} for replica in range(8)]
    save_costs(path, "key", versions[0])

    def churn(costs: dict[str, object]) -> None:
        for _ in range(10):
            assert save_costs(path, "key", costs)
            assert load_costs(path, "key") in versions

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(churn, versions))
    assert json.loads(path.read_text())["costs"] in versions
    assert list(tmp_path.iterdir()) == [path]


def test_path_is_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert costs_path("", "key") is None
    assert costs_path("/var/lib/costs.json", "key") == Path("/var/lib/costs.json")
    assert costs_path("~/costs.json", "key") == tmp_path / "costs.json"
    assert costs_path(None, "key") == tmp_path / ".cache/outrider/costs/key.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert costs_path(None, "key") == tmp_path / ".cache/outrider/costs/key.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert costs_path(None, "key") == Path("/cache/outrider/costs/key.json")


def test_a_home_that_is_not_known_keeps_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert costs_path("~nosuchuser/costs.json", "key") is None
    assert "not kept" in caplog.text
