"""What the plan of a quantised checkpoint adds: which slices cannot keep their groups of inputs."""

from __future__ import annotations

from tpserve.model.args import ModelArgs
from tpserve.model.plan import shares
from tpserve.model.quantized_format import finer_group, plain_format


def show_quantization(args: ModelArgs, scheme: str, tp_size: int) -> str:
    """One line a matrix that is cut along its inputs, or one for all.

    Args:
        args: the network's numbers.
        scheme: of the checkpoint.
        tp_size: ranks.

    Raises:
        ValueError: see `shares`.
    """
    lines = [f"the layers' matrices are {scheme}"]
    cuts = {
        "wo": (args.n_heads * args.head_dim, [[n * args.head_dim for n in s.heads] for s in shares(args, tp_size)]),
        "w2": (args.ffn_hidden_dim, [list(s.ffn) for s in shares(args, tp_size)]),
    }
    for name, (inputs, slices) in cuts.items():
        form = plain_format(scheme, inputs)
        if form is None:
            lines.append(f"{name} is not: no size of group divides its {inputs} inputs")
        elif form.group:
            kept = [finer_group(form.group, lo, hi) for lo, hi in slices]
            finest = ", ".join(str(size) for size in sorted({k for k in kept if k}, reverse=True)) or "none"
            wide = sum(k is None for k in kept)
            more = f"; {wide} ranks widen it, their slices fit no group" if wide else ""
            lines.append(f"{name} has groups of {form.group} inputs, the ranks' slices of it: {finest}{more}")
    return "\n".join(lines)
