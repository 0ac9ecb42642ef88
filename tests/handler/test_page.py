"""The chat page: nothing from elsewhere, nothing inline, every control has a name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.handler.fakes import FakeEngine
from tests.handler.frontend import ids_of
from tests.handler.web import Web, serving, wait_for
from tpserve.engine.in_flight import NewRequest

FOLDER = Path(__file__).resolve().parents[2] / "handler" / "page"


class Page(HTMLParser):
    """The tags of a page and what stands in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving() as web:
        yield web


@pytest.fixture(scope="module")
def page(web: Web) -> Page:
    return Page(web.ask("GET", "/").body.decode())


def test_everything_that_the_page_names_is_served(web: Web, page: Page) -> None:
    named = [a["href"] for a in page.all("link")] + [a["src"] for a in page.all("script")]
    named += [f"page/{name}" for name in re.findall(r'from "\./(.*?)"', (FOLDER / "chat.js").read_text())]
    assert len(named) == 4
    kinds = {path: web.ask("GET", f"/{path}").headers["content-type"].partition(";")[0] for path in map(str, named)}
    assert set(kinds.values()) == {"image/svg+xml", "text/css", "text/javascript"}
    assert {path.removeprefix("page/") for path in kinds} | {"index.html"} == {file.name for file in FOLDER.iterdir()}


def test_the_browser_is_told_to_trust_nothing_else(web: Web) -> None:
    for path in ("/", "/page/chat.js", "/page/icon.svg"):
        headers = web.ask("GET", path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(page: Page) -> None:
    assert not page.all("style")
    assert all(script.get("src") for script in page.all("script"))
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
    for file in FOLDER.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", file.read_text()), file.name


def test_what_a_model_says_is_only_ever_text() -> None:
    for name in ("chat.js", "stream.js"):
        text = (FOLDER / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc", text)


def test_every_control_has_a_name(page: Page) -> None:
    labelled = {label["for"] for label in page.all("label")}
    fields = [attributes["id"] for attributes in page.all("input", "textarea", "select")]
    assert len(fields) == 7
    assert set(fields) == labelled
    assert [tag for tag, _ in page.tags].count("button") == 5
    assert page.all("html")[0]["lang"] == "en"
    assert {a.get("aria-live") for a in page.all("div", "p")} >= {"polite"}
    assert not [a for _, a in page.tags if int(a.get("tabindex") or 0) > 0]


def test_the_script_finds_what_it_looks_for(page: Page) -> None:
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    script = (FOLDER / "chat.js").read_text()
    wanted = set(re.findall(r'\$\("([a-z-]+)"\)', script))
    assert len(wanted) > 12
    assert wanted <= ids


class Talker(FakeEngine):
    """Answers by itself; an answer of 100 tokens and more never ends."""

    def submit_together(self, new: Sequence[NewRequest], **kwargs: Any) -> None:
        super().submit_together(new, **kwargs)

        def talk() -> None:
            for request in new:
                self.say(request.request_id, ids_of("once upon"))
                if request.params.max_new_tokens < 100:
                    time.sleep(0.1)
                    self.say(request.request_id, ids_of("a time"), "stop")

        threading.Timer(0.02, talk).start()


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script with")
def test_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for file in FOLDER.iterdir():
        shutil.copy(file, tmp_path)
    with serving(keys=("sesame",), engine=Talker()) as web:
        command = ["node", str(Path(__file__).with_name("page.mjs")), str(tmp_path), f"http://127.0.0.1:{web.port}/"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: len(web.engine.cancelled) == 1)  # Escape
    told = json.loads(done.stdout)
    assert "API key" in told["locked"]
    assert told["model"] == "llama"
    assert told["answering"] == [True, False]  # Send is off, Stop is on
    assert told["turns"] == [["You", "tell me"], ["Model", "once upon a time"]]
    assert re.fullmatch(r"Complete, first token after \d+ ms, .* tokens/s, \d+ \+ \d+ tokens", told["facts"])
    assert told["stopped"].startswith("Stopped, first token after")
    assert told["tokens"][0].startswith("<s> ")
    assert len(told["tokens"]) == int(told["count"].split()[0])
    assert "temperature" in told["refused"]
    assert told["kept"] == "too warm"  # to be sent again
    assert told["cleared"] == 0
