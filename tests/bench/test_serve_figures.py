"""Arrivals, prompts, figures, ratios and plots of `tpserve bench serve`: by hand, and on a server of known times."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench.server import Conversation, known, steady
from tests.text.models import MODELS, load
from tpserve.bench.plot import curve
from tpserve.bench.serve import main, ratios
from tpserve.bench.serve_arrivals import Arrival, Texts, at_rate, poisson, random_ids, read_trace
from tpserve.bench.serve_events import Answer
from tpserve.bench.serve_metrics import parse_objectives, summarise
from tpserve.engine.errors import ConfigError

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,4000,300
"""


def test_poisson_arrivals_have_the_rate_and_its_irregularity() -> None:
    arrivals = poisson(5.0, 100, 20, 4000, 0.5, seed=1)
    gaps = np.diff([0.0, *(arrival.at_s for arrival in arrivals)])
    assert arrivals[-1].at_s == pytest.approx(4000 / 5.0)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1.0, abs=0.05)  # of an exponential distribution
    inputs = [arrival.num_prompt_tokens for arrival in arrivals]
    assert (min(inputs), max(inputs)) == (50, 150)
    assert {arrival.num_output_tokens for arrival in arrivals} == set(range(10, 31))
    assert poisson(5.0, 100, 20, 4000, 0.5, seed=1) == arrivals
    assert {arrival.at_s for arrival in poisson(math.inf, 100, 20, 9, 0, 1)} == {0.0}


def test_a_trace_keeps_its_pattern(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    arrivals = read_trace(path, 3, 2.0, 4.0, 1000)
    assert arrivals == [Arrival(0.0, 187, 11), Arrival(4.314579, 198, 27), Arrival(4.541877, 925, 75)]
    squeezed = [arrival.at_s for arrival in at_rate(arrivals, 3.0)]
    assert squeezed == pytest.approx([0.0, 4.314579 / 4.541877, 1.0])
    with pytest.raises(ValueError, match="3 requests, 4 are asked"):
        read_trace(path, 4, 1, 1, 1000)


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.parent.name)
def test_texts_have_exactly_the_length(model: Path) -> None:
    tokenizer, rng = load(model), random.Random(0)
    texts = Texts(tokenizer)
    for n in (2, 3, 17, 200):
        assert len(tokenizer.encode(texts.make(n, rng), bos=True, eos=False)) == n
    assert texts.make(50, rng) != texts.make(50, rng)


def test_ids_are_of_the_vocabulary() -> None:
    ids = [x for one in random_ids([Arrival(0, 500, 1)] * 4, 40, 0) for x in one]
    assert (len(ids), min(ids), max(ids)) == (2000, 10, 39)


def test_figures_by_hand() -> None:
    answers = [
        Answer(10.0, 10.001, [10.1, 10.2, 10.4], 10.4, prompt_tokens=5, output_tokens=3, finished=True),
        Answer(11.0, 11.0, [11.3, 11.5], 11.6, prompt_tokens=7, output_tokens=5, finished=True),
        Answer(11.0, 11.0, [11.9], 11.9, prompt_tokens=1, output_tokens=1, finished=True),
        Answer(11.0, 11.0, [], 12.0, error="status 500"),
    ]
    figures = summarise(answers, 9.0, {"ttft": 350.0, "itl": 150.0})
    assert (figures["requests"], figures["failed"], figures["errors"]) == (4, 1, ["status 500"])
    assert (figures["duration_s"], figures["output_tokens"], figures["prompt_tokens"]) == (3.0, 9, 13)
    assert (figures["output_tokens_per_s"], figures["requests_per_s"]) == (3.0, 1.0)
    assert figures["ttft_ms"]["p50"] == 300.0
    assert figures["ttft_sent_ms"]["mean"] == pytest.approx((99 + 300 + 900) / 3, abs=0.01)
    assert figures["itl_ms"] == pytest.approx({"mean": 500 / 3, "p50": 200.0, "p90": 200.0, "p99": 200.0}, abs=0.01)
    assert figures["tpot_ms"]["p50"] == pytest.approx((150 + 75) / 2)
    assert figures["e2e_ms"]["p90"] == pytest.approx(600 + 0.8 * 300)
    assert figures["peak_concurrency"] == 3
    assert figures["tokens_per_chunk"] == 1.5
    # The first meets the first token's objective, but 99% of its gaps are not within 150 ms; the third has no gap.
    assert figures["goodput"]["share"] == 0.0
    assert summarise(answers, 9.0, {"ttft": 350.0})["goodput"] == {
        "objectives_ms": {"ttft": 350.0}, "requests_per_s": round(2 / 3, 4), "share": 0.5,
    }  # fmt: skip
    assert summarise(answers, 9.0, {"itl": 250.0, "e2e": 700.0})["goodput"]["share"] == 0.5


def test_objectives() -> None:
    assert parse_objectives("ttft:500 itl:50,e2e:1e3") == {"ttft": 500.0, "itl": 50.0, "e2e": 1000.0}
    assert parse_objectives("") == {}
    for text in ("ttft", "first:5", "ttft:soon", "ttft:0", "ttft:-1", "ttft:nan"):
        with pytest.raises(ValueError, match=text.partition(":")[0]):
            parse_objectives(text)


def test_a_sweep_on_a_server_whose_times_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with known(steady(0.1, 0.02)) as server:
        main(
            server.url, rate="20,40", requests=20, input_len=12, output_len=6, goodput="ttft:5000",
            out=str(tmp_path / "o"), plot=str(tmp_path / "p"), api_key="secret", fields={"top_p": 0.5}, warmup=1,
        )  # fmt: skip
        assert len(server.bodies) == 2 * 21
        sent = server.bodies[-1]
        assert (sent["model"], sent["max_tokens"], sent["top_p"], sent["ignore_eos"]) == ("known", 6, 0.5, True)
        assert {len(body["prompt"]) for body in server.bodies} == {12}
        assert len({tuple(body["prompt"]) for body in server.bodies}) == 2 * 21, "a prefix cache would know some"
    figures = json.loads((tmp_path / "o").read_text())["figures"]
    for row, rate in zip(figures["rows"], (20, 40), strict=True):
        assert (row["who"], row["rate"], row["failed"], row["output_tokens"]) == ("ours", str(rate), 0, 120)
        # 20 requests in 20 / rate seconds, and the last takes 0.2 s: never sooner.
        assert 20 / rate + 0.2 <= row["duration_s"] < 20 / rate + 2
        assert 100 <= row["ttft_ms"]["p50"] < 200
        assert 15 < row["itl_ms"]["p50"] < 30
        assert 200 <= row["e2e_ms"]["p50"] < 400
        assert row["goodput"]["share"] == 1.0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p.svg").read_text()
    out = capsys.readouterr().out
    assert "| ours |   20 |" in out
    assert "secret" not in out + (tmp_path / "o").read_text()


def test_a_slow_answer_holds_up_nobody(tmp_path: Path) -> None:
    """Arrivals are open-loop: with 0.3 s each, 20 a second overlap, unless as many as may run are said."""
    with known(steady(0.3, 0)) as server:
        for limit, peak in ((0, 6), (2, 2)):
            main(server.url, rate=20, requests=10, output_len=1, max_concurrency=limit, out=str(tmp_path / "o"))
            (row,) = json.loads((tmp_path / "o").read_text())["figures"]["rows"]
            assert row["peak_concurrency"] >= peak if limit == 0 else row["peak_concurrency"] <= peak
            assert row["ttft_ms"]["p50"] < 600  # waiting for one's turn is not the server's


def test_a_peer_takes_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with known(steady(0.05, 0.01)) as ours, known(steady(0.1, 0.01)) as peer:
        main(ours.url, against=peer.url, pairs=2, rate=50, requests=10, output_len=4, out=str(tmp_path / "o"), warmup=0)
    figures = json.loads((tmp_path / "o").read_text())["figures"]
    assert [(row["pair"], row["who"]) for row in figures["rows"]] == [
        (0, "ours"),
        (0, "peer"),
        (1, "peer"),
        (1, "ours"),
    ]
    found = {one["figure"]: one for one in figures["ratios"]}
    assert 0.4 < found["TTFT p50"]["ratio"] < 0.75
    assert len(found["TTFT p50"]["ratios"]) == 2
    assert "medians over 2 pairs" in capsys.readouterr().out


def test_ratios_are_of_pairs() -> None:
    values = [
        ("ours", 0, 10.0),
        ("peer", 0, 5.0),
        ("peer", 1, 40.0),
        ("ours", 1, 20.0),
        ("ours", 2, 9.0),
        ("peer", 2, 9.0),
    ]
    rows = [{"who": who, "pair": pair, "rate": "1", "output_tokens_per_s": value} for who, pair, value in values]
    (one,) = ratios(rows)
    assert (one["ratio"], one["ratios"], one["ours"], one["peer"]) == (1.0, [2.0, 0.5, 1.0], 10.0, 9.0)


def test_curves_are_medians_of_runs() -> None:
    rows = [
        {"who": "ours", "rate": rate, "output_tokens_per_s": speed, "ttft_ms": {"p50": ms}}
        for rate, speed, ms in (("2", 20.0, 5.0), ("1", 10.0, 3.0), ("2", 22.0, 9.0), ("2", 21.0, 6.0))
    ]
    assert curve(rows, "ours", "ttft_ms", "p50") == ([10.0, 21.0], [3.0, 6.0])


async def _refuses(body: dict[str, Any], say: Conversation) -> None:
    await say.raw(b"HTTP/1.1 404 No\r\nContent-Length: 7\r\n\r\nno such")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": "soon"}, "soon"), ({"rate": -1}, "rate"), ({"rate": 0}, "of a trace"), ({"requests": 0}, "requests"),
        ({"goodput": "first:1"}, "first:1"), ({"endpoint": "chat"}, "tokenizer"), ({"endpoint": "x"}, "endpoint"),
        ({"fields": "[1]"}, "JSON object"), ({"trace": "nowhere.csv"}, "nowhere.csv"),
        ({"tokenizer": "nowhere"}, "nowhere"), ({"start": "serve"}, "{port}"), ({"start": "/no {port}"}, "/no"),
        ({"start": "false {port}"}, "status 1"), ({"url": "nowhere"}, "no URL"), ({}, "404: no such"),
        ({"url": "http://127.0.0.1:9"}, "nobody answers"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with known(_refuses) as server, pytest.raises(ConfigError) as raised:
        main(**{"url": server.url, "requests": 2, "out": str(tmp_path / "o"), **options})
    assert said in str(raised.value)
    assert not (tmp_path / "o").exists()
