"""`tpserve eval`: summarize, perplexity; the functions are the bench room's own."""

from __future__ import annotations

from collections.abc import Callable

import fire

_TEXTS = ("checkpoint", "documents", "document_field", "reference_field", "prompt", "chat_template", "text",
          "separator", "field", "dtype", "device", "quantization", "kv_cache_dtype", "json")  # fmt: skip


def commands() -> dict[str, Callable[..., None]]:
    """What stands behind `tpserve eval`, for fire."""
    from tpserve.bench.eval_perplexity import perplexity
    from tpserve.bench.eval_summarize import summarize

    texts_stay_texts = fire.decorators.SetParseFns(**dict.fromkeys(_TEXTS, str))
    return {"summarize": texts_stay_texts(summarize), "perplexity": texts_stay_texts(perplexity)}
