"""The routers' error tree.

RouterError
|-- DataError                 a table or log cannot be read, or says nothing that could be learnt
|-- UnknownModelError         the artifact has no ability for this model; names those it has
|-- ArtifactError             an artifact cannot be used
|   |-- CorruptArtifactError  a file is missing, truncated or does not match its checksum
|   |-- FeatureVersionError   it was trained on features that this version does not compute
|   `-- EmbeddingError        the sentence embedding that it reads is not installed, or another one is
`-- PolicyError               a policy cannot be applied to these candidates
"""

from __future__ import annotations


class RouterError(Exception):
    """Base of all routing errors. `message` is fit to be shown to an operator."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class DataError(RouterError):
    """A table or log cannot be read, or says nothing that could be learnt."""


class UnknownModelError(RouterError):
    """The artifact has no ability for this model."""


class ArtifactError(RouterError):
    """An artifact cannot be used."""


class CorruptArtifactError(ArtifactError):
    """A file of the artifact is missing, truncated or does not match its checksum."""


class FeatureVersionError(ArtifactError):
    """The artifact was trained on features that this version does not compute."""


class EmbeddingError(ArtifactError):
    """The sentence embedding that the artifact reads is not installed, or another one is."""


class PolicyError(RouterError):
    """A policy cannot be applied to these candidates."""
