"""Errors of the shared state.

StateError
|-- StateUnavailableError    Redis did not answer in time, refused, or is full; decide from what is known locally
|   `-- StateAccessError     it does not accept us, or we do not accept it: user, password, rights, certificate
`-- StateStartError          the embedded server could not be started
"""

from __future__ import annotations


class StateError(Exception):
    """Base of the shared state's errors."""


class StateUnavailableError(StateError):
    """The shared state cannot be asked now. Never an answer to a caller: whoever catches it decides without."""


class StateAccessError(StateUnavailableError):
    """The same until somebody corrects the configuration, here or there."""


class StateStartError(StateError):
    """The embedded server did not start; the message ends with its own words."""
