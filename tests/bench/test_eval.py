"""`tpserve eval`: which tokens count, what ROUGE is, and the commands on the demo model beside other computations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.conftest import tpserve
from tests.helpers.data import DEMO_CHECKPOINT, shared_data
from tpserve.bench.eval_documents import Document, read_documents, read_texts, shortened, windows
from tpserve.bench.eval_rouge import Rouge, mean
from tpserve.bench.eval_summarize import Side, table
from tpserve.convert.convert import convert
from tpserve.convert.probe import model_logits
from tpserve.engine.errors import ConfigError
from tpserve.engine.text.load import load_tokenizer
from tpserve.model.loader import load_model

SOME_TALE = (
    "Once upon a time there was a king who had three daughters. The eldest was proud, the second was vain, and the "
    "youngest was so good that the birds of the forest came to her hand. One morning the king said to them: "
    '"Whoever brings me the golden apple shall have my kingdom." So they went out into the world, each by her own way.'
)


@given(st.integers(0, 300), st.integers(2, 50), st.data())
def test_every_token_but_the_first_counts_once(num_tokens: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    counted = []
    for first, end, scored in windows(num_tokens, window, stride):
        assert 0 <= first < scored < end <= num_tokens
        assert end - first <= window
        assert scored - first >= min(scored, window - stride)
        counted += range(scored, end)
    assert counted == list(range(1, num_tokens))


def test_documents_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"source": ["One.", "Two."], "target": ["a", "b"]}\n{"source": "Three.", "target": "c"}\n')
    expected = [Document("One. Two.", ("a", "b")), Document("Three.", ("c",))]
    assert read_documents(path) == expected
    assert read_documents(path, limit=1) == expected[:1]
    assert read_documents(path, "target", "source")[1] == Document("c", ("Three.",))
    assert read_texts(path, "", "source") == ["One. Two.", "Three."]
    text = tmp_path / "t.txt"
    text.write_text("\none\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert read_texts(text, "<|endoftext|>") == ["one", "two"]
    assert len(read_texts(text, "")) == 1
    for name, wanted, said in (
        ("d.jsonl", "body", "object 1: body must be a text"), ("t.txt", "", "line 2 is not JSON"),
        ("none.jsonl", "", "cannot be read"), ("u.jsonl", "", "name one by document_field"),
    ):  # fmt: skip
        (tmp_path / "u.jsonl").write_text('{"body": 1}\n')
        with pytest.raises(ConfigError, match=said):
            read_documents(tmp_path / name, wanted)


def test_documents_lose_words_at_their_end() -> None:
    text = " ".join(f"w{i}" for i in range(30))

    def num_tokens(text: str) -> int:
        return 5 + len(text.split())

    assert shortened(text, num_tokens, 35) == (text, 0)
    kept, lost = shortened(text, num_tokens, 17)
    assert (kept.split(), lost) == (text.split()[:12], 18)
    with pytest.raises(ConfigError, match="not one word"):
        shortened(text, num_tokens, 5)


def test_rouge_is_what_its_paper_says() -> None:
    rouge = Rouge()
    one = rouge.score("the cat sat", ["the cat lay"])
    assert one == pytest.approx({"rouge1": 200 / 3, "rouge2": 50.0, "rougeL": 200 / 3})
    best = rouge.score("the cat sat", ["dogs", "the cats sat"])  # stemmed, and the best of several
    assert best == pytest.approx(dict.fromkeys(one, 100.0))
    assert rouge.score("sat cat", ["cat sat"])["rougeL"] == pytest.approx(50.0)
    assert mean([one, best])["rouge2"] == pytest.approx(75.0)


def test_the_table_tells_what_differs() -> None:
    scores = [dict.fromkeys(("rouge1", "rouge2", "rougeL"), value) for value in (30.0, 29.5)]
    sides = [Side("ours", [[1], [2, 3]], [0.5, 0.5]), Side("theirs", [[1], [2, 4]], [1.0, 2.0])]
    last = table("2 documents", sides, scores).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")][1:] == ["0.5000"] * 3 + ["3.00x", "", "1 of 2"]


def test_perplexity_is_the_plain_networks(tmp_path: Path) -> None:
    """Through the engine at TP 2, piece by piece, and by the network's logits of the same pieces."""
    checkpoint = convert(DEMO_CHECKPOINT, tmp_path / "demo", progress=False)
    (tmp_path / "t.txt").write_text(f"{SOME_TALE}<|endoftext|>{SOME_TALE[60:200]}")
    out = tpserve(
        "eval", "perplexity", "--checkpoint", str(checkpoint), "--text", str(tmp_path / "t.txt"), "--tp", "2",
        "--window", "32", "--stride", "12", "--device", "cpu", "--json", str(tmp_path / "o.json"),
    )  # fmt: skip
    figures = json.loads((tmp_path / "o.json").read_text())["figures"]
    tokenizer, loaded = load_tokenizer(checkpoint), load_model(checkpoint, dtype=torch.float32)
    total, count = 0.0, 0
    for text in (SOME_TALE, SOME_TALE[60:200].strip()):
        ids = tokenizer.encode(text, bos=True, eos=False)
        logits = {first: model_logits(loaded.model, ids[first : first + 32]) for first in range(0, len(ids), 12)}
        for at in range(1, len(ids)):
            # A piece begins every 12 tokens, and the first that holds a token predicts it.
            first = 0 if at < 32 else 12 * -(-(at - 31) // 12)
            total -= torch.log_softmax(logits[first][at - first - 1].double(), -1)[ids[at]].item()
            count += 1
    assert figures["tokens"] == count > 100
    assert figures["nats_a_token"] == pytest.approx(total / count, abs=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    num_bytes = len(SOME_TALE) + len(SOME_TALE[60:200].strip())
    assert figures["bits_a_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert f"{figures['perplexity']:.4f}" in out
    assert [one["tokens"] for one in figures["documents"]][1] < count / 2


def test_perplexity_of_stories_as_it_was_measured_elsewhere(tmp_path: Path) -> None:
    text = shared_data("text/tinystories_sample_5stories.txt")
    tpserve(
        "eval", "perplexity", "--checkpoint", str(shared_data("stories260K") / "mp4"), "--text", str(text), "--tp", "3",
        "--window", "512", "--device", "cpu", "--json", str(tmp_path / "o.json"),
    )  # fmt: skip
    figures = json.loads((tmp_path / "o.json").read_text())["figures"]
    assert (len(figures["documents"]), figures["tokens"]) == (5, 1804)
    assert f"{figures['nats_a_token']:.3f}" == "1.266"
    assert f"{figures['perplexity']:.3g}" == f"{math.exp(1.266):.3g}"


def test_summaries_are_those_of_transformers(tmp_path: Path) -> None:
    checkpoint = convert(DEMO_CHECKPOINT, tmp_path / "demo", progress=False)
    rows = [
        {"document": SOME_TALE, "summary": ["A king sends out his daughters.", "Three sisters look for an apple."]},
        {"document": SOME_TALE[60:150], "summary": "The youngest daughter was good."},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tpserve(
        "eval", "summarize", "--checkpoint", str(checkpoint), "--documents", str(tmp_path / "d.jsonl"), "--chat",
        "--max_input_len", "100", "--max_output_len", "16", "--device", "cpu", "--json", str(tmp_path / "o.json"),
    )  # fmt: skip
    figures = json.loads((tmp_path / "o.json").read_text())["figures"]
    assert figures["difference"] == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert figures["same_tokens"] == 2
    assert figures["ours"]["rouge1"] > 0
    first, second = figures["summaries"]
    assert first["ours"]["text"] == first["transformers"]["text"] != second["ours"]["text"]
    assert figures["shortened"] == 1
    assert second["prompt_tokens"] < 90 < first["prompt_tokens"] <= 100
    assert "1 of 2 documents lost words" in out
    assert "2 of 2" in out


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    given = ("eval", "perplexity", str(DEMO_CHECKPOINT), str(tmp_path / "t.txt"), "--window", "8")
    assert "error: stride must be from 1 to window - 1" in tpserve(*given, "--stride", "8", status=2)
    assert "error: temperature has no meaning here" in tpserve(*given, "--temperature", "1", status=2)
