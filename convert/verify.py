"""Whether a checkpoint is what it should be: sums, shapes, finite weights, and the logits of a probe text."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from tpserve.convert.checklist import read_checklist, verify_checklist
from tpserve.convert.errors import ConvertError
from tpserve.convert.kinds import Kind
from tpserve.convert.manifest import verify_manifest
from tpserve.convert.open_any import open_any
from tpserve.convert.probe import model_logits, plain_logits, probe_tokens
from tpserve.convert.quantize import rounded_like
from tpserve.convert.source import Source
from tpserve.convert.weights import Weight, read_slab, row_blocks
from tpserve.model.checkpoint import MANIFEST_FILE, CheckpointError
from tpserve.model.loader import load_model
from tpserve.model.parallel import TensorParallel

# Of the largest logit: float32 sums in another order differ by less, a wrong weight by much more.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found: whether it is as it should be, and in words."""

    ok: bool
    text: str


def verify(
    checkpoint: Path,
    against: Path | None = None,
    tp: int = 1,
    on_finding: Callable[[Finding], object] = lambda finding: None,
) -> bool:
    """Checks a checkpoint of any kind; True: all is well.

    The probe computes in float32 on the CPU: memory for four bytes a parameter is needed.

    Args:
        checkpoint: a folder, or a .gguf file.
        against: the checkpoint that it was made from; its weights are compared rounded to this one's dtype, and
            quantised as this one's are.
        tp: ranks of the group that is compared with one rank.
        on_finding: is told of every check when it is done.

    Raises:
        ConvertError: `checkpoint` or `against` is no checkpoint at all.
        ValueError: the heads cannot be split over so many ranks.
    """
    all_ok = True

    def tell(ok: bool, text: str) -> None:
        nonlocal all_ok
        all_ok = all_ok and ok
        on_finding(Finding(ok, text))

    def attempt(check: Callable[[], tuple[bool, str]]) -> None:
        try:
            tell(*check())
        except CheckpointError as e:  # ConvertError, too
            tell(False, str(e))

    original = open_any(against) if against is not None else None
    attempt(lambda: _sums(checkpoint))
    try:
        source = open_any(checkpoint)
    except ConvertError as e:
        if all_ok:
            raise
        tell(False, str(e))
        return False
    fewer = "" if source.info.quantization is None else f", the layers' matrices {source.info.quantization}"
    tell(True, f"shapes: {len(source.tensors)} weights of {source.args.n_layers} layers, {source.info.dtype}{fewer}")
    attempt(lambda: _finite(source))
    if original is not None:
        compared = original
        attempt(lambda: _same_args(source, compared))
        if source.args == compared.args:
            attempt(lambda: _same_weights(source, compared))
    if not all_ok and (original is None or source.args != original.args):
        return False
    tokens = probe_tokens(source.args.vocab_size)
    alone: list[torch.Tensor] = []

    def one_rank() -> tuple[bool, str]:
        alone.append(_loaded_logits(checkpoint, source, TensorParallel()))
        if source.info.quantization is not None:  # the source's weights have given theirs, number by number
            plain = plain_logits(source.args, source.tensors, tokens)
            return _compare("those of its dequantised weights", "one rank", alone[0], plain)
        plain = plain_logits(source.args, (original or source).tensors, tokens, source.dtype)
        return _compare("the source's" if original else "those of its whole weights", "one rank", alone[0], plain)

    def group() -> tuple[bool, str]:
        return _compare("one rank's", f"{tp} ranks", _group_logits(checkpoint, tp), alone[0])

    attempt(one_rank)
    if tp > 1 and alone:
        attempt(group)
    return all_ok


def _sums(path: Path) -> tuple[bool, str]:
    if path.is_dir() and (path / MANIFEST_FILE).exists():
        verify_manifest(path)
        return True, f"sums: every file is the one of {MANIFEST_FILE} (SHA-256)"
    sums = read_checklist(path) if path.is_dir() else {}
    if not sums:
        return True, "sums: none came with it"
    verify_checklist(sums)
    return True, "sums: every file is the one of checklist.chk (MD5)"


def _finite(source: Source) -> tuple[bool, str]:
    bad: list[str] = []
    for tensor in source.tensors:
        count, first, row = 0, "", 0
        for block in row_blocks(tensor, source.dtype):
            finite = torch.isfinite(block)
            if not finite.all():
                where = (~finite).nonzero()
                index = [int(i) for i in where[0]]
                first = first or str([row + index[0], *index[1:]])
                count += len(where)
            row += block.shape[0]
        if count:
            bad.append(f"{tensor.name} has {count:,} values that are not finite, the first at {first}")
    return not bad, "weights: " + (_few(bad) if bad else "all finite")


def _same_args(a: Source, b: Source) -> tuple[bool, str]:
    ours, theirs = a.args.to_dict(), b.args.to_dict()
    differ = [f"{name} is {ours[name]}, the source says {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    return not differ, "numbers: " + (_few(differ) if differ else "the source's")


def _same_weights(a: Source, b: Source) -> tuple[bool, str]:
    theirs: dict[str, Weight] = {tensor.name: tensor for tensor in b.tensors}
    scheme, differ = a.info.quantization, []
    copied = scheme is not None and scheme == b.info.quantization  # its numbers, not what would be made of them
    for tensor in a.tensors:
        count, largest, where, row = 0, 0.0, "", 0
        for ours in row_blocks(tensor, a.dtype if scheme is None else torch.float32):
            whole = read_slab(theirs[tensor.name], 0, row, row + ours.shape[0], ours.dtype if copied else a.dtype)
            other = whole if copied else rounded_like(whole, tensor.name, tensor.shape, scheme).to(ours.dtype)
            if scheme == "int4" and not copied and not torch.equal(ours, other):
                older = rounded_like(whole, tensor.name, tensor.shape, scheme, older=True).to(ours.dtype)
                other = older if torch.equal(ours, older) else other
            if not torch.equal(ours, other):
                distance = (ours.float() - other.float()).abs().nan_to_num(nan=float("inf"))
                count += int((distance > 0).sum())
                if float(distance.max()) > largest:
                    largest = float(distance.max())
                    index = [int(i) for i in (distance == largest).nonzero()[0]]
                    where = str([row + index[0], *index[1:]])
            row += ours.shape[0]
        if count:
            differ.append(f"{tensor.name} differs in {count:,} values, most at {where}: by {largest:.3g}")
    rounded = "" if a.dtype == b.dtype else f", rounded to {a.info.dtype}"
    if scheme is not None and scheme != b.info.quantization:
        rounded += f", quantised to {scheme}"
    return not differ, "weights: " + (_few(differ) if differ else f"the source's, bit for bit{rounded}")


def _few(lines: list[str]) -> str:
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def _compare(whose: str, which: str, found: torch.Tensor, expected: torch.Tensor) -> tuple[bool, str]:
    """Logits [T, V] against each other."""
    if not torch.isfinite(found).all():
        return False, f"logits: {which} gave values that are not finite"
    distance = (found - expected).abs().nan_to_num(nan=float("inf"))
    largest, scale = float(distance.max()), max(1.0, float(expected.abs().max()))
    token, entry = divmod(int(distance.argmax()), distance.shape[1])
    verb = "differ" if which.endswith("s") else "differs"
    says = f"logits: {which} {verb} from {whose} by at most {largest:.2e} (they reach {scale:.1f})"
    return largest <= TOLERANCE * scale, f"{says}, at token {token}, entry {entry}"


def _loaded_logits(checkpoint: Path, source: Source, tp: TensorParallel) -> torch.Tensor:
    """What the loader makes of it, as the server does, but in float32."""
    tokens = probe_tokens(source.args.vocab_size)
    loaded = load_model(
        checkpoint,
        tp=tp,
        dtype=torch.float32,
        max_seq_len=len(tokens),
        source=None if source.kind is Kind.TPSERVE else source,
    )
    return model_logits(loaded.model, tokens)


def _group_logits(checkpoint: Path, tp: int) -> torch.Tensor:
    """The same of a group of processes.

    Raises:
        ConvertError: one of them failed; the message says how.
    """
    with tempfile.TemporaryDirectory(prefix="tpserve-verify-") as folder:
        try:
            spawn(_rank, (tp, checkpoint, Path(folder)), nprocs=tp, daemon=True)  # type: ignore[no-untyped-call]
        except (ProcessRaisedException, ProcessExitedException) as e:
            said = [line for line in str(e).splitlines() if line.strip()]
            raise ConvertError(f"a group of {tp} ranks failed: {said[-1] if said else e}") from None
        logits: torch.Tensor = torch.load(Path(folder) / "logits", weights_only=True)
        return logits


def _rank(rank: int, tp: int, checkpoint: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=tp)
    logits = _loaded_logits(checkpoint, open_any(checkpoint), TensorParallel.from_world())
    if rank == 0:
        torch.save(logits, folder / "logits")
    dist.barrier()
    dist.destroy_process_group()
