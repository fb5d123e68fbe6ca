"""`outrider serve`, and a line "DEPLOYMENT COUNT" on stdin changes how many replicas a deployment has.

Serve lets somebody outside scale an application only if it is deployed with that permission, which a foreground gateway
has no use for.
"""

import sys
from functools import partial
from pathlib import Path

from gateway import cluster
from gateway.serve_file import ServeFile, load_serve_file

_deploy = cluster._deploy


def _deploy_scalable(file: ServeFile, state_url: str | None) -> str:
    from ray import serve

    serve.run = partial(serve.run, external_scaler_enabled=True)  # type: ignore[assignment]
    return _deploy(file, state_url)


def _scale(app: str, deployment: str, count: int) -> None:
    import ray
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    controller = _get_global_client()._controller
    ray.get(controller.update_deployment_replicas.remote(DeploymentID(name=deployment, app_name=app), count))


def main() -> None:
    path, _, port = sys.argv[1:]
    cluster._deploy = _deploy_scalable
    file = load_serve_file(Path(path)).at(None, int(port))
    with cluster.running(file, logs=False) as gateway:
        sys.stdout.write(f"Ready at {gateway.url}\n")
        sys.stdout.flush()
        for line in sys.stdin:
            deployment, count = line.split()
            _scale(file.application.name, deployment, int(count))


if __name__ == "__main__":
    main()
