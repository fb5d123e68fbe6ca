"""Mistakes under `auto` that `outrider check` finds before anything serves."""

from pathlib import Path

import pytest

from gateway.auto_checks import check_auto
from gateway.auto_config import AutoConfig
from gateway.checks import check_file
from gateway.errors import ConfigError
from gateway.serve_file import load_serve_file
from tests.gateway.auto_world import auto_config, auto_fields, candidate, damaged
from tests.router_models.tables import world, write_tables

ROOT = Path(__file__).parent.parent.parent


def test_names_that_the_router_knows_are_fine(router: Path) -> None:
    check_auto(auto_config(router, source="world"))
    check_auto(auto_config(router, source="moon"))


def test_names_of_ones_own_models_need_not_be_known_yet(router: Path) -> None:
    candidates = [candidate("mine", 1.0), candidate("mine-too", 2.0)]
    check_auto(AutoConfig.model_validate(auto_fields(router) | {"candidates": candidates}))


def test_what_the_router_does_not_know_is_named(router: Path) -> None:
    candidates = [candidate("a", 1.0, "weak"), candidate("b", 2.0, "gpt-9")]
    auto = AutoConfig.model_validate(auto_fields(router) | {"candidates": candidates})
    with pytest.raises(ConfigError, match=r"knows no gpt-9; it knows .*acme/Strong-1_5, middle, tiny, weak"):
        check_auto(auto)


def test_a_router_that_cannot_be_loaded_is_named(router: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auto\.artifact: .*artifact\.json"):
        check_auto(auto_config(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"auto\.shadow: .*checksum"):
        check_auto(auto_config(router, shadow=str(damaged(router, tmp_path / "damaged"))))


def test_calibration_data_without_the_models_is_named(router: Path, tmp_path: Path) -> None:
    data = write_tables(tmp_path, world(60, seed=5, models=("weak", "tiny")))
    auto = auto_config(router, {"goal": {"kind": "bound", "max_quality_loss": 0.1}}, calibration=str(data))
    with pytest.raises(ConfigError, match="results of both"):
        check_auto(auto)


def test_the_demo_fleet_has_auto_over_its_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = load_serve_file(ROOT / "configs" / "demo.yaml")
    check_file(file)
    auto = file.application.args.auto
    assert auto is not None
    assert [candidate.model for candidate in auto.candidates] == ["outrider-demo-mid", "outrider-demo"]
