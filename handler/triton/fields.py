"""TensorRT-LLM's and FasterTransformer's fields, read into what the engine is to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.requests import URGENCY_FIELDS, Prompt, read_urgency
from tpserve.engine.sampling_fields import ALIASES, SAMPLING_FIELDS
from tpserve.handler.open_request import Input
from tpserve.handler.triton.words import biases, stop_words, word_ids

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend

# What the engine has no use for: it pads nothing, and prompts bring their BOS. `pad_id` fills the tensors of infer.
_WITHOUT_EFFECT = ("pad_id", "start_id")
# What would change the answer, or be missing from it. Values that say "no" pass: clients send all that they know.
_NOT_SERVED = (
    "return_context_logits", "return_generation_logits", "return_perf_metrics", "return_kv_cache_reuse_stats",
    "return_encoder_output", "prompt_embedding_table", "prompt_vocab_size", "prompt_table_extra_ids", "prompt_tasks",
    "prompt_learning_task_name_ids", "request_prompt_embedding", "request_prompt_lengths", "request_prompt_type",
    "lora_task_id", "lora_weights", "lora_config", "use_draft_model", "num_draft_tokens", "draft_input_ids",
    "draft_logits", "decoder_text_input", "decoder_input_ids", "image_input", "image_url_input",
    "image_bytes_input", "video_bytes_input", "mrope_rotary_cos_sin", "mrope_position_deltas", "skip_cross_attn_blocks",
    "cross_attention_mask", "beam_search_diversity_rate", "memory_len", "guided_decoding_guide",
    "guided_decoding_guide_type", "no_repeat_ngram_size", "num_input_tokens", "retention",
)  # fmt: skip
_OWN = ("text_input", "input_ids", "input_lengths", "num_return_sequences", "exclude_input_in_output",
        "embedding_bias_words", "embedding_bias_weights")  # fmt: skip
KNOWN_FIELDS = (*_OWN, *SAMPLING_FIELDS, *ALIASES, *URGENCY_FIELDS, *_WITHOUT_EFFECT)
# Those that are lists; of all others a list of one is its element, however deep: Triton's tensors have dimensions.
_LISTS = frozenset({
    "input_ids", "bad_words", "bad_words_list", "stop", "stop_words", "stop_words_list", "embedding_bias",
    "logit_bias", "embedding_bias_words", "embedding_bias_weights", "guided_choice",
})  # fmt: skip
_WORDS = ("stop", "stop_words", "stop_words_list")
_BAD_WORDS = ("bad_words", "bad_words_list")
LOG_PROBS = ("return_log_probs", "is_return_log_probs", "output_log_probs", "logprobs")


@dataclasses.dataclass(frozen=True)
class Inference:
    """One prompt and what to do with it.

    Attributes:
        input: for the engine.
        with_prompt: `output_ids` begins with the prompt's.
        pad_id: what fills rows of tensors that are shorter than others.
    """

    input: Input
    priority: int = 0
    timeout_s: float | None = None
    with_prompt: bool = False
    pad_id: int = 0


def unwrap(name: str, value: Any) -> Any:
    """A value without dimensions of one that its field does not have."""
    while isinstance(value, list) and len(value) == 1 and (name not in _LISTS or isinstance(value[0], list)):
        value = value[0]
    return value


def read_inference(given: Mapping[str, Any], backend: Backend) -> Inference:
    """Reads an object of `KNOWN_FIELDS`.

    Raises:
        RequestError: names the field.
    """
    given = {name: unwrap(name, value) for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in _NOT_SERVED:
            if value not in (False, 0, "", []):
                raise RequestError(f"{name} is not served; leave it out", field=name)
        elif name not in KNOWN_FIELDS:
            raise fields.unknown_field(name, KNOWN_FIELDS)
    pad_id = fields.integer("pad_id", given.get("pad_id", 0))
    if not -(2**31) <= pad_id < 2**31:
        raise RequestError(f"pad_id must fit into 32 bits, got {pad_id}", field="pad_id")
    prompt = _prompt(given)
    is_text = isinstance(prompt.value, str)
    excluded = given.get("exclude_input_in_output", is_text)
    with_prompt = not fields.boolean("exclude_input_in_output", excluded)
    sampling = _sampling(given, backend)
    if with_prompt and is_text:
        sampling["echo"] = True
    params = backend.reader.params(sampling, backend.defaults.params, backend.defaults.max_new_tokens_cap)
    priority, timeout_s = read_urgency(given)
    text = prompt.value if isinstance(prompt.value, str) else None
    return Inference(Input(backend.reader.encode(prompt), params, text), priority, timeout_s, with_prompt, pad_id)


def _prompt(given: Mapping[str, Any]) -> Prompt:
    if "input_ids" not in given:
        if "input_lengths" in given:
            raise RequestError("input_lengths goes with input_ids, which the request lacks", field="input_lengths")
        if "text_input" not in given:
            raise RequestError("the request has no text_input", field="text_input")
        text = given["text_input"]
        if isinstance(text, list) and len(text) > 1:
            raise RequestError("text_input must be one text; several are sent by infer, or one by one", "text_input")
        return Prompt("text_input", fields.string("text_input", text))
    if "text_input" in given:
        raise RequestError("the request has both text_input and input_ids; send one of them", field="input_ids")
    value = given["input_ids"]
    ids = fields.token_ids("input_ids", [value] if isinstance(value, int) else value)
    length = fields.integer("input_lengths", given.get("input_lengths", len(ids)))
    if not 0 <= length <= len(ids):
        raise RequestError(f"input_lengths is {length}, input_ids holds {len(ids)} tokens", field="input_lengths")
    if not length:
        raise RequestError("input_ids is empty", field="input_ids")
    return Prompt("input_ids", ids[:length])


def _sampling(given: Mapping[str, Any], backend: Backend) -> dict[str, Any]:
    """The fields that choose tokens, in the engine's meaning."""
    sampling = {name: value for name, value in given.items() if name in SAMPLING_FIELDS or name in ALIASES}
    tokenizer = backend.tokenizer
    ends: list[int] = []
    for name in _WORDS:
        if name in sampling:
            sampling[name], single = stop_words(name, sampling[name], tokenizer)
            ends += single
    if ends:
        name = "end_id" if "end_id" in sampling else "stop_token_ids"
        sampling[name] = [*fields.one_or_more_ids(name, sampling.get(name, [])), *ends]
    for name in _BAD_WORDS:
        if name in sampling:
            sampling[name] = word_ids(name, sampling[name])
    if "embedding_bias_words" in given or "embedding_bias_weights" in given:
        for name in ("embedding_bias", "logit_bias"):
            if name in given:
                raise RequestError(f"the request has both {name} and embedding_bias_words; send one of them", name)
        sampling["logit_bias"] = biases(
            given.get("embedding_bias_words", []), given.get("embedding_bias_weights", []), tokenizer
        )
    if any(sampling.get(name) not in (None, False) for name in LOG_PROBS) and "return_cum_log_probs" not in sampling:
        sampling.setdefault("cum_log_probs", True)
    _nuclei(sampling)
    _beams(sampling, given)
    return sampling


def _nuclei(sampling: dict[str, Any]) -> None:
    """There, a top_p of 0 turns it off; together with a top_k of 0 it means the most probable token."""
    for name in ("top_p", "runtime_top_p"):
        if name in sampling and sampling[name] == 0 and not isinstance(sampling[name], bool):
            del sampling[name]
            if not sampling.get("top_k", sampling.get("runtime_top_k", 0)):
                sampling["temperature"] = 0.0


def _beams(sampling: dict[str, Any], given: Mapping[str, Any]) -> None:
    """There, a search answers with all its beams, and a temperature of 1 is none."""
    answers = given.get("num_return_sequences")
    width = sampling.get("beam_width", 1)
    if answers is not None:
        if "n" in sampling:
            raise RequestError("the request has both n and num_return_sequences; send one of them", "n")
        sampling["n"] = fields.integer("num_return_sequences", answers)
        if not 1 <= answers <= 128:
            raise RequestError(f"num_return_sequences must be from 1 to 128, got {answers}", "num_return_sequences")
    if not isinstance(width, int) or width <= 1:
        return
    sampling.setdefault("n", width)
    if answers is not None and answers > width:
        raise RequestError(f"num_return_sequences must be at most beam_width ({width}), got {answers}",
                           "num_return_sequences")  # fmt: skip
    if sampling.get("temperature") == 1:
        del sampling["temperature"]
