"""The quantised weights of a checkpoint on their way into a network: a rank reads its slices of their parts.

Scales of `wo` and `w2`, which are cut along their inputs, are of whole rows: all ranks have them, and more ranks
compute the same function. In int4 a slice may begin or end within a group of inputs: then the rank's groups are the
largest of 64 and 32 that fit, each with the scale of the group that it comes from; where none fits the slice is
widened to the network's type. Either way its numbers are those of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import nn

from tpserve.model.checkpoint import CheckpointError
from tpserve.model.llama import Llama
from tpserve.model.plan import Share
from tpserve.model.quantized import Float8Linear, Int4Linear, Int8Linear
from tpserve.model.quantized_format import GROUPS, Format, finer_group, format_of

_NUMBERS = 16 << 20  # looked at together

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Matrix:
    """One weight: how it is stored, the rank's slice of it along `dim`, and what is read of its parts."""

    form: Format
    slice: tuple[int, int, int] | None
    parts: dict[str, torch.Tensor]


class QuantizedWeights:
    """Takes the linear layers that are stored with fewer bits out of a network; puts others in when they are read.

    Args:
        model: on the meta device, not cut yet.
        scheme: of the checkpoint.
        share: this rank's.
        device: where the weights go.

    Attributes:
        stored: shape and type of every whole part, by name.
        replaced: names of the weights that the checkpoint does not have therefore.
    """

    def __init__(self, model: Llama, scheme: str, share: Share, device: torch.device) -> None:
        self.stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.replaced: list[str] = []
        self._model, self._matrices = model, dict[str, _Matrix]()
        for name, weight in list(model.named_parameters()):
            form = format_of(name, tuple(weight.shape), scheme)
            if form is None:
                continue
            owner = name.removesuffix(".weight")
            place = share.of(name, model.args.head_dim)
            matrix = _Matrix(form, place, {})
            for part, (shape, dtype) in form.parts(tuple(weight.shape)).items():
                self.stored[f"{owner}.{part}"] = shape, dtype
                slab = None if place is None else form.slab(part, *place)
                sizes = [slab[2] - slab[1] if slab and slab[0] == d else size for d, size in enumerate(shape)]
                matrix.parts[part] = torch.empty(sizes, dtype=dtype, device=device)
            self._matrices[owner] = matrix
            self.replaced.append(name)
            parent, _, child = owner.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is to be read, by name."""
        return {f"{owner}.{part}": t for owner, matrix in self._matrices.items() for part, t in matrix.parts.items()}

    def place(self, name: str) -> tuple[int, int, int] | None:
        """Where this rank's slice of a part lies: (dimension, first, end); None: it is all of it."""
        owner, _, part = name.rpartition(".")
        matrix = self._matrices[owner]
        return None if matrix.slice is None else matrix.form.slab(part, *matrix.slice)

    @torch.no_grad()
    def put_in(self, dtype: torch.dtype) -> None:
        """Makes layers of what was read.

        Args:
            dtype: of the activations.

        Raises:
            CheckpointError: a float8 is not a number, which some products would take for one.
        """
        widened = []
        for owner, matrix in self._matrices.items():
            if matrix.form.scheme == "fp8" and not _are_numbers(matrix.parts["q_NK"]):
                raise CheckpointError(f"{owner}.q_NK has values that are not numbers; convert the checkpoint again")
            layer = _layer(matrix, dtype)
            if isinstance(layer, nn.Linear):
                widened.append(owner)
            matrix.parts.clear()
            parent, _, child = owner.rpartition(".")
            setattr(self._model.get_submodule(parent), child, layer)
        if widened:
            logger.warning(
                "%d weights are widened: this rank's slice of %s begins or ends within %d inputs",
                len(widened), widened[0], GROUPS[-1],
            )  # fmt: skip


def _are_numbers(q_NK: torch.Tensor) -> bool:
    """Of float8_e4m3fn: its only NaN has all bits but the sign."""
    numbers = q_NK.view(torch.uint8).flatten()
    blocks = (numbers[begin : begin + _NUMBERS] for begin in range(0, len(numbers), _NUMBERS))
    return not any(bool((block & 0x7F).amax() == 0x7F) for block in blocks)


def _layer(matrix: _Matrix, dtype: torch.dtype) -> nn.Module:
    q_NK, scale = matrix.parts["q_NK"], matrix.parts[matrix.form.scale_name]
    if matrix.form.scheme == "int8":
        return Int8Linear.of(q_NK, scale)
    if matrix.form.scheme == "fp8":
        return Float8Linear.of(q_NK, scale)
    group = matrix.form.group
    if matrix.slice is None or matrix.slice[0] == 0:
        return Int4Linear.of(q_NK, scale, group, dtype)
    _, lo, hi = matrix.slice
    first = lo // group * group
    finer = finer_group(group, lo, hi)
    if finer is not None:
        own = scale.repeat_interleave(group // finer, 0)[(lo - first) // finer : (hi - first) // finer]
        return Int4Linear.of(q_NK, own.clone() if finer != group else scale, finer, dtype)
    begin = lo // 2 * 2
    weight_NK = matrix.form.dequantise(q_NK, scale, dtype, skip=begin - first)[:, lo - begin : hi - begin]
    layer = nn.Linear(hi - lo, weight_NK.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_NK.contiguous(), requires_grad=False)
    return layer
