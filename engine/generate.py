"""Offline batches: `torchrun --nproc-per-node N -m tpserve.engine.generate --checkpoint DIR --prompts F --out F`.

Every line of the input has `prompt`, `prompt_token_ids` or `dialog`, and any sampling field; the output has a line for
each, in the same order: `text, ids, finish_reason, usage` and what else was asked for (with `n` above 1, a list of such
`choices`), or `error`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import fire
import msgspec

from tpserve.engine.channel import LeaderChannel
from tpserve.engine.config import EngineConfig
from tpserve.engine.core import EngineCore
from tpserve.engine.errors import ConfigError, RequestError
from tpserve.engine.group import build_core, choose_device, process_group
from tpserve.engine.journal import Journal, digest
from tpserve.engine.limits import check_room, check_sequences, check_vocabulary
from tpserve.engine.loop import follow, lead
from tpserve.engine.meeting import follower_channel, leader_channel
from tpserve.engine.offline import OfflineFrontend, error_result, read_jsonl
from tpserve.engine.options import split_options
from tpserve.engine.requests import GenerateRequest, RequestReader
from tpserve.engine.sampling_fields import Vocabulary, sampling_params
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.chat_template import default_template
from tpserve.engine.text.load import checkpoint_tokenizer
from tpserve.engine.text.tokenizer import TokenizerError
from tpserve.engine.weights import describe_checkpoint
from tpserve.model.checkpoint import CheckpointError


@dataclasses.dataclass(frozen=True)
class Job:
    """One offline batch.

    Attributes:
        prompts, out: the JSONL files.
        defaults: of sampling fields that a line does not give.
        config: the engine's.
    """

    prompts: Path
    out: Path
    defaults: SamplingParams
    config: EngineConfig


def read_job(checkpoint: str, prompts: str, out: str, options: dict[str, Any]) -> Job:
    """The command's arguments, checked; see `generate`.

    Raises:
        ConfigError, RequestError: an option that nobody knows, or that holds what it may not.
        CheckpointError, TokenizerError: there is no checkpoint in that folder.
    """
    engine, sampling = split_options(options)
    ranks = {"tensor_parallel_size": int(os.environ.get("WORLD_SIZE", "1"))}
    config = EngineConfig.from_dict({"checkpoint_dir": checkpoint, **ranks, **engine})
    folder = Path(checkpoint)
    vocabulary = Vocabulary(checkpoint_tokenizer(folder, encodes=False), describe_checkpoint(folder).args.vocab_size)
    return Job(Path(prompts), Path(out), sampling_params(sampling, SamplingParams(), vocabulary), config)


def run_batch(job: Job) -> int:
    """Runs this rank's part of a batch; on rank 0 returns how many lines could not be served.

    Raises:
        ConfigError, CheckpointError, TokenizerError: nothing can be served.
    """
    device = choose_device(job.config)
    with process_group(job.config, device) as tp:
        if tp.rank:
            channel = follower_channel(tp, device, job.config.step_timeout_s)
            core = build_core(job.config, device, tp)
            follow(core, job.config, channel)
            core.close()
            return 0
        with leader_channel(tp, device, math.inf) as leads:
            return _lead_batch(job, build_core(job.config, device, tp), leads)


def _lead_batch(job: Job, core: EngineCore, channel: LeaderChannel) -> int:
    checkpoint = Path(job.config.checkpoint_dir)
    info = describe_checkpoint(checkpoint)
    tokenizer = checkpoint_tokenizer(checkpoint)
    max_seq_len = core.shape.max_seq_len
    template = default_template(tokenizer)
    if template is not None:
        template = template.within(max_seq_len)
    reader = RequestReader(tokenizer, info.args.vocab_size, max_seq_len, chat_template=template)
    lines = read_jsonl(job.prompts)
    defaults = msgspec.to_builtins(job.defaults)
    settings = [dataclasses.asdict(info), str(checkpoint.resolve()), defaults, max_seq_len]
    settings.append(None if tokenizer is None else tokenizer.chat_template)
    digests = [digest(str(x) if isinstance(x, RequestError) else x, settings) for x in lines]
    with Journal(job.out, digests) as journal:
        if journal.results:
            print(f"{len(journal.results)} of {len(lines)} lines were finished before", file=sys.stderr)
        requests: list[tuple[int, GenerateRequest]] = []
        for index, line in enumerate(lines):
            if index in journal.results:
                continue
            try:
                request = _request(line, reader, job.defaults)
                check_vocabulary(request.params, info.args.vocab_size)
                check_sequences(request.params, job.config.max_num_seqs)
                check_room(
                    len(request.prompt_token_ids),
                    request.params,
                    core.shape.max_seq_len,
                    core.shape.num_blocks,
                    job.config.block_size,
                )
                requests.append((index, request))
            except RequestError as e:
                journal.add(index, error_result(e))
        frontend = OfflineFrontend(requests, tokenizer, 2 * job.config.max_num_seqs, journal.add)
        lead(core, job.config, channel, frontend)
        core.close()
        frontend.close()
        journal.finish()
        return sum("error" in result for result in journal.results.values())


def _request(line: Any, reader: RequestReader, defaults: SamplingParams) -> GenerateRequest:
    if isinstance(line, RequestError):
        raise line
    request = reader.read(line, defaults)
    if request.params.seed is None:
        params = msgspec.structs.replace(request.params, seed=secrets.randbits(64))
        request = dataclasses.replace(request, params=params)
    return request


def generate(checkpoint: str, prompts: str, out: str, **options: Any) -> None:
    """Generates for every line of a JSONL file.

    Args:
        checkpoint: folder written by `tpserve convert`.
        prompts: JSONL in: `prompt`, `prompt_token_ids` or `dialog`, and any sampling field.
        out: JSONL out, in the same order. While it runs, finished lines are kept in `<out>.partial`; the same
            command after an interruption goes on from there.
        options: any sampling field (max_new_tokens, temperature, n, stop, …), for lines that do not say, and any key
            of the engine's configuration (max_seq_len, max_num_seqs, dtype, device, …).
    """
    logging.basicConfig(level=logging.WARNING)
    try:
        job = read_job(checkpoint, prompts, out, options)
        failed = run_batch(job)
    except (ConfigError, CheckpointError, TokenizerError, RequestError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    if failed:
        print(f"{failed} lines could not be served; their output lines say why", file=sys.stderr)


if __name__ == "__main__":
    fire.Fire(generate)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's teardown at exit has aborted ranks that had finished
