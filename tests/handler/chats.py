"""Templates that Hugging Face's models bring, a tokenizer with control tokens beside text, and messages."""

from __future__ import annotations

from typing import Any

from tests.handler.fakes import tokenizer
from tpserve.engine.text.chat_template import ChatTemplate
from tpserve.engine.text.jinja_template import JinjaTemplate

# Of meta-llama/Llama-2-7b-chat-hf, less the system prompt that it has itself.
HF_LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""".replace("%}\n", "%}")
HF_LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}
{% set content = bos_token + content %}{% endif %}
{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}""".replace("%}\n", "%}")


class ByteTokenizer:
    """As Llama 3's: text becomes bytes, and control tokens lie beside them."""

    NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    bos_id, eos_id, max_piece_chars = 256, 257, 1

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + list(text.encode()) + [self.eos_id] * eos

    def special_id(self, name: str) -> int | None:
        return 256 + self.NAMES.index(name) if name in self.NAMES else None

    def show(self, ids: list[int]) -> str:
        return "".join(chr(i) if i < 256 else self.NAMES[i - 256] for i in ids)


BYTES = ByteTokenizer()
LLAMA2 = ChatTemplate.load("llama2", tokenizer())


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def jinja(source: str, encoder: Any = BYTES) -> ChatTemplate:
    return ChatTemplate("file", JinjaTemplate(source, encoder), encoder.max_piece_chars)


USER = message("user", "once upon a time")
CHAT = [message("system", "be a dog"), message("user", "one"), message("assistant", "two"), message("user", "three")]
