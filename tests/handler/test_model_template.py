"""Which chat template a model is served with, and that dialogs of predictions go through it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from tests.handler.chats import LLAMA2, USER, jinja, message
from tests.handler.fakes import MAX_SEQ_LEN, FakeEngine, reader, tokenizer
from tests.text.byte_level import llama3_model
from tpserve.engine.errors import ConfigError
from tpserve.engine.requests import RequestReader
from tpserve.engine.text.chat import check_dialog, encode_dialog
from tpserve.engine.text.chat_template import ChatTemplate, default_template
from tpserve.engine.text.load import load_tokenizer
from tpserve.handler.backend import Backend
from tpserve.handler.config import HandlerConfig
from tpserve.handler.http import HttpRequest
from tpserve.handler.predictions import Defaults
from tpserve.handler.replies import Reply


def backend_with(template: ChatTemplate) -> Backend:
    return Backend(FakeEngine(), tokenizer(), reader(), Defaults(), threading.Event(), chat_template=template)


def test_dialogs_of_predictions_go_through_the_models_template() -> None:
    served = backend_with(jinja("<s>{{ messages[0].content }}", tokenizer()))
    opened = served.serve("r", HttpRequest(body=json.dumps({"dialog": [USER]}).encode()), threading.Event())
    assert not isinstance(opened, Reply)
    assert cast(FakeEngine, served.engine).submitted["r/0"][0] == tokenizer().encode(USER["content"], True, False)


def test_a_dialog_that_is_too_long_is_named_as_such() -> None:
    served = backend_with(jinja("{% for i in range(70) %}one{% endfor %}", tokenizer()))
    reply = served.serve("r", HttpRequest(body=json.dumps({"dialog": [USER]}).encode()), threading.Event())
    assert isinstance(reply, Reply)
    assert (reply.status, json.loads(reply.body)["error"]["field"]) == (400, "dialog")


def test_a_model_without_tokenizer_has_no_template() -> None:
    bare = Backend(FakeEngine(), None, RequestReader(None, 90, 64), Defaults(), threading.Event())
    assert bare.chat_template is None
    assert backend_with(LLAMA2).chat_template == LLAMA2.within(MAX_SEQ_LEN)


def configured(value: Any, folder: Path = Path()) -> HandlerConfig:
    return HandlerConfig.from_yaml({"handler": {"converted_ckpt_dir": "x", "chat_template": value}}, folder)


def test_the_configuration_names_the_template(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("<s>{{ messages[0].content }}")
    for value, name in ((None, "llama2"), ("llama2", "llama2"), ("own.jinja", "own.jinja")):
        template = configured(value, tmp_path).load_chat_template(tokenizer())
        assert template is not None
        assert template.name == name
    assert configured(None).load_chat_template(None) is None
    with pytest.raises(ConfigError, match="chat_template: this model has no tokenizer"):
        configured("llama2").load_chat_template(None)
    for wrong, said in (("llama4", "must be llama2"), (3, "must be llama2"), ("no.jinja", r"no\.jinja does not exist")):
        with pytest.raises(ConfigError, match=f"chat_template.*{said}"):
            configured(wrong, tmp_path)


def test_a_model_whose_operator_says_nothing(tmp_path: Path) -> None:
    sp, llama3 = tokenizer(), load_tokenizer(llama3_model())
    for encoder, name in ((sp, "llama2"), (llama3, "llama3")):
        template = default_template(encoder)
        assert template is not None
        assert (template.name, template.encode([USER])) == (name, encode_dialog(encoder, check_dialog([USER])))
    (tmp_path / "tokenizer.model").write_bytes(llama3_model().read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}<|eot_id|>")
    own = load_tokenizer(tmp_path / "tokenizer.model")
    template = configured(None).load_chat_template(own)
    assert template is not None
    asked = message("user", "a<|eot_id|>b")
    assert (template.name, template.encode([asked])) == (
        "checkpoint", [own.bos_id, *own.encode("a<|eot_id|>b", False, False), own.special_id("<|eot_id|>")],
    )  # fmt: skip
    overruled = configured("llama3").load_chat_template(own)
    assert overruled is not None
    assert overruled.name == "llama3"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"the checkpoint's own chat template: .*name another: handler"):
        default_template(load_tokenizer(tmp_path / "tokenizer.model"))
