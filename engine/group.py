"""What every rank does before its first step: join the process group, load, size the KV cache."""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from tpserve.engine.config import EngineConfig
from tpserve.engine.core import CoreShape, EngineCore
from tpserve.engine.device_queue import DeviceQueue, device_queue
from tpserve.engine.errors import ConfigError, MissingDevicesError
from tpserve.engine.guided import Grammars
from tpserve.engine.model_runner import ModelRunner
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.scheduler import MAX_DRAFTS, MAX_PROMPT_LOGITS
from tpserve.engine.self_test import Probe, check_steps, check_weights
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import ScheduledSequence, StepPlan
from tpserve.engine.text.load import checkpoint_tokenizer
from tpserve.engine.weights import open_weights
from tpserve.model.checkpoint import CheckpointError
from tpserve.model.kv_cache import PagedKVCache, bytes_per_block
from tpserve.model.loader import LoadedModel, load_model
from tpserve.model.network import Network, choose_network
from tpserve.model.parallel import TensorParallel, num_kv_heads, without_multicast
from tpserve.model.quantized import quantize, weight_bytes

_CPU_KV_CACHE_BYTES = 1 << 30
# Of a step's logits, float32, what is there at a time: while torch draws from them; while ranks' parts are joined.
_SAMPLED_COPIES, _GATHERED_COPIES = 8, 3

logger = logging.getLogger(__name__)


def choose_device(config: EngineConfig) -> torch.device:
    """This rank's device.

    Raises:
        MissingDevicesError: CUDA is asked for and there is none, or there are fewer GPUs than ranks on this node.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingDevicesError("device is cuda, but torch sees no GPU (torch.cuda.is_available() is false)", 0)
    # Every rank counts: rank 0, whom the client hears, would otherwise wait for the one that has no GPU.
    num_devices, num_ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_devices < num_ranks:
        raise MissingDevicesError(
            f"{num_ranks} ranks of this node need a GPU each: torch sees {num_devices}", num_devices
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def process_group(config: EngineConfig, device: torch.device) -> Iterator[TensorParallel]:
    """Joins the group that torchrun describes (gloo on CPU, NCCL on CUDA); a single process needs none.

    Raises:
        ConfigError: torchrun started another number of processes than the configured TP size.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size} but torchrun started {world_size} processes; "
            f"run: torchrun --nproc-per-node {config.tensor_parallel_size} …"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield TensorParallel()
        return
    without_multicast()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=config.step_timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    yield TensorParallel.from_world()
    # After a failure there is nothing to agree on any more: the process ends, and the group with it.
    dist.barrier()
    dist.destroy_process_group()


def build_core(config: EngineConfig, device: torch.device, tp: TensorParallel) -> EngineCore:
    """Loads this rank's weights and makes its engine.

    Raises:
        CheckpointError, ConfigError: what was asked for cannot be served; the message says what to change.
        SelfTestError: the ranks compute something else than the checkpoint says.
    """
    queue = device_queue(device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # here; the device's thread has them all
    loaded, num_blocks, runner, probe = queue.prepare(lambda: _load(config, device, tp, queue))
    if probe is not None:
        check_steps(runner, loaded, config, probe)
    vocab_size = loaded.info.args.vocab_size
    tokenizer = checkpoint_tokenizer(Path(config.checkpoint_dir), encodes=False)
    grammars = None if tokenizer is None else Grammars(tokenizer, vocab_size)
    # Converted by an older release, the checkpoint names only one.
    known = () if tokenizer is None else tokenizer.end_ids
    ends = tuple(dict.fromkeys((*loaded.info.end_ids, *known)))
    step_s = runner.network.lone_step_s
    decode_steps = 1 if step_s is None else max(1, int(config.multi_step_ms / 1e3 / step_s))
    shape = CoreShape(num_blocks, config.max_seq_len, ends, vocab_size, decode_steps)
    return EngineCore(config, shape, runner, tp.rank, grammars)


def _load(
    config: EngineConfig, device: torch.device, tp: TensorParallel, queue: DeviceQueue
) -> tuple[LoadedModel, int, ModelRunner, Probe | None]:
    """The weights, the number of KV blocks, what computes with them, the self-test's text; in the device's thread."""
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // tp.size)))))
    started_s = time.monotonic()
    source = open_weights(config)
    dtype = None if config.dtype == "auto" and device.type == "cuda" else _dtype(config)
    try:
        loaded = load_model(
            Path(config.checkpoint_dir),
            tp=tp,
            device=device,
            dtype=dtype,
            max_seq_len=config.max_seq_len,
            dummy=config.load_format == "dummy",
            source=source,
        )
    except CheckpointError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from None
    if config.quantization is not None and loaded.info.quantization is None:
        quantize(loaded.model, config.quantization)
    logger.info(
        "weights: %.1f MB in %.2f s, %.1f MB here",
        loaded.bytes_read / 1e6, time.monotonic() - started_s, weight_bytes(loaded.model) / 1e6,
    )  # fmt: skip
    probe = check_weights(loaded, config, source) if config.self_test else None
    num_blocks = _num_blocks(config, loaded)
    needed = -(-config.max_seq_len // config.block_size)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache holds {num_blocks} blocks, one sequence of max_seq_len {config.max_seq_len} needs {needed}; "
            "lower max_seq_len, or raise num_kv_blocks, kv_cache_bytes or gpu_memory_utilization"
        )
    runner = _runner(config, loaded, _cache(config, loaded, num_blocks), queue=queue)
    runner.warm_up()
    logger.info("ready to compute after %.2f s", time.monotonic() - started_s)
    return loaded, num_blocks, runner, probe


def _dtype(config: EngineConfig) -> torch.dtype:
    """On a CPU "auto" is float32: half precision saves memory there, not time, and rounds away what tests compare."""
    dtype: torch.dtype = getattr(torch, "float32" if config.dtype == "auto" else config.dtype)
    return dtype


def _runner(
    config: EngineConfig,
    loaded: LoadedModel,
    cache: PagedKVCache,
    queue: DeviceQueue | None = None,
) -> ModelRunner:
    def network(tokens_RL: torch.Tensor, tables_RB: torch.Tensor) -> Network:
        return choose_network(
            loaded.model, cache, tokens_RL, tables_RB, loaded.tp, max_num_seqs=config.max_num_seqs,
            max_num_tokens=config.max_num_batched_tokens, fused=config.fused_kernels,
            graphs=config.cuda_graphs,
        )  # fmt: skip

    return ModelRunner(network, loaded.info.args.vocab_size, loaded.device, cache, config, queue)


def _cache(config: EngineConfig, loaded: LoadedModel, num_blocks: int) -> PagedKVCache:
    args = loaded.info.args
    kv_heads = num_kv_heads(args, loaded.tp)
    return PagedKVCache(
        args.n_layers,
        num_blocks,
        config.block_size,
        kv_heads,
        args.head_dim,
        dtype=_cache_dtype(config, loaded),
        device=loaded.device,
    )


def _cache_dtype(config: EngineConfig, loaded: LoadedModel) -> torch.dtype:
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else loaded.dtype


def _num_blocks(config: EngineConfig, loaded: LoadedModel) -> int:
    """Blocks of the KV cache: as configured, or what memory allows; the smallest answer of all ranks."""
    args, size = loaded.info.args, config.block_size
    block_bytes = bytes_per_block(
        args.n_layers, size, num_kv_heads(args, loaded.tp), args.head_dim, _cache_dtype(config, loaded)
    )
    wanted = config.max_num_seqs * -(-config.max_seq_len // size)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // block_bytes
    elif loaded.device.type == "cuda":
        num_blocks = _free_cuda_bytes(config, loaded) // block_bytes
    else:
        num_blocks = min(wanted, max(_CPU_KV_CACHE_BYTES // block_bytes, -(-config.max_seq_len // size)))
    # More than this could never be in use.
    num_blocks = min(num_blocks, wanted)
    if loaded.tp.size > 1:
        smallest = torch.tensor(num_blocks, device=loaded.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=loaded.tp.group)
        num_blocks = int(smallest.item())
    return num_blocks


def _free_cuda_bytes(config: EngineConfig, loaded: LoadedModel) -> int:
    """Memory for the KV cache: the configured share of the device, less weights, the largest step's activations, and
    the most logits that are ever asked for."""
    drafts = MAX_DRAFTS if config.num_speculative_tokens else 0
    peak, foreign, total = _largest_step(config, loaded, drafts)
    gc.collect()  # which does not run by itself yet: the weights that the runner joined must go before the next one's
    torch.cuda.empty_cache()
    rows = _SAMPLED_COPIES * (config.max_num_seqs + drafts)
    rows += _GATHERED_COPIES * min(MAX_PROMPT_LOGITS, config.max_num_batched_tokens)
    return max(0, int(total * config.gpu_memory_utilization) - foreign - peak - 4 * rows * loaded.info.args.vocab_size)


def _largest_step(config: EngineConfig, loaded: LoadedModel, drafts: int) -> tuple[int, int, int]:
    """Runs a step as large as any, with a cache of one sequence. Bytes: the most that torch has had meanwhile, what is
    taken of the device beside torch's, all of the device."""
    longest, left = config.max_seq_len, config.max_num_batched_tokens
    if not config.enable_chunked_prefill:  # a prompt is not cut for what runs beside it
        left += config.max_num_seqs + drafts
    lengths = ([longest] * (left // longest) + [left % longest])[: config.max_num_seqs]
    blocks = -(-max(lengths) // config.block_size)
    torch.cuda.reset_peak_memory_stats(loaded.device)
    cache = _cache(config, loaded, blocks)
    runner = _runner(config, loaded, cache)
    runner.warm_up()  # all kernels are compiled here; the runner that serves finds them
    plan = StepPlan()
    for row, length in enumerate(lengths):
        if length > 1 or not plan.entries:  # a single token would be none of a prompt
            prompt = Sequence("profile", [0] * length, SamplingParams(), max_seq_len=length + 1, eos_token_ids=())
            prompt.block_table, prompt.row = list(range(blocks)), row  # the same blocks: nobody reads what it says
            plan.loads.append(prompt)
            plan.entries.append(ScheduledSequence(prompt, 0, length, (prompt,), []))
    step = runner.launch(plan)
    runner.draw(step, None)
    runner.finish(step)
    torch.cuda.synchronize(loaded.device)
    peak = torch.cuda.max_memory_allocated(loaded.device)
    # With the runner still there: what its ranks reach of each other is not torch's own memory.
    free, total = torch.cuda.mem_get_info(loaded.device)
    return peak, total - free - torch.cuda.memory_reserved(loaded.device), total
