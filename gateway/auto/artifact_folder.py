"""Where promoted routers live: `versions/NAME`, and `current`, a file that names the one to serve.

`current` is replaced by a rename, so whoever reads it, on this machine or over a shared disk, finds the old or the new
one and never half of it. Versions are kept, and so is their order: rolling back twice goes back two promotions.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router_models.errors import ArtifactError

_CURRENT, _VERSIONS = "current", "versions"
_MAX_HISTORY = 100

# Of the file `current`: it changes with every promotion.
Stamp = tuple[int, int, int]


class Pointer(BaseModel):
    """The file `current`, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(pattern=r"^[0-9a-f]{12}$")
    history: tuple[str, ...] = Field(default=(), description="versions that served before, the latest last")


class ArtifactFolder:
    """A folder of promoted routers. Any number of gateways may read it while one command writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()

    def stamp(self) -> Stamp | None:
        """What changes when another version is promoted; None before the first promotion or where it cannot be read."""
        try:
            found = (self.folder / _CURRENT).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def pointer(self) -> Pointer | None:
        """What `current` says; None before the first promotion. Raises ArtifactError."""
        path = self.folder / _CURRENT
        try:
            return Pointer.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArtifactError(f"{path}: {error.strerror}") from error
        except ValidationError as error:
            raise ArtifactError(f"{path} does not name a version: {error.errors()[0]['msg']}") from error

    def place(self, version: str) -> Path:
        """The folder of a version."""
        return self.folder / _VERSIONS / version

    def promote(self, artifact: Path) -> Pointer:
        """Copy an artifact here and make it the current one. Raises ArtifactError, and then changes nothing."""
        from router_models import artifact as artifacts  # scikit-learn takes a second to import

        version = artifacts.load(artifact).manifest.version
        try:
            self._keep(artifact, version)
            # A copy may have failed silently, or one that was here may have been damaged.
            artifacts.load(self.place(version))
            before = self.pointer()
            history = () if before is None else (*before.history, before.version)[-_MAX_HISTORY:]
            if before is not None and before.version == version:
                history = before.history
            return self._point(Pointer(version=version, history=history))
        except OSError as error:
            raise ArtifactError(f"{self.folder}: {error.strerror}") from error

    def rollback(self) -> Pointer:
        """Make the version before the current one current again. Raises ArtifactError where there is none."""
        from router_models import artifact as artifacts

        before = self.pointer()
        if before is None or not before.history:
            raise ArtifactError(f"{self.folder} has no earlier version to go back to")
        artifacts.load(self.place(before.history[-1]))
        try:
            return self._point(Pointer(version=before.history[-1], history=before.history[:-1]))
        except OSError as error:
            raise ArtifactError(f"{self.folder}: {error.strerror}") from error

    def _keep(self, artifact: Path, version: str) -> None:
        place = self.place(version)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{version}-") as name:
            new = Path(name) / "artifact"
            shutil.copytree(artifact, new)
            if place.exists():
                place.rename(Path(name) / "old")
            new.rename(place)

    def _point(self, pointer: Pointer) -> Pointer:
        number, name = tempfile.mkstemp(dir=self.folder, prefix=f".{_CURRENT}-")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(pointer.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are their owner's alone; gateways may run as somebody else.
        Path(name).chmod(0o644)
        Path(name).replace(self.folder / _CURRENT)
        return pointer
