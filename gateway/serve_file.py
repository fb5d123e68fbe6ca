"""A Serve config file with our application in it: what `serve run`, `outrider serve` and `outrider check` all read."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.config import GatewayConfig
from gateway.errors import ConfigError


class HttpOptions(BaseModel):
    """The part of Serve's http_options that one machine needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)


class ServeApplication(BaseModel):
    """One entry of `applications`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "outrider"
    route_prefix: str = "/"
    import_path: str = Field(pattern=r"^gateway\.app:build_app$")
    args: GatewayConfig


class ServeFile(BaseModel):
    """The file. Serve knows more keys; those that are not here would have no effect under `outrider serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    proxy_location: str = "HeadOnly"
    http_options: HttpOptions = HttpOptions()
    applications: tuple[ServeApplication, ...] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> ServeApplication:
        return self.applications[0]


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
        f"{_place(detail['loc'])}: {detail['msg']}"
        for detail in details
        if not any(place != detail["loc"] and place[: len(detail["loc"])] == detail["loc"] for place in places)
    ]


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "the whole file"
