"""What fire makes of a command line that its user did not mean, put right before fire reads it."""

from __future__ import annotations

from tpserve.engine.errors import ConfigError

# One of these without a value behind it is to fire a switch that is on, and True a file's name or a number of ranks.
_WANT_A_VALUE = (
    "checkpoint", "ckpt_dir", "out_dir", "from", "to", "tokenizer_path", "against", "key_file", "alive_file",
    "api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "tp", "tensor_parallel_size", "host", "port",
)  # fmt: skip


def join_repeated(arguments: list[str], name: str) -> list[str]:
    """The arguments with `--name a … --name b` as one `--name=a,b`: fire would keep the last."""
    rest, values = [], []
    left = iter(arguments)
    for argument in left:
        option, equals, value = argument.partition("=")
        if option.replace("-", "_") == f"__{name}":
            values.append(value if equals else next(left, ""))
        else:
            rest.append(argument)
    return [*rest, f"--{name}={','.join(values)}"] if values else rest


def refuse_missing_values(arguments: list[str]) -> None:
    """Looks for options that lack theirs.

    Raises:
        ConfigError: names the first.
    """
    for option, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if option.startswith("--") and option[2:].replace("-", "_") in _WANT_A_VALUE and following.startswith("--"):
            raise ConfigError(f"{option} needs a value behind it")
