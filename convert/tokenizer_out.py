"""A tokenizer's files as `transformers` wants them beside Hugging Face's weights."""

from __future__ import annotations

import json
from pathlib import Path

from tpserve.convert.llama3_ranks import ranks_to_json, read_ranks
from tpserve.convert.tokenizer import GENERATION_CONFIG, TOKENIZER_CONFIG, TOKENIZER_JSON, Tokenizer
from tpserve.convert.write_hf import tokenizer_config


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Contents by file name, without `generation_config.json`, which the weights' writer writes.

    Llama-3's ranks become a `tokenizer.json`: `transformers` would need further packages for them.
    """
    files = {name: content for name, content in tokenizer.files.items() if name != GENERATION_CONFIG}
    if tokenizer.kind == "llama3":
        content = ranks_to_json(read_ranks(Path(tokenizer.name), files.pop(tokenizer.name)))
        names = {i: name for name, i in tokenizer.controls.items()}
        assert tokenizer.bos_token_id is not None
        assert tokenizer.eos_token_id is not None
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names[tokenizer.bos_token_id],
            "eos_token": names[tokenizer.eos_token_id],
            "clean_up_tokenization_spaces": False,
        }
        files[TOKENIZER_JSON] = json.dumps(content, ensure_ascii=False).encode()
        files.setdefault(TOKENIZER_CONFIG, (json.dumps(settings, indent=2) + "\n").encode())
    elif tokenizer.kind == "sentencepiece" and TOKENIZER_CONFIG not in files:
        files[TOKENIZER_CONFIG] = tokenizer_config(tokenizer.data)
    return files
