"""Who may ask: keys from the command line, the environment and a file."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

from tpserve.engine.errors import ConfigError

VARIABLE = "TPSERVE_API_KEYS"

_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,512}")  # printable, no space, no comma


class ApiKeys:
    """The keys that are let in.

    Args:
        keys: none: everybody is.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, given: str | None, file: str | None, environment: MutableMapping[str, str] | None = None) -> ApiKeys:
        """Collects keys; a place that is named but has none is an error, for without keys the door is open.

        Args:
            given: keys with commas between them.
            file: a key a line; empty lines and those that begin with # are passed over.
            environment: where `VARIABLE` is looked for, and taken out, for the ranks need not know it.

        Raises:
            ConfigError: names the place, never the key.
        """
        environment = os.environ if environment is None else environment
        places: dict[str, str | None] = {"api_key": given, VARIABLE: environment.pop(VARIABLE, None)}
        if file is not None:
            try:
                lines = Path(file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as e:
                raise ConfigError(f"api_key_file: {e}") from None
            places["api_key_file"] = ",".join(line for line in lines if not line.lstrip().startswith("#"))
        keys: list[str] = []
        for place, text in places.items():
            if text is None:
                continue
            found = [key for key in map(str.strip, text.split(",")) if key]
            if not found:
                raise ConfigError(f"{place} names no key")
            if not all(map(_KEY.fullmatch, found)):
                raise ConfigError(f"{place}: a key is up to 512 printable ASCII characters without spaces")
            keys += found
        return cls(keys)

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether a request with these headers is let in. Takes as long whichever key is wrong, and wherever."""
        if not self._keys:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "replace")
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)
