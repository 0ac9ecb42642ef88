"""`model-config.yaml` to configuration. The old example's keys keep their meaning; the engine's stand beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpserve.engine import fields
from tpserve.engine.config import EngineConfig, unknown_key
from tpserve.engine.errors import ConfigError, RequestError
from tpserve.engine.sampling_fields import SAMPLING_FIELDS, sampling_params
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.chat_template import LLAMA2, LLAMA3, ChatTemplate, default_template
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.predictions import MODES, Defaults

# The old example's names for what the engine calls otherwise.
_ALIASES = {"converted_ckpt_dir": "checkpoint_dir", "max_batch_size": "max_num_seqs"}
_OWN_KEYS = ("tokenizer_path", "model_args_path", *SAMPLING_FIELDS, "manual_seed", "mode", "chat_template")
KNOWN_KEYS = (*_ALIASES, *_OWN_KEYS, *EngineConfig.field_names())


@dataclasses.dataclass(frozen=True)
class HandlerConfig:
    """What the yaml says.

    Attributes:
        engine: of the rank group.
        defaults: for requests that do not say.
        tokenizer: a file that `load_tokenizer` reads; None: the checkpoint folder's own.
        chat_template: see `ChatTemplate.load`; None: the yaml does not say.
        continuous_batching: TorchServe calls us as a mailbox; without it, in whole batches.
        device_ids: GPUs that the yaml names for this model.
        launched_by_torchserve: `parallelType` lets TorchServe start the processes and hand out the GPUs.
    """

    engine: EngineConfig
    defaults: Defaults
    tokenizer: Path | None = None
    chat_template: str | Path | None = None
    continuous_batching: bool = False
    device_ids: tuple[int, ...] = ()
    launched_by_torchserve: bool = False

    @classmethod
    def from_yaml(cls, yaml: Mapping[str, Any], model_dir: Path) -> HandlerConfig:
        """Checks everything.

        Args:
            yaml: the whole file.
            model_dir: the model's own folder, which relative paths start from.

        Raises:
            ConfigError: names the key.
        """
        section = yaml.get("handler")
        if not isinstance(section, Mapping):
            raise ConfigError("model-config.yaml has no handler: section")
        for key in section:
            if key not in KNOWN_KEYS:
                raise ConfigError(f"handler: {unknown_key(str(key), KNOWN_KEYS)}")
        given = {key: value for key, value in section.items() if value is not None}
        return cls(
            engine=_engine(given, yaml, model_dir),
            defaults=_defaults(given),
            tokenizer=_tokenizer(given, model_dir),
            chat_template=_chat_template(given, model_dir),
            continuous_batching=yaml.get("continuousBatching") is True,
            device_ids=tuple(yaml.get("deviceIds") or ()),
            launched_by_torchserve="parallelType" in yaml,
        )

    def load_chat_template(self, tokenizer: Tokenizer | None) -> ChatTemplate | None:
        """The model's chat template; None without a tokenizer.

        Raises:
            ConfigError: the yaml names one that cannot be served.
        """
        if self.chat_template is None:
            return default_template(tokenizer)
        if tokenizer is None:
            raise ConfigError("handler: chat_template: this model has no tokenizer")
        return ChatTemplate.load(self.chat_template, tokenizer)

    def visible_devices(self, gpu_id: int | None, already_visible: str | None) -> str | None:
        """CUDA_VISIBLE_DEVICES for the ranks: the yaml's GPUs, else those from the worker's own on.

        Args:
            gpu_id: that TorchServe gave to this worker; None on a CPU.
            already_visible: the variable's value now, whose entries ids count.

        Returns:
            None: leave it as it is.
        """
        if gpu_id is None or self.launched_by_torchserve or self.engine.device == "cpu":
            return None
        ids = self.device_ids or tuple(range(gpu_id, gpu_id + self.engine.tensor_parallel_size))
        if not already_visible:
            return ",".join(map(str, ids))
        names = already_visible.split(",")
        return ",".join(names[i] for i in ids) if max(ids) < len(names) else None


def _engine(given: Mapping[str, Any], yaml: Mapping[str, Any], model_dir: Path) -> EngineConfig:
    settings: dict[str, Any] = {key: given[key] for key in EngineConfig.field_names() if key in given}
    for old, new in _ALIASES.items():
        if old in given:
            if new in settings:
                raise ConfigError(f"handler: {old} and {new} are the same; give one of them")
            settings[new] = given[old]
    if not isinstance(settings.get("checkpoint_dir"), str):
        raise ConfigError("handler: converted_ckpt_dir must name the folder that `tpserve convert` wrote")
    settings["checkpoint_dir"] = str(model_dir / settings["checkpoint_dir"])
    ranks = _nproc_per_node(yaml)
    if ranks is not None and settings.setdefault("tensor_parallel_size", ranks) != ranks:
        raise ConfigError(
            f"torchrun: nproc-per-node is {ranks}, handler: tensor_parallel_size is "
            f"{settings['tensor_parallel_size']}; give one of them"
        )
    if yaml.get("deviceType") == "cpu":
        settings.setdefault("device", "cpu")
    try:
        return EngineConfig.from_dict(settings)
    except ConfigError as e:
        raise ConfigError(f"handler: {e}") from None


def _nproc_per_node(yaml: Mapping[str, Any]) -> int | None:
    torchrun = yaml.get("torchrun")
    if torchrun is None:
        return None
    ranks = torchrun.get("nproc-per-node", 1) if isinstance(torchrun, Mapping) else torchrun
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise ConfigError(f"torchrun: nproc-per-node must be a positive integer, got {ranks!r}")
    return ranks


def _defaults(given: Mapping[str, Any]) -> Defaults:
    mode = given.get("mode", "text_completion")
    if mode not in MODES:
        raise ConfigError(f"handler: mode must be one of {', '.join(MODES)}, got {mode!r}")
    sampling = {key: given[key] for key in SAMPLING_FIELDS if key in given}
    try:
        if "manual_seed" in given:
            if "seed" in given:
                raise ConfigError("handler: manual_seed and seed are the same; give one of them")
            sampling["seed"] = fields.integer("manual_seed", given["manual_seed"])
        params = sampling_params(sampling, SamplingParams())
    except RequestError as e:
        raise ConfigError(f"handler: {e}") from None
    return Defaults(params, given.get("max_new_tokens"), mode)


def _tokenizer(given: Mapping[str, Any], model_dir: Path) -> Path | None:
    # Our checkpoint folders bring their tokenizer; a yaml of the old example names one beside it, which may be gone.
    name = given.get("tokenizer_path")
    if name is None:
        return None
    if not isinstance(name, str):
        raise ConfigError(f"handler: tokenizer_path must be a path, got {name!r}")
    path = model_dir / name
    return path if path.is_file() else None


def _chat_template(given: Mapping[str, Any], model_dir: Path) -> str | Path | None:
    name = given.get("chat_template")
    if name is None or name in (LLAMA2, LLAMA3):
        return name
    if not isinstance(name, str) or not name.endswith(".jinja"):
        raise ConfigError(f"handler: chat_template must be {LLAMA2}, {LLAMA3} or a .jinja file, got {name!r}")
    path = model_dir / name
    if not path.is_file():
        raise ConfigError(f"handler: chat_template: {path} does not exist")
    return path
