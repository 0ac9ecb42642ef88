"""`tpserve run`: prompts from the command line or a file, answers to the terminal, and how long they took."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fire

if TYPE_CHECKING:
    from tpserve.engine.requests import GenerateRequest
    from tpserve.engine.session import Asked, Session

_TEXTS = ("checkpoint", "input_text", "input_file", "system", "chat_template", "output_csv", "output_npy", "json",
          "device", "dtype", "quantization", "kv_cache_dtype", "stop")  # fmt: skip


@fire.decorators.SetParseFns(**dict.fromkeys(_TEXTS, str))  # type: ignore[untyped-decorator]
def run(
    checkpoint: str,
    tp: int = 1,
    input_text: str = "",
    input_file: str = "",
    streaming: bool = True,
    chat: bool = False,
    system: str = "",
    chat_template: str = "",
    whole_file: bool = False,
    pad_id: int | None = None,
    output_csv: str = "",
    output_npy: str = "",
    json: str = "",
    num_beams: int | None = None,
    **options: Any,
) -> None:
    """Generates from one prompt, or from those of a file, and shows time to first token and tokens/s at the end.

    Args:
        checkpoint: a checkpoint of any form.
        tp: tensor-parallel size.
        input_text: the prompt.
        input_file: .txt (a prompt a line), .csv (token ids with commas, a prompt a line), .npy (token ids, a padded
            row a prompt), .jsonl (`prompt`, `prompt_token_ids` or `dialog`, and sampling fields).
        streaming: one prompt's answer appears as it comes; otherwise, and of several, whole.
        chat: the prompt is a user's message and goes through the checkpoint's chat template.
        system: a system message before it.
        chat_template: llama2, llama3 or a jinja2 file, instead of the checkpoint's.
        whole_file: a .txt file is one prompt.
        pad_id: what fills the rows of a .npy file, read or written; default: the end-of-sequence token.
        output_csv, output_npy: files for the answers' token ids.
        json: a file for the answers, and the figures of the table.
        num_beams: the same as beam_width.
        options: sampling fields (max_output_len, temperature, top_k, top_p, repetition_penalty, seed, beam_width, n,
            stop, …) and keys of the engine's configuration (max_seq_len, dtype, device, …).
    """
    from tpserve.engine.config import EngineConfig
    from tpserve.engine.errors import ConfigError, EngineError
    from tpserve.engine.options import split_options
    from tpserve.engine.session import Session

    if bool(input_text) == bool(input_file):
        raise ConfigError("give either input_text or input_file")
    engine, sampling = split_options(options)
    if num_beams is not None:
        sampling["beam_width"] = num_beams
    config = EngineConfig.from_dict(
        {"checkpoint_dir": checkpoint, "tensor_parallel_size": tp, "standby": False, **engine}
    )
    session = Session(config, sampling, chat_template)
    pad_id = session.client.checkpoint.eos_token_id if pad_id is None else pad_id
    prompts = _prompts(input_text, input_file, {pad_id} - {None}, whole_file)
    messages = [{"role": "system", "content": system}] if system else []

    def request(given: dict[str, Any]) -> GenerateRequest:
        if not (chat or system) or "prompt" not in given:
            return session.read(given)
        text = given.pop("prompt")
        return session.read_chat([*messages, {"role": "user", "content": text}], given)

    requests = [request(dict(given)) for given in prompts]
    with session:
        one = len(requests) == 1 and requests[0].params.num_choices == 1 and requests[0].params.beam_width == 1
        if one and streaming:
            asked, results = _stream(session, requests[0])
        else:
            asked, results = _all(session, requests, config.max_num_seqs)
            _show(prompts, results)
    errors = [one.completion.error for one in asked if one.completion.error is not None]
    if errors:
        raise EngineError(errors[0])
    figures = [_figures(one) for one in asked]
    print(f"\n{_table(figures)}")
    _write(results, figures, output_csv, output_npy, -1 if pad_id is None else pad_id, json)


def _prompts(text: str, file: str, pad_ids: Any, whole_file: bool) -> list[dict[str, Any]]:
    if text:
        return [{"prompt": text}]
    from tpserve.engine.token_files import read_prompts

    return read_prompts(Path(file), pad_ids, whole_file)


def _stream(session: Session, request: GenerateRequest) -> tuple[list[Asked], list[dict[str, Any]]]:
    from tpserve.engine.results import said, said_of_prompt, usage

    told: dict[str, Any] = {}
    last: Asked | None = None
    for last in session.ask([request]):
        for delta in last.completion.take():
            told = _joined(told, said(delta))
            print(delta.text, end="", flush=True)
    assert last is not None
    print()
    return [last], [told | said_of_prompt(last.completion) | usage(last.completion)]


def _joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What an answer has said by now: texts and lists one behind the other."""
    joined = dict(before)
    for name, value in after.items():
        joined[name] = before[name] + value if name in before and isinstance(value, str | list) else value
    return joined


def _all(session: Session, requests: list[GenerateRequest], in_flight: int) -> tuple[list[Asked], list[dict[str, Any]]]:
    from tpserve.engine.results import whole
    from tpserve.engine.session import progress_bar

    ended: dict[int, Asked] = {}
    results: dict[int, dict[str, Any]] = {}
    with progress_bar(len(requests), "generating") as bar:
        for asked in session.ask(requests, in_flight):
            if asked.completion.finished:
                ended[asked.index], results[asked.index] = asked, whole(asked.completion)
                bar.update()
    return [ended[i] for i in range(len(requests))], [results[i] for i in range(len(requests))]


def _show(prompts: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    for number, (given, result) in enumerate(zip(prompts, results, strict=True)):
        print(f"Input {number}: {given.get('prompt') or given.get('dialog') or given.get('prompt_token_ids')}")
        for answer in result.get("choices", [result]):
            which = f"{number}.{answer['index']}" if "choices" in result else f"{number}"
            print(f"Output {which}: {answer['text'] or answer['ids']}\n")


def _figures(asked: Asked) -> dict[str, Any]:
    tokens, timing = asked.completion.usage, asked.timing
    return {
        "prompt_tokens": tokens.prompt_tokens, "output_tokens": tokens.completion_tokens,
        "cached_tokens": tokens.cached_tokens, "ttft_ms": 1e3 * timing.ttft_s, "tokens_per_s": timing.tokens_per_s,
        "total_s": timing.total_s, "sent_s": timing.sent_s, "last_s": timing.last_s,
    }  # fmt: skip


def _table(figures: list[dict[str, Any]]) -> str:
    from tpserve.bench.record import markdown

    names = ("prompt_tokens", "output_tokens", "ttft_ms", "tokens_per_s", "total_s")
    rows: list[list[Any]] = [[f"prompt {i}", *(one[name] for name in names)] for i, one in enumerate(figures)]
    if len(figures) == 1:
        rows[0][0] = "prompt"
    else:
        whole_s = max(one["last_s"] for one in figures) - min(one["sent_s"] for one in figures)
        tokens = [sum(one[name] for one in figures) for name in names[:2]]
        rate = tokens[1] / whole_s if whole_s > 0 else 0.0
        median_ms = statistics.median(one["ttft_ms"] for one in figures)
        rows.append(["together (TTFT: median)", *tokens, median_ms, rate, whole_s])
    return markdown(["", "prompt tokens", "output tokens", "TTFT ms", "tokens/s", "s"], rows)


def _write(
    results: list[dict[str, Any]], figures: list[dict[str, Any]], csv: str, npy: str, pad_id: int, json: str
) -> None:
    from tpserve.bench.record import write_json
    from tpserve.engine.token_files import rows_of, write_csv, write_npy

    if csv:
        write_csv(Path(csv), rows_of(results))
    if npy:
        write_npy(Path(npy), rows_of(results), pad_id)
    if json:
        own = [{name: one[name] for name in one if name not in ("sent_s", "last_s")} for one in figures]
        rows = [result | {"figures": one} for result, one in zip(results, own, strict=True)]
        write_json(Path(json), " ".join(["tpserve", *sys.argv[1:]]), {"answers": rows})
