"""`tpserve verify`: what it says of sound checkpoints, and of every way in which one can be wrong."""

from __future__ import annotations

import json
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from tests.convert.test_outputs import PARAMS
from tests.helpers.shards import write_fairscale_checkpoint
from tpserve.cli.main import main
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.probe import PROBE_TOKENS, probe_tokens
from tpserve.convert.verify import verify
from tpserve.model.quantized_format import Format


def said(checkpoint: Path, against: Path | None = None, tp: int = 1) -> tuple[bool, list[str], list[str]]:
    """The verdict, what was good and what was not."""
    good: list[str] = []
    bad: list[str] = []
    ok = verify(checkpoint, against, tp, lambda found: (good if found.ok else bad).append(found.text))
    assert ok == (not bad)
    return ok, good, bad


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=2)
    return tmp_path / "in"


def change(source: Path, name: str, value: float) -> Path:
    """The source with one value of a weight of its second shard changed; a copy."""
    other = source.parent / "other"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    shard = torch.load(other / "consolidated.01.pth", weights_only=True)
    shard[name][3, 5] = value
    torch.save(shard, other / "consolidated.01.pth")
    return other


@pytest.mark.parametrize("format", ["dcp", "safetensors", "hf", "meta"])
def test_every_form_against_its_source(source: Path, tmp_path: Path, format: str) -> None:
    out = convert(source, tmp_path / "out", format=format, progress=False)
    ok, good, bad = said(out, source)
    assert ok, bad
    assert [line.partition(":")[0] for line in good] == ["sums", "shapes", "weights", "numbers", "weights", "logits"]
    assert good[4] == "weights: the source's, bit for bit"


@pytest.mark.parametrize("older", [False, True])
def test_int4_against_its_source_and_against_its_copy(
    source: Path, tmp_path: Path, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantising what came out of int4 once more would give other numbers; older folders were scaled otherwise."""
    with monkeypatch.context() as patch:
        patch.setattr(Format, "scale_of", partialmethod(Format.scale_of, older=older))
        made = convert(source, tmp_path / "int4", quantize="int4", dtype="bfloat16", progress=False)
    copy = convert(made, tmp_path / "copy", format="safetensors", progress=False)
    for folder, against in ((made, source), (copy, made), (copy, source)):
        ok, _, bad = said(folder, against)
        assert ok, bad
    other = change(source, "layers.1.feed_forward.w2.weight", 3.0)
    changed = convert(other, tmp_path / "changed", quantize="int4", dtype="bfloat16", progress=False)
    for against in (other,) if older else (other, changed):  # the other way, all numbers differ
        ok, _, bad = said(made, against)
        assert not ok
        assert "layers.1.feed_forward.w2.weight differs" in bad[0]


def test_rounded_weights_are_compared_rounded(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out", dtype="bf16", progress=False)
    ok, good, bad = said(out, source)
    assert ok, bad
    assert "weights: the source's, bit for bit, rounded to bfloat16" in good


def test_a_weight_that_is_another(source: Path, tmp_path: Path) -> None:
    out = convert(change(source, "layers.1.feed_forward.w2.weight", 9.0), tmp_path / "out", progress=False)
    ok, _, bad = said(out, source)
    assert not ok
    # Row 3, column 5 of the second half of 176.
    assert bad[0].startswith("weights: layers.1.feed_forward.w2.weight differs in 1 values, most at [3, 93]: by ")
    assert bad[1].startswith("logits: one rank differs from the source's by at most ")
    assert len(bad) == 2


def test_values_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    broken = change(source, "layers.0.attention.wq.weight", float("nan"))
    ok, _, bad = said(convert(broken, tmp_path / "out", progress=False))
    assert not ok
    # The second half of 64 rows begins at 32.
    assert bad == ["weights: layers.0.attention.wq.weight has 1 values that are not finite, the first at [35, 5]"]


def test_numbers_that_are_others(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out", progress=False)
    other = source.parent / "other"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "params.json").write_text(json.dumps(PARAMS | {"norm_eps": 1e-6, "rope_theta": 5e5}))
    ok, _, bad = said(out, other)
    assert not ok
    assert bad == ["numbers: norm_eps is 1e-05, the source says 1e-06; rope_theta is 10000.0, the source says 500000.0"]


@pytest.mark.parametrize("format", ["dcp", "safetensors"])
def test_a_damaged_file(source: Path, tmp_path: Path, format: str) -> None:
    out = convert(source, tmp_path / "out", format=format, progress=False)
    path = next(out.glob("layers.1.*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ok, _, bad = said(out)
    assert not ok
    assert f"{path} has SHA-256" in bad[0]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="holds no checkpoint"):
        verify(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["tpserve", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_the_command_with_a_group_of_ranks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(source, tmp_path / "out", format="safetensors", progress=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(monkeypatch, "verify", out, "--against", source, "--tp", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("ok  logits: 2 ranks differ from one rank's by at most")
    assert all(line.startswith("ok  ") for line in lines)
    (out / "norm.safetensors").write_bytes(b"x")
    assert run(monkeypatch, "verify", out) == 1
    assert capsys.readouterr().out.startswith("BAD ")
    assert run(monkeypatch, "verify", tmp_path / "nowhere") == 2


def test_the_probe_reaches_all_of_the_vocabulary() -> None:
    for size in (1, 40, 32000, 128256):
        tokens = probe_tokens(size)
        assert len(tokens) == PROBE_TOKENS
        assert (min(tokens), max(tokens)) == (0, size - 1)
