"""A command's options: which are the engine's, and which are a request's. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpserve.engine.config import EngineConfig, unknown_key
from tpserve.engine.errors import ConfigError
from tpserve.engine.sampling_fields import ALIASES, SAMPLING_FIELDS


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the engine's configuration, and sampling fields; what is None counts as not given.

    Raises:
        ConfigError: nobody knows an option.
    """
    engine: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    for name, value in options.items():
        if name in EngineConfig.field_names():
            engine[name] = value
        elif name in SAMPLING_FIELDS or name in ALIASES:
            sampling[name] = list(value) if isinstance(value, tuple) else value  # fire reads `5,6` as a tuple
        else:
            raise ConfigError(unknown_key(name, (*SAMPLING_FIELDS, *EngineConfig.field_names())))
    return engine, {name: value for name, value in sampling.items() if value is not None}
