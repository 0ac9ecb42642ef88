"""`--quantize`: what is written is what a rank would have made, and every rank gets its slices of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.shards import write_fairscale_checkpoint
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.open_any import open_any
from tpserve.convert.verify import Finding, verify
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.weights import open_weights
from tpserve.model.checkpoint import SCHEMES, CheckpointError, CheckpointInfo
from tpserve.model.loader import LoadedModel, load_model
from tpserve.model.parallel import TensorParallel
from tpserve.model.plan import shares
from tpserve.model.quantized import Float8Linear, Int4Linear, Int8Linear, quantize
from tpserve.model.quantized_format import Format, format_of

# Groups of 128 inputs, heads of 16: at 3 ranks `wo` is cut at 64 and 96, at 8 ranks every 16 inputs.
PARAMS = {"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 128, "norm_eps": 1e-5,
          "vocab_size": 90}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "in"
    write_fairscale_checkpoint(folder, PARAMS, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def made(source: Path) -> Make:
    """Converts once for each way."""

    def make(scheme: str | None, format: str = "dcp") -> Path:
        folder = source.parent / f"{scheme}-{format}"
        if not folder.exists():
            convert(source, folder, quantize=scheme, format=format, progress=False)
        return folder

    return make


def dequantised(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """This rank's weights in float32, by Meta's names."""
    found = {name: weight.float() for name, weight in loaded.model.named_parameters()}
    for name, module in loaded.model.named_modules():
        if isinstance(module, Int8Linear | Int4Linear | Float8Linear):
            found[f"{name}.weight"] = module.dequantized()
    return found


@pytest.mark.parametrize("format", ["dcp", "safetensors"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_numbers_are_those_that_are_made_at_load(made: Make, scheme: str, format: str) -> None:
    stored = load_model(made(scheme, format))
    assert stored.info.quantization == scheme
    at_load = load_model(made(None))
    quantize(at_load.model, scheme)
    ours, theirs = stored.model.state_dict(), at_load.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert "layers.1.feed_forward.w2.q_NK" in ours
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("tp", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_rank_has_its_slices_of_the_stored_numbers(made: Make, scheme: str, tp: int) -> None:
    folder, kinds = made(scheme, "safetensors" if tp == 3 else "dcp"), set[str]()
    source = open_any(folder)
    for rank, share in enumerate(shares(source.args, tp)):
        loaded = load_model(folder, tp=TensorParallel(rank, tp), dtype=torch.float32)
        ours, read = dequantised(loaded), 0
        for tensor in source.tensors:
            dim, lo, hi = share.of(tensor.name, source.args.head_dim) or (0, 0, tensor.shape[0])
            assert torch.equal(ours.pop(tensor.name), tensor.read(dim, lo, hi, torch.float32)), tensor.name
            form = format_of(tensor.name, tensor.shape, scheme)
            read += stored_bytes(form, tensor.shape, dim, lo, hi)
        assert not ours
        assert loaded.bytes_read == read
        wo = loaded.model.layers[0].attention.wo  # type: ignore[union-attr]
        kinds.add(f"{type(wo).__name__}-{wo.group if isinstance(wo, Int4Linear) else 0}")
    int4 = {2: {"Int4Linear-64"}, 3: {"Int4Linear-64", "Int4Linear-32"}, 4: {"Int4Linear-32"}, 8: {"Linear-0"}}
    others = {"int8": {"Int8Linear-0"}, "fp8": {"Float8Linear-0"}}
    assert kinds == (int4[tp] if scheme == "int4" else others[scheme])


def stored_bytes(form: Format | None, shape: tuple[int, ...], dim: int, lo: int, hi: int) -> int:
    """Of a slice, written out once more: bytes and groups that it only touches count in full."""
    other = shape[1 - dim] if len(shape) > 1 else 1
    if form is None:
        return 2 * (hi - lo) * other
    if form.group and dim == 1:
        return other * (hi - lo) // 2 + 8 * other * (-(-hi // form.group) - lo // form.group)
    if form.group:
        return (hi - lo) * other // 2 + 8 * (hi - lo) * other // form.group
    return (hi - lo) * other + 4 * (hi - lo if dim == 0 else other)


def test_rows_that_ranks_share_keep_the_scale_of_the_whole_row(made: Make) -> None:
    """The one difference to quantising at load: there, a rank scales by what it sees of a row of `wo` and `w2`."""
    tp = TensorParallel(1, 2)
    stored, at_load = load_model(made("int8"), tp=tp), load_model(made(None), tp=tp)
    quantize(at_load.model, "int8")
    ours, theirs = stored.model.state_dict(), at_load.model.state_dict()
    same = {name for name in theirs if torch.equal(ours[name], theirs[name])}
    cut = {f"layers.{i}.{part}.{kind}" for i in range(2) for part in ("attention.wo", "feed_forward.w2")
           for kind in ("q_NK", "scale_N")}  # fmt: skip
    assert theirs.keys() - same == cut
    assert all((ours[n] >= theirs[n]).all() for n in cut if n.endswith("scale_N"))


def test_in_bfloat16_int4_is_packed_for_torchs_product(made: Make) -> None:
    exact = open_any(made("int4"))
    wanted = {tensor.name: tensor.read(0, 0, tensor.shape[0], torch.float32) for tensor in exact.tensors}
    loaded = load_model(made("int4"), tp=TensorParallel(0, 3), dtype=torch.bfloat16)
    wo = loaded.model.layers[1].attention.wo  # type: ignore[union-attr]
    assert wo.packed
    assert wo.group == 64
    x = torch.randn(5, 64).bfloat16()
    expected = x.float() @ wanted["layers.1.attention.wo.weight"][:, :64].t()
    assert (wo(x).float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_folder_is_converted_again(made: Make, scheme: str, tmp_path: Path) -> None:
    again = convert(made(scheme), tmp_path / "again", format="safetensors", progress=False)
    for path in made(scheme, "safetensors").glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert CheckpointInfo.read(again).quantization == scheme
    wide = convert(made(scheme), tmp_path / "hf", format="hf", dtype="float32", progress=False)
    theirs = {tensor.name: tensor for tensor in open_any(wide).tensors}
    for tensor in open_any(made(scheme)).tensors:
        ours = tensor.read(0, 0, tensor.shape[0], torch.float32)
        assert torch.equal(ours, theirs[tensor.name].read(0, 0, tensor.shape[0], torch.float32)), tensor.name
        if len(tensor.shape) > 1:  # columns within a group and a byte
            assert torch.equal(tensor.read(1, 37, 101, torch.float32), ours[:, 37:101]), tensor.name


def test_it_is_much_smaller(made: Make) -> None:
    sizes = {s: sum(p.stat().st_size for p in made(s, "safetensors").glob("layers*")) for s in (None, *SCHEMES)}
    assert max(sizes["int8"], sizes["fp8"]) < 0.6 * sizes[None]
    assert sizes["int4"] < 0.37 * sizes[None]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify(made: Make, source: Path, scheme: str, tmp_path: Path) -> None:
    found: list[Finding] = []
    assert verify(made(scheme), source, 1, found.append), found
    assert any(f"quantised to {scheme}" in f.text for f in found)
    write_fairscale_checkpoint(tmp_path / "other", PARAMS, seed=1, dtype=torch.bfloat16)
    found.clear()
    assert not verify(made(scheme), tmp_path / "other", 1, found.append)
    assert any(not f.ok and "differs in" in f.text for f in found)


def test_what_is_refused(made: Make, source: Path, tmp_path: Path) -> None:
    for words, how in (
        (["--quantize int3", "fp8"], {"quantize": "int3"}),
        (["--quantize", "dcp and safetensors", "hf"], {"quantize": "int8", "format": "hf"}),
    ):
        with pytest.raises(ConvertError) as refused:
            convert(source, tmp_path / "out", progress=False, **how)  # type: ignore[arg-type]
        assert all(word in str(refused.value) for word in words)
    with pytest.raises(ConvertError, match="are int8 already"):
        convert(made("int8"), tmp_path / "out", quantize="int4", progress=False)
    with pytest.raises(ConfigError, match=r"quantization is fp8.*are int8 already"):
        open_weights(EngineConfig(checkpoint_dir=str(made("int8")), quantization="fp8"))
    assert open_weights(EngineConfig(checkpoint_dir=str(made("int8")), quantization="int8")) is None
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=1)
    shard = torch.load(tmp_path / "in" / "consolidated.00.pth", weights_only=True)
    shard["layers.1.feed_forward.w2.weight"][5, 7] = float("nan")
    torch.save(shard, tmp_path / "in" / "consolidated.00.pth")
    assert torch.isfinite(weights["layers.1.feed_forward.w2.weight"]).all()
    with pytest.raises(ConvertError, match=r"layers\.1\.feed_forward\.w2\.weight.*not finite"):
        convert(tmp_path / "in", tmp_path / "out", quantize="int8", progress=False)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_stored_float8_that_is_no_number_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte: int
) -> None:
    quantise = Format.quantise

    def with_one(form: Format, weight_NK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q_NK = quantise(form, weight_NK, scale)
        q_NK.view(torch.uint8)[-1, 3] = byte
        return q_NK

    with monkeypatch.context() as patch:
        patch.setattr(Format, "quantise", with_one)
        folder = convert(source, tmp_path / "out", quantize="fp8", progress=False)
    with pytest.raises(CheckpointError, match=r"layers\.0\.\w+\.w\w\.q_NK has values that are not numbers"):
        load_model(folder)


@pytest.mark.parametrize(("scheme", "message"), [("int4", "lacks|is torch"), ("int2", "int2"), (None, "lacks")])
def test_a_model_file_that_says_otherwise(made: Make, tmp_path: Path, scheme: str | None, message: str) -> None:
    folder = convert(made("int8"), tmp_path / "folder", progress=False)
    fields = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(fields | {"quantization": scheme}))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    with pytest.raises(CheckpointError, match=message + "|manifest"):
        open_any(folder)


def test_a_damaged_part_is_named(made: Make, tmp_path: Path) -> None:
    folder = convert(made("int8"), tmp_path / "folder", format="safetensors", progress=False)
    path = folder / "layers.1.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.safetensors is damaged.*CRC-32 of layers\.1\.feed_forward\.w\d\.q_NK"
    ):
        load_model(folder)
