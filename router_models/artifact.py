"""A router on disk: `artifact.json`, which says what it is, and `arrays.npz`, which holds every number of it.

Nothing in it is code and nothing is unpickled. The manifest carries a checksum of itself and one of the arrays; an
artifact is immutable, and its version is the start of its checksum. A folder is written beside its final place and
renamed, so that no reader sees half of one.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router_models.ability import Ability
from router_models.embedding import DIMENSION, NAME, SentenceEmbedding
from router_models.errors import ArtifactError, CorruptArtifactError, EmbeddingError, FeatureVersionError
from router_models.expert import Bounded, Expert, Linear, Mix
from router_models.features import FEATURE_VERSION
from router_models.novelty import Novelty
from router_models.prompt import Prompt
from router_models.router import Router, TextWeights
from router_models.structure import FEATURE_NAMES
from router_models.trees import Forest

FORMAT_VERSION = 2
DEFAULT = Path(__file__).parent / "default"
_MANIFEST, _ARRAYS = "artifact.json", "arrays.npz"
_MAX_ARRAY_BYTES = 1 << 30
# What reading, decompressing or multiplying arrays raises where they are not what the manifest says.
_STRANGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)

Arrays = Mapping[str, NDArray[Any]]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExpertManifest(_Part):
    """What of an expert is not an array. Models in the order of the ability arrays."""

    source: str
    num_rows: int = Field(ge=0)
    models: tuple[str, ...]
    num_labels: tuple[int, ...]
    log_chars: tuple[float, float]
    lean: float = Field(ge=0.0, le=1.0)


class EmbeddingManifest(_Part):
    """Which embedding the router reads."""

    name: str
    dimension: int
    checksum: str


class Manifest(_Part):
    """`artifact.json`."""

    format_version: int
    feature_version: int
    feature_names: tuple[str, ...]
    created: str = Field(description="UTC, ISO 8601")
    data_hash: str
    base: str | None = Field(default=None, description="version of the artifact that it was trained on top of")
    seed: int
    layers: tuple[tuple[ExpertManifest, ...], ...]
    arrays_sha256: str
    embedding: EmbeddingManifest | None = None
    checksum: str = ""

    @property
    def version(self) -> str:
        return self.checksum[:12]

    def digest(self) -> str:
        """The checksum that this manifest should carry."""
        # Without an embedding, as before there were any.
        unsaid = {"checksum"} if self.embedding else {"checksum", "embedding"}
        document = self.model_dump(mode="json", exclude=unsaid)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Artifact:
    """A router and what is known about it."""

    router: Router
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a router comes from."""

    created: str
    data_hash: str
    seed: int
    base: str | None = None


def save(router: Router, origin: Origin, folder: Path) -> Manifest:
    """Write the router to `folder`, which must not exist or be an artifact already; that one is replaced whole."""
    check_place(folder)
    data = _pack(_arrays(router))
    manifest = _manifest(router, origin, hashlib.sha256(data).hexdigest())
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        new = Path(name) / "artifact"
        if folder.exists():
            shutil.copytree(folder, new)
        new.mkdir(exist_ok=True)
        (new / _ARRAYS).write_bytes(data)
        (new / _MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(name) / "old")
        new.rename(folder)
    return manifest


def load(folder: Path) -> Artifact:
    """Read an artifact, checksums first, and try it: they say that nothing was altered, not that it is a router.

    Raises CorruptArtifactError where a file is missing or altered, or the whole cannot be asked, FeatureVersionError
    where it was trained on features that this version does not compute, EmbeddingError where it reads an embedding that
    is not installed, ArtifactError where its format is of another version.
    """
    manifest = _read_manifest(folder / _MANIFEST)
    if (manifest.feature_version, manifest.feature_names) != (FEATURE_VERSION, FEATURE_NAMES):
        raise FeatureVersionError(
            f"{folder} was trained on features of version {manifest.feature_version}; "
            f"this version computes {FEATURE_VERSION}: train it again"
        )
    data = _read(folder / _ARRAYS)
    if hashlib.sha256(data).hexdigest() != manifest.arrays_sha256:
        raise CorruptArtifactError(f"{folder / _ARRAYS} does not match its checksum")
    embedding = None if manifest.embedding is None else _embedding(manifest.embedding, folder)
    try:
        router = _router(manifest, _unpack(data), embedding)
        _try(router)
    except _STRANGE as error:
        raise CorruptArtifactError(f"{folder / _ARRAYS}: {error}") from error
    return Artifact(router, manifest)


def _try(router: Router) -> None:
    """Ask every expert about one prompt. Raises ValueError or whatever its arrays make numpy raise."""
    choices = router.stand_ins()
    if not choices:
        raise ValueError("no source knows two models, so there is nothing to choose between")
    features = router.extract([Prompt.from_text("Which model answers this?")])
    for models in choices:
        found = router.predict(features, [models])
        if not all(np.isfinite(part).all() for part in (found.prob_right, found.need, found.novelty)):
            raise ValueError("a prediction is not a number")


def check_place(folder: Path) -> None:
    """Raises ArtifactError where `save` could not write there, and makes the folders above it."""
    try:
        if folder.exists() and not (folder / _MANIFEST).exists() and any(folder.iterdir()):
            raise ArtifactError(f"{folder} exists and is not an artifact")
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder}: {error.strerror}") from error


def resolve(name: str) -> Path:
    """The folder of an artifact by path; `default` is the one that is shipped."""
    return DEFAULT if name == "default" else Path(name)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptArtifactError(f"{path}: {error.strerror}") from error


def _read_manifest(path: Path) -> Manifest:
    data = _read(path)
    try:
        document = json.loads(data)
        found = document.get("format_version") if isinstance(document, dict) else None
        if isinstance(found, int) and found != FORMAT_VERSION:
            raise ArtifactError(f"{path} is of format {found}; this version reads {FORMAT_VERSION}")
        manifest = Manifest.model_validate(document)
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptArtifactError(f"{path} is not a manifest: {error}") from error
    if manifest.digest() != manifest.checksum:
        raise CorruptArtifactError(f"{path} does not match its checksum")
    return manifest


def _manifest(router: Router, origin: Origin, arrays_sha256: str) -> Manifest:
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        feature_version=FEATURE_VERSION,
        feature_names=FEATURE_NAMES,
        created=origin.created,
        data_hash=origin.data_hash,
        base=origin.base,
        seed=origin.seed,
        layers=tuple(tuple(map(_describe, layer)) for layer in router.layers),
        arrays_sha256=arrays_sha256,
        embedding=None if router.embedding is None else _described(router.embedding),
    )
    return manifest.model_copy(update={"checksum": manifest.digest()})


def _describe(expert: Expert) -> ExpertManifest:
    labels = tuple(ability.num_labels for ability in expert.abilities.values())
    return ExpertManifest(
        source=expert.source,
        num_rows=expert.num_rows,
        models=tuple(expert.abilities),
        num_labels=labels,
        log_chars=expert.log_chars,
        lean=expert.lean,
    )


def _arrays(router: Router) -> dict[str, NDArray[Any]]:
    text = router.text
    found: dict[str, NDArray[Any]] = {
        "text.weights": text.weights,
        "text.scale": text.scale,
        "text.bias": text.bias,
        "text.idf": text.idf.astype(np.float16),
        "seen": router.seen,
    }
    for i, expert in enumerate(router.experts):
        found |= {f"{i}.{name}": array for name, array in _expert_arrays(expert).items()}
    return found


def _expert_arrays(expert: Expert) -> dict[str, NDArray[Any]]:
    abilities, novelty, read = list(expert.abilities.values()), expert.novelty, expert.embedding
    return {
        **{f"sketch.{name}": array for name, array in expert.sketch.arrays().items()},
        **{f"trees.{name}": array for name, array in expert.trees.arrays().items()},
        **_bounded_arrays("shape", expert.shape),
        **_bounded_arrays("length", expert.length),
        "transfer.weights": expert.transfer.weights,
        "transfer.bias": expert.transfer.bias,
        "mix.weights": expert.mix.weights,
        "mix.shift": expert.mix.shift,
        "discrimination": np.array([ability.discrimination for ability in abilities]),
        "intercept": np.array([ability.intercept for ability in abilities]),
        "reference": expert.reference,
        "novelty.centre": novelty.centre,
        "novelty.spread": novelty.spread,
        "novelty.centres": novelty.centres,
        "novelty.known_words": np.packbits(novelty.known_words),
        "novelty.distances": novelty.distances,
        "novelty.strangeness": novelty.strangeness,
        **({} if read is None else {"embedding.weights": read.weights, "embedding.bias": read.bias}),
    }


def _described(embedding: SentenceEmbedding) -> EmbeddingManifest:
    return EmbeddingManifest(name=NAME, dimension=DIMENSION, checksum=embedding.checksum)


def _embedding(manifest: EmbeddingManifest, folder: Path) -> SentenceEmbedding:
    found = SentenceEmbedding.load()
    if _described(found) != manifest:
        raise EmbeddingError(
            f"{folder} reads the embedding {manifest.name} with checksum {manifest.checksum[:12]}; installed is {NAME} "
            f"with {found.checksum[:12]}"
        )
    return found


def _router(manifest: Manifest, arrays: Arrays, embedding: SentenceEmbedding | None) -> Router:
    numbers = iter(range(sum(map(len, manifest.layers))))
    layers = tuple(tuple(_expert(part, _under(arrays, next(numbers))) for part in layer) for layer in manifest.layers)
    idf = arrays["text.idf"].astype(np.float32)
    text = TextWeights(arrays["text.weights"], arrays["text.scale"], arrays["text.bias"], idf)
    factors = sum(expert.num_factors for layer in layers for expert in layer)
    if text.weights.shape != (len(idf), factors):
        raise ValueError("text weights do not fit the experts")
    return Router(layers, text, arrays["seen"], embedding)


def _expert(manifest: ExpertManifest, arrays: Arrays) -> Expert:
    parameters = zip(manifest.models, arrays["discrimination"], arrays["intercept"], manifest.num_labels, strict=True)
    return Expert(
        source=manifest.source,
        num_rows=manifest.num_rows,
        sketch=Forest.from_arrays(_under(arrays, "sketch")),
        trees=Forest.from_arrays(_under(arrays, "trees")),
        transfer=Linear(arrays["transfer.weights"], arrays["transfer.bias"]),
        shape=_bounded(_under(arrays, "shape")),
        length=_bounded(_under(arrays, "length")),
        mix=Mix(arrays["mix.weights"], arrays["mix.shift"]),
        abilities={model: Ability(slope, float(start), count) for model, slope, start, count in parameters},
        novelty=_novelty(_under(arrays, "novelty")),
        reference=arrays["reference"],
        log_chars=manifest.log_chars,
        lean=manifest.lean,
        embedding=Linear(**_under(arrays, "embedding")) if "embedding.weights" in arrays else None,
    )


def _bounded_arrays(name: str, view: Bounded) -> dict[str, NDArray[Any]]:
    parts = {"weights": view.linear.weights, "bias": view.linear.bias, "low": view.low, "high": view.high}
    return {f"{name}.{part}": array for part, array in parts.items()}


def _bounded(arrays: Arrays) -> Bounded:
    return Bounded(Linear(arrays["weights"], arrays["bias"]), arrays["low"], arrays["high"])


def _novelty(arrays: Arrays) -> Novelty:
    words = np.unpackbits(arrays["known_words"]).astype(bool)
    names = ("centre", "spread", "centres", "distances", "strangeness")
    return Novelty(known_words=words, **{name: arrays[name] for name in names})


def _under(arrays: Arrays, prefix: object) -> dict[str, NDArray[Any]]:
    start = f"{prefix}."
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _pack(arrays: Arrays) -> bytes:
    """A compressed npz without time stamps: equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), part.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _unpack(data: bytes) -> dict[str, NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(info.file_size for info in archive.infolist()) > _MAX_ARRAY_BYTES:
            raise ValueError("the arrays are larger than any router")
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ValueError(f"{name} has entries that are not numbers")
    return arrays
