"""The one exception of a conversion."""

from __future__ import annotations


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message names the file, the key, and what to do."""
