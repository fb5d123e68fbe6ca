"""A Serve config file with our application in it: what `serve run`, `outrider serve` and `outrider check` all read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.config import GatewayConfig
from gateway.errors import ConfigError


class HttpOptions(BaseModel):
    """The part of Serve's http_options that one machine needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", pattern=r"^[A-Za-z0-9._:-]+$")
    port: int = Field(default=8000, ge=1, le=65535)


class ServeApplication(BaseModel):
    """One entry of `applications`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="outrider", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    route_prefix: str = Field(default="/", pattern=r"^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$")
    import_path: Literal["gateway.app:build_app"]
    args: GatewayConfig


class ServeFile(BaseModel):
    """The file. Serve knows more keys; those that are not here would have no effect under `outrider serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    proxy_location: Literal["HeadOnly", "EveryNode"] = "HeadOnly"
    http_options: HttpOptions = HttpOptions()
    applications: tuple[ServeApplication, ...] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> ServeApplication:
        return self.applications[0]

    def at(self, host: str | None, port: int | None) -> Self:
        """The same file with another address where one is given. Raises ConfigError."""
        given = {"host": host, "port": port}
        options = self.http_options.model_dump() | {key: value for key, value in given.items() if value is not None}
        try:
            return self.model_copy(update={"http_options": HttpOptions.model_validate(options)})
        except ValidationError as error:
            raise ConfigError("\n".join(_mistakes(error))) from error


def load_serve_file(path: Path) -> ServeFile:
    """The file, validated. Raises ConfigError with one line per mistake, each naming the place."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return ServeFile.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _mistakes(error))) from error


def _mistakes(error: ValidationError) -> list[str]:
    """One line per mistake. A wrong member makes its tuple too short as well, which is no mistake of its own."""
    details = error.errors()
    places = [detail["loc"] for detail in details]
    return [
        f"{_place(detail['loc'])}: {_plain(detail['msg'])}"
        for detail in details
        if not any(place != detail["loc"] and place[: len(detail["loc"])] == detail["loc"] for place in places)
    ]


def _plain(message: str) -> str:
    """pydantic's message in YAML's words instead of Python's."""
    message = re.sub(r" or (?:an )?instance of \w+", "", message.removeprefix("Value error, "))
    return message.replace("Tuple", "The list").replace("tuple", "list").replace("dictionary", "mapping")


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "the whole file"
