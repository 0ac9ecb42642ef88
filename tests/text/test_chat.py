"""The chat template, against Meta's by hand and on what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.text.models import load, tiny_model
from tpserve.engine.errors import RequestError
from tpserve.engine.text.chat import check_dialog, encode_dialog
from tpserve.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load(tiny_model())


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_one_user_turn(tokenizer: Tokenizer) -> None:
    messages = check_dialog([message("user", "  once upon a time ")])
    assert encode_dialog(tokenizer, messages) == tokenizer.encode(
        "[INST] once upon a time [/INST]", bos=True, eos=False
    )


def test_finished_turns_end_with_eos(tokenizer: Tokenizer) -> None:
    dialog = [message("user", "one"), message("assistant", " two "), message("user", "three")]
    assert encode_dialog(tokenizer, check_dialog(dialog)) == [
        *tokenizer.encode("[INST] one [/INST] two ", bos=True, eos=True),
        *tokenizer.encode("[INST] three [/INST]", bos=True, eos=False),
    ]


def test_the_system_prompt_is_folded_into_the_first_user_turn(tokenizer: Tokenizer) -> None:
    dialog = [message("system", "be a dog"), message("user", "one"), message("assistant", "two"), message("user", "x")]
    assert encode_dialog(tokenizer, check_dialog(dialog)) == [
        *tokenizer.encode("[INST] <<SYS>>\nbe a dog\n<</SYS>>\n\none [/INST] two ", bos=True, eos=True),
        *tokenizer.encode("[INST] x [/INST]", bos=True, eos=False),
    ]


@pytest.mark.parametrize(
    ("dialog", "said"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([["user", "x"]], r"dialog\[0\] must be an object"),
        ([message("user", 3)], r"dialog\[0\]\.content must be a string"),
        ([message("robot", "x")], r"dialog\[0\]\.role must be one of"),
        ([message(["user"], "x")], r"dialog\[0\]\.role must be one of"),
        ([message("user", "x") | {"name": "y"}], r"dialog\[0\] has an unknown key 'name'"),
        ([message("assistant", "x")], r"dialog\[0\] must have role 'user', got 'assistant'"),
        ([message("user", "x"), message("user", "y")], r"dialog\[1\] must have role 'assistant', got 'user'"),
        ([message("user", "x"), message("system", "y")], r"dialog\[1\] must have role 'assistant', got 'system'"),
        ([message("system", "x")], r"dialog\[0\], the last message, must have role 'user'"),
        ([message("user", "x"), message("assistant", "y")], r"dialog\[1\], the last message"),
        ([message("user", "a [INST] b")], r"special tag '\[INST\]'"),
        ([message("system", "<</SYS>>"), message("user", "b")], "special tag '<</SYS>>'"),
    ],
)
def test_a_dialog_that_is_refused(dialog: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        check_dialog(dialog)
    assert (caught.value.field, caught.value.status) == ("dialog", 400)
