"""The engine's configuration: frozen, checked at once, free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tpserve.engine.errors import ConfigError

_POSITIVE = (
    "tensor_parallel_size",
    "max_seq_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_waiting",
    "block_size",
    "start_timeout_s",
    "step_timeout_s",
    "checksum_interval",
    "num_nodes",
)
_MAX_MULTI_STEP_MS = 1000


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a rank needs to know.

    Attributes:
        checkpoint_dir: a folder written by `tpserve convert`, or any checkpoint that it reads (`docs/checkpoints.md`).
        tensor_parallel_size: number of ranks.
        load_format: "auto": the checkpoint's weights; "dummy": random ones, for measuring; of the folder only
            `model.json` is read.
        device: "auto" (CUDA where there is one), "cuda" or "cpu".
        dtype: of weights and activations: "auto" (the checkpoint's; float32 on a CPU), "float32", "float16" or
            "bfloat16".
        quantization: of the blocks' weights, when they are loaded: None (as the checkpoint has them), "int8", "int4"
            or "fp8".
        kv_cache_dtype: "auto" (as activations) or "fp8" (float8_e4m3fn: half the bytes, twice the tokens).
        max_seq_len: longest prompt plus output, in tokens.
        max_num_seqs: sequences that may run at once.
        max_num_batched_tokens: tokens of one step, decode and prefill together.
        max_num_waiting: queued requests beyond which new ones are answered 429.
        block_size: tokens of one KV block.
        num_kv_blocks: size of the KV cache in blocks; None: from kv_cache_bytes or gpu_memory_utilization.
        kv_cache_bytes: KV cache of one rank in bytes; None: on a CPU enough for max_num_seqs sequences of max_seq_len,
            at most 1 GiB; on CUDA by gpu_memory_utilization.
        fused_kernels: compute with kernels of our own where there are any for the device, the type and the model; on a
            CPU: compile the decode step of a single sequence (with `cuda_graphs`, at tensor-parallel size 1).
        cuda_graphs: launch a small step as one graph; the same bits come without.
        gpu_memory_utilization: fraction of the device's memory that weights, activations and KV cache may fill.
        start_timeout_s: from launch to ready.
        step_timeout_s: without a heartbeat for so long, the group is taken for hung.
        enable_prefix_caching: prompts share the KV blocks of what they have in common with earlier ones.
        enable_chunked_prefill: long prompts are computed in pieces beside running streams; without it a prompt takes
            one step (but where log-probabilities of prompts are asked for, of 512 tokens a step), and
            max_num_batched_tokens must be at least max_seq_len.
        async_scheduling: a step is planned while the device computes the one before.
        multi_step_ms: where the host takes the cores that the device computes with (compiled steps on a CPU), a
            sequence that runs alone is planned for as many tokens as take no longer than this; they come together.
            0: one by one.
        num_speculative_tokens: tokens that are guessed from what the text said before (prompt lookup) and checked in
            one step; 0: off. The tokens are the same with and without. All sequences of a step share 512.
        prompt_lookup_max, prompt_lookup_min: lengths of the last tokens that are looked up, longest first.
        checksum_interval: ranks compare their decisions every so many steps.
        max_restarts: relaunches within restart_window_s before the engine gives up.
        restart_window_s: see max_restarts.
        standby: a second group of ranks waits, imported but without device or memory, and takes over when one dies.
        self_test: before it is ready, a group computes a probe text, and does not serve if that is not what the
            checkpoint says (`docs/checkpoints.md`).
        elastic: when devices are missing, or a group does not come back, it goes on at the largest smaller
            tensor_parallel_size that fits.
        num_nodes: machines that the ranks are spread over evenly; above 1, the others run `tpserve node`
            (`docs/machines.md`).
        node_address: of this machine, as the others reach it.
        node_port: where it waits for them.
        node_key_file: a file with the key that all of them share; None: it is in TPSERVE_NODE_KEY.
    """

    checkpoint_dir: str
    tensor_parallel_size: int = 1
    load_format: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_seq_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_num_waiting: int = 1024
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_bytes: int | None = None
    fused_kernels: bool = True
    cuda_graphs: bool = True
    gpu_memory_utilization: float = 0.9
    start_timeout_s: float = 600.0
    step_timeout_s: float = 60.0
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    multi_step_ms: float = 32.0
    num_speculative_tokens: int = 0
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    checksum_interval: int = 64
    max_restarts: int = 3
    restart_window_s: float = 300.0
    standby: bool = True
    self_test: bool = True
    elastic: bool = False
    num_nodes: int = 1
    node_address: str = ""
    node_port: int = 29400
    node_key_file: str | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format must be auto or dummy, got {self.load_format!r}")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ConfigError(f"device must be auto, cuda or cpu, got {self.device!r}")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype must be auto, float32, float16 or bfloat16, got {self.dtype!r}")
        if self.quantization not in (None, "int8", "int4", "fp8"):
            raise ConfigError(f"quantization must be int8, int4 or fp8, got {self.quantization!r}")
        if self.kv_cache_dtype not in ("auto", "fp8"):
            raise ConfigError(f"kv_cache_dtype must be auto or fp8, got {self.kv_cache_dtype!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_seq_len:
            raise ConfigError(
                f"without enable_chunked_prefill, max_num_batched_tokens ({self.max_num_batched_tokens}) must be at "
                f"least max_seq_len ({self.max_seq_len}): a prompt is computed in one step"
            )
        if not 0 <= self.num_speculative_tokens <= 16:
            raise ConfigError(f"num_speculative_tokens must be from 0 to 16, got {self.num_speculative_tokens}")
        if not 0 <= self.multi_step_ms <= _MAX_MULTI_STEP_MS:
            raise ConfigError(
                f"multi_step_ms must be from 0 to {_MAX_MULTI_STEP_MS}, got {self.multi_step_ms}: "
                "no other request begins meanwhile"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min ({self.prompt_lookup_min}) must be from 1 to prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.tensor_parallel_size % self.num_nodes:
            raise ConfigError(
                f"tensor_parallel_size ({self.tensor_parallel_size}) must be a multiple of num_nodes "
                f"({self.num_nodes}): each machine has as many ranks"
            )
        if self.num_nodes > 1 and not self.node_address:
            raise ConfigError(f"num_nodes is {self.num_nodes}: node_address must say where the others reach this one")
        if self.num_nodes > 1 and self.elastic:
            raise ConfigError("elastic is for one machine: a group over several waits until all are back")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The configuration keys."""
        return cls.__struct_fields__

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EngineConfig:
        """Checks names and types.

        Raises:
            ConfigError: names the key (and the nearest known one).
        """
        for name in fields:
            if name not in cls.field_names():
                raise ConfigError(unknown_key(name, cls.field_names()))
        try:
            return msgspec.convert(fields, cls)
        except msgspec.ValidationError as e:
            raise ConfigError(str(e)) from None

    def with_checkpoint(self, folder: Path) -> EngineConfig:
        """The same for another checkpoint folder."""
        return msgspec.structs.replace(self, checkpoint_dir=str(folder))


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The message for a key that nobody reads."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"unknown key {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
