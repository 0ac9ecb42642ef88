"""The one exception of this room."""

from __future__ import annotations

from tpserve.model.checkpoint import CheckpointError


class ConvertError(CheckpointError):
    """A checkpoint that cannot be read or converted; the message names the file, the key, and what to do."""
