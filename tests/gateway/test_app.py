"""From the arguments of a Serve config to deployments; running ones are in test_serve.py."""

import re

import pytest

from gateway.app import deployment_name


def test_names_that_need_no_change_stay_readable() -> None:
    assert deployment_name("outrider-demo.v1_2") == "engine-outrider-demo.v1_2"


def test_no_two_models_share_a_name() -> None:
    names = ["two/x", "two-x", "two:x", "two/x/", "two-x-"]
    assert len({deployment_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["two/x", "Qwen/Qwen3:0.6B"])
def test_changed_names_fit_urls_and_stay_the_same(name: str) -> None:
    assert re.fullmatch(r"engine-[A-Za-z0-9._-]+-[0-9a-f]{8}", deployment_name(name))
    assert deployment_name(name) == deployment_name(name)
