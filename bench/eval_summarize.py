"""`tpserve eval summarize`: the same documents, prompts and weights through our engine and through `transformers`.

Both get the same token ids, answer greedily and one document at a time, on the same device and as many threads; both
answers are decoded by the same tokenizer. Each side has had a document before its clock runs, and ours has ended when
`transformers` begins. What differs then is what the networks compute.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpserve.bench.eval_documents import Document, read_documents, shortened
from tpserve.bench.eval_rouge import KINDS, Rouge, Scores, mean
from tpserve.bench.record import markdown, write_json
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.options import split_options
from tpserve.engine.requests import GenerateRequest
from tpserve.engine.session import Session, progress_bar

PROMPT = "{document}\n\nTL;DR:"  # Radford et al., "Language Models are Unsupervised Multitask Learners", 2019
CHAT_PROMPT = "Summarize the following text in one sentence.\n\n{document}"
_PLACE = "{document}"


@dataclasses.dataclass
class Side:
    """One of the two.

    Attributes:
        name: in the table.
        ids: answers, one a document.
        seconds: likewise.
        texts, scores: likewise.
    """

    name: str
    ids: list[list[int]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    scores: list[Scores] = dataclasses.field(default_factory=list)

    def score(self, decode: Any, rouge: Rouge, documents: Sequence[Document]) -> Scores:
        """Decodes and scores every answer; the means."""
        self.texts = [decode(ids).strip() for ids in self.ids]
        pairs = zip(self.texts, documents, strict=True)
        self.scores = [rouge.score(text, document.references) for text, document in pairs]
        return mean(self.scores)


def summarize(
    checkpoint: str,
    documents: str,
    tp: int = 1,
    limit: int | None = None,
    document_field: str = "",
    reference_field: str = "",
    prompt: str = "",
    chat: bool = False,
    chat_template: str = "",
    max_input_len: int = 1024,
    max_output_len: int = 64,
    dtype: str = "float32",
    device: str = "",
    transformers: bool = True,
    json: str = "",
    **options: Any,
) -> None:
    """Summarises documents, and scores the summaries by ROUGE, beside `transformers` on the same weights.

    Args:
        checkpoint: a checkpoint of any form.
        documents: .jsonl, an object a line with a document and its reference summaries.
        tp: tensor-parallel size of ours.
        limit: so many documents; default: all.
        document_field, reference_field: default: source, document, article or text; target, summary, highlights or
            reference.
        prompt: with {document} in it; default: the document and "TL;DR:", or with chat a request for one sentence.
        chat: the prompt is a user's message and goes through the chat template.
        chat_template: llama2, llama3 or a jinja2 file, instead of the checkpoint's.
        max_input_len: tokens of a prompt; longer documents lose words at their end.
        max_output_len: tokens of a summary.
        dtype: of weights and activations on both sides.
        device: cuda or cpu; default: cuda where there is one.
        transformers: False: ours alone.
        json: a file for the figures, and every summary.
        options: keys of the engine's configuration.
    """
    engine, sampling = split_options(options)
    if sampling:
        raise ConfigError(f"{next(iter(sampling))} has no meaning here: answers are greedy on both sides")
    prompt = prompt or (CHAT_PROMPT if chat else PROMPT)
    if _PLACE not in prompt:
        raise ConfigError(f"prompt must say where the document goes: {_PLACE}")
    rouge = Rouge()
    found = read_documents(Path(documents), document_field, reference_field, limit)
    settings = {
        "checkpoint_dir": checkpoint, "tensor_parallel_size": tp, "standby": False, "dtype": dtype,
        "max_seq_len": max_input_len + max_output_len, "device": device or "auto", **engine,
    }  # fmt: skip
    given = {"max_new_tokens": max_output_len, "temperature": 0.0}
    session = Session(EngineConfig.from_dict(settings), given, chat_template)
    if session.tokenizer is None:
        raise ConfigError(f"{checkpoint} has no tokenizer")
    requests, cut = prompts(session, found, prompt, chat, max_input_len)
    with session:
        ours = _ours(session, requests, f"tpserve, TP {tp}")
        used = session.info.device
    ends = tuple(dict.fromkeys((*session.client.checkpoint.end_ids, *session.tokenizer.end_ids)))
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or max(1, (os.cpu_count() or 1) // tp)
    sides = [ours]
    if transformers:
        ids = [request.prompt_token_ids for request in requests]
        sides.append(_theirs(Path(checkpoint), ids, dtype, used, tp * threads, max_output_len, ends))
    means = [side.score(session.tokenizer.decode, rouge, found) for side in sides]
    print(table(f"{len(found)} documents, {Path(checkpoint).name}, {dtype}, {used}", sides, means))
    if cut:
        print(f"\n{cut} of {len(found)} documents lost words at their end to fit into {max_input_len} tokens")
    if json:
        about = {
            "checkpoint": Path(checkpoint).name, "documents": Path(documents).name, "tp": tp, "dtype": dtype,
            "device": used, "threads": tp * threads, "prompt": prompt, "chat": chat,
            "max_input_len": max_input_len, "max_output_len": max_output_len, "shortened": cut,
        }  # fmt: skip
        figures = about | _figures(sides, means, [len(request.prompt_token_ids) for request in requests])
        write_json(Path(json), " ".join(["tpserve", *sys.argv[1:]]), figures)
        print(f"\n{json}")


def prompts(
    session: Session, documents: Sequence[Document], prompt: str, chat: bool, max_input_len: int
) -> tuple[list[GenerateRequest], int]:
    """A request a document, none longer than `max_input_len` tokens; and how many documents were shortened for it."""
    tokenizer = session.tokenizer
    assert tokenizer is not None

    def request(text: str) -> GenerateRequest:
        filled = prompt.replace(_PLACE, text)
        return (
            session.read_chat([{"role": "user", "content": filled}], {}) if chat else session.read({"prompt": filled})
        )

    def num_tokens(text: str) -> int:
        filled = prompt.replace(_PLACE, text)
        if not chat:
            return len(tokenizer.encode(filled, bos=True, eos=False))
        assert session.chat_template is not None
        whole = session.chat_template.within(2**31)  # which does not refuse what is too long
        return len(whole.encode([{"role": "user", "content": filled}]))

    found, cut = [], 0
    for document in documents:
        text, lost = shortened(document.text, num_tokens, max_input_len)
        found.append(request(text))
        cut += lost > 0
    return found, cut


def _ours(session: Session, requests: Sequence[GenerateRequest], name: str) -> Side:
    def all_of(asked: Iterator[Any]) -> tuple[list[int], float]:
        ids: list[int] = []
        for one in asked:
            if one.completion.error is not None:
                raise EngineError(one.completion.error)
            for delta in one.completion.take():
                ids += delta.ids
        return ids, one.timing.total_s

    side = Side(name)
    with progress_bar(len(requests), name, "document") as bar:
        all_of(session.ask(requests[:1]))
        for request in requests:
            ids, seconds = all_of(session.ask([request]))
            side.ids.append(ids)
            side.seconds.append(seconds)
            bar.update()
    return side


def _theirs(
    checkpoint: Path, prompt_ids: Sequence[Sequence[int]], dtype: str, device: str, threads: int, new: int,
    ends: Sequence[int],
) -> Side:  # fmt: skip
    # Before torch is loaded: threads that spin while another process has their core take forty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tpserve.bench.eval_transformers import Transformers

    with tempfile.TemporaryDirectory(prefix="tpserve-eval-") as folder:
        peer = Transformers(checkpoint, Path(folder), dtype, device, threads)
        side = Side(peer.name)
        with progress_bar(len(prompt_ids), peer.name, "document") as bar:
            peer.generate(prompt_ids[0], new, ends)
            for ids in prompt_ids:
                answer = peer.generate(ids, new, ends)
                side.ids.append(answer.ids)
                side.seconds.append(answer.seconds)
                bar.update()
    return side


def table(title: str, sides: Sequence[Side], means: Sequence[Scores]) -> str:
    """As Markdown: a row a side, and what lies between them."""
    rows: list[list[Any]] = []
    for side, scores in zip(sides, means, strict=True):
        tokens, seconds = sum(map(len, side.ids)), sum(side.seconds)
        figures = [f"{scores[kind]:.4f}" for kind in KINDS]
        rows.append([side.name, *figures, seconds / len(side.ids), tokens / seconds, ""])
    if len(sides) == 2:
        same = sum(a == b for a, b in zip(sides[0].ids, sides[1].ids, strict=True))
        apart = [f"{means[0][kind] - means[1][kind]:.4f}" for kind in KINDS]
        faster = f"{sum(sides[1].seconds) / sum(sides[0].seconds):.2f}x"
        rows.append(["difference, and ratio of times", *apart, faster, "", f"{same} of {len(sides[0].ids)}"])
    return markdown([title, *KINDS.values(), "s a document", "tokens/s", "the same tokens"], rows)


def _figures(sides: Sequence[Side], means: Sequence[Scores], prompt_tokens: Sequence[int]) -> dict[str, Any]:
    summaries = [
        {
            "prompt_tokens": tokens,
            **{
                who: {"text": side.texts[i], "tokens": len(side.ids[i]), "seconds": side.seconds[i], **side.scores[i]}
                for who, side in zip(("ours", "transformers"), sides, strict=False)
            },
        }
        for i, tokens in enumerate(prompt_tokens)
    ]
    figures: dict[str, Any] = {
        who: {"name": side.name, **scores, "seconds_a_document": sum(side.seconds) / len(side.seconds)}
        for who, side, scores in zip(("ours", "transformers"), sides, means, strict=False)
    }
    if len(sides) == 2:
        figures["difference"] = {kind: means[0][kind] - means[1][kind] for kind in KINDS}
        figures["same_tokens"] = sum(a == b for a, b in zip(sides[0].ids, sides[1].ids, strict=True))
    return figures | {"summaries": summaries}
