"""The options of `tpserve serve`: the front's own, and every key of a yaml's `handler:` section."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tpserve.engine.config import unknown_key
from tpserve.engine.errors import ConfigError
from tpserve.handler.config import KNOWN_KEYS, HandlerConfig
from tpserve.handler.wire import Limits

_LIMITS = ("max_request_bytes", "max_connections", "request_timeout_s")
_CHECKPOINT = ("converted_ckpt_dir", "checkpoint_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontConfig:
    """What the command line says.

    Attributes:
        handler: the engine and the defaults of requests.
        host, port: where to listen; port 0: a free one.
        served_model_name: what users call the model; None: the checkpoint folder's name.
        api_key: keys with commas between them; see `ApiKeys`, also for the file.
        allowed_origins: sites whose pages may ask, with commas between them; "*": all.
        ssl_certfile, ssl_keyfile: PEM files, for HTTPS.
        ssl_ca_certs: only clients with a certificate of one of these are let in.
        max_request_bytes, max_connections, request_timeout_s: see `Limits`.
        drain_timeout_s: so long may running requests go on after SIGTERM.
        access_log: a line a request.
    """

    handler: HandlerConfig
    host: str = "127.0.0.1"
    port: int = 8080
    served_model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    allowed_origins: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    max_request_bytes: int = Limits.max_request_bytes
    max_connections: int = Limits.max_connections
    request_timeout_s: float = Limits.request_timeout_s
    drain_timeout_s: float = 30.0
    access_log: bool = True

    def __post_init__(self) -> None:
        for name in _LIMITS:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s must not be negative, got {self.drain_timeout_s:g}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile go together")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ConfigError("ssl_ca_certs is of no use without ssl_certfile and ssl_keyfile")

    @classmethod
    def from_options(cls, checkpoint: str, tp: int | None, options: Mapping[str, Any]) -> FrontConfig:
        """Checks everything.

        Args:
            checkpoint: a folder written by `tpserve convert`.
            tp: number of ranks; None: the options say, or one.
            options: the rest of the command line.

        Raises:
            ConfigError: names the option (and the nearest known one).
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"handler"}
        known = (*own, *(key for key in KNOWN_KEYS if key not in _CHECKPOINT))
        for name in options:
            if name not in known:
                raise ConfigError(unknown_key(name, (*known, "checkpoint", "tp")).replace("key", "option", 1))
        section = {name: value for name, value in options.items() if name not in own}
        if tp is not None and section.setdefault("tensor_parallel_size", tp) != tp:
            raise ConfigError("tp and tensor_parallel_size are the same; give one of them")
        section["checkpoint_dir"] = str(checkpoint)
        try:
            handler = HandlerConfig.from_yaml({"handler": section}, Path.cwd())
        except ConfigError as e:
            raise ConfigError(str(e).removeprefix("handler: ")) from None
        types = typing.get_type_hints(cls)
        given: dict[str, Any] = {}
        for name in own & options.keys():
            try:
                given[name] = msgspec.convert(options[name], types[name])
            except msgspec.ValidationError as e:
                raise ConfigError(f"{name}: {e}") from None
        return cls(handler=handler, **given)

    @property
    def model_name(self) -> str:
        """What users call the model."""
        return self.served_model_name or Path(self.handler.engine.checkpoint_dir).resolve().name

    @property
    def origins(self) -> tuple[str, ...]:
        """The sites whose pages may ask."""
        return tuple(origin.strip() for origin in self.allowed_origins.split(",") if origin.strip())

    @property
    def limits(self) -> Limits:
        """What the front takes in."""
        return Limits(
            max_request_bytes=self.max_request_bytes,
            max_connections=self.max_connections,
            max_buffered_bytes=max(Limits.max_buffered_bytes, self.max_request_bytes),
            request_timeout_s=self.request_timeout_s,
        )
