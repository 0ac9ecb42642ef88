"""Conversations cut from tales: someone asks for a story and is told one, in Llama-2's chat form.

The answers are the books' own paragraphs, word for word; only the questions are ours.
"""

from __future__ import annotations

import random
import re
from collections import Counter

Turn = tuple[str, str]  # what is asked, what is told

_SUBJECTS = (
    "ant bear beggar bird boy bride brother brothers bull butcher calf castle cat cobbler cock cow crab crow "
    "crown daughter deer dog donkey dove dragon duck dwarf eagle elf emperor enchanter enchantress fairy farmer "
    "ferryman fish fisherman forest fox frog garden gardener genius giant girl goat goose grandmother hare "
    "hedgehog hen hermit hero horse hunter huntsman husband island jackal king knight lad lady lamb lion magician "
    "maid maiden man mare merchant mermaid miller monkey monster mother mountain mouse musician nightingale nurse "
    "ogre ogress owl ox parrot peasant pig pigeon piper prince princes princess princesses queen rabbit rat raven "
    "ring river robber robbers rose sailor sea serpent servant sheep shepherd ship shoemaker sister sisters smith "
    "snake soldier son sons sorcerer sparrow spider stag stepdaughter stepmother stork sultan swan swans sword "
    "tailor thief thieves tiger toad tortoise tower treasure troll tsar turtle weaver widow wife witch wizard "
    "wolf wolves woman wood woodcutter wren "
)
_SUBJECT = re.compile(rf"\b({'|'.join(sorted(_SUBJECTS.split(), key=len, reverse=True))})\b", re.IGNORECASE)

_TELL = (
    "Tell me a story about {x}.",
    "Tell me a story about {x}.",
    "Tell me a story about {x}.",
    "Tell me a tale about {x}.",
    "Tell me a tale of {x}.",
    "Tell me a fairy tale about {x}.",
    "Tell me a story of {x}.",
    "Please tell me a story about {x}.",
    "Can you tell me a story about {x}?",
    "Can you tell me about {x}?",
    "Write a story about {x}.",
    "Write a short story about {x}.",
    "I would like to hear a story about {x}.",
    "A story about {x}, please.",
    "tell me a story about {x}",
    "Tell me about {x}.",
)
_TELL_ANY = (
    "Tell me a story.",
    "Tell me a fairy tale.",
    "Once upon a time",
    "Hello!",
    "Can you tell me a story?",
    "Hi",
)
_GO_ON = ("Go on.", "What happened next?", "And then?", "Please go on.", "Tell me more.", "Continue.", "What then?")
_SYSTEM = (
    "You are a teller of fairy tales.",
    "You are a helpful assistant.",
    "You tell old stories to children.",
    "Answer with a short story.",
    "You are a storyteller. Keep your stories short.",
)
_TURN_CHARS = (250, 1100)
# A later paragraph can open a story of its own when it sets a scene.
_SCENE = re.compile(r"(Once|One|There|Now|In|A|An|The|Long|Far|At|When|Many|Not far|Next|After|Early|Late) ")
_OPENING_SHARE = 0.8


def conversation(paragraphs: list[str], rng: random.Random) -> list[Turn]:
    """One to three turns from a tale: from its opening on, or from a later scene."""
    scenes = [i for i, p in enumerate(paragraphs) if _SCENE.match(p) and _SUBJECT.search(p[:120])]
    start = rng.choice(scenes) if scenes and rng.random() > _OPENING_SHARE else 0
    turns: list[Turn] = []
    n_turns = rng.choices((1, 2, 3), (5, 3, 2))[0]
    for _ in range(n_turns):
        told, start = _passage(paragraphs, start, rng)
        if not told:
            break
        asked = rng.choice(_GO_ON) if turns else _question(told, rng)
        if not turns and rng.random() < 0.2:
            asked = f"<<SYS>>\n{rng.choice(_SYSTEM)}\n<</SYS>>\n\n{asked}"
        turns.append((asked, told))
    return turns


def _passage(paragraphs: list[str], start: int, rng: random.Random) -> tuple[str, int]:
    """Whole paragraphs from `start` on until a length drawn at random is reached, and where the next turn starts."""
    enough, text = rng.randint(*_TURN_CHARS), ""
    while start < len(paragraphs) and len(text) < enough:
        paragraph = paragraphs[start]
        if len(text) + len(paragraph) > _TURN_CHARS[1]:
            if not text:
                text = _sentences(paragraph, enough)
            break
        text = f"{text}\n\n{paragraph}" if text else paragraph
        start += 1
    return (text, start) if text else ("", start)


def _sentences(paragraph: str, enough: int) -> str:
    """The first sentences of a long paragraph, up to about `enough` characters."""
    text = ""
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph):
        if text and len(text) + len(sentence) > enough:
            break
        text = f"{text} {sentence}".strip()
    return text if len(text) <= 2 * _TURN_CHARS[1] else ""


def _question(told: str, rng: random.Random) -> str:
    """Asks for what is told: one of the first subjects, likelier the earlier it comes and the oftener it returns."""
    subjects = list(dict.fromkeys(match.lower() for match in _SUBJECT.findall(told[:350])))[:5]
    if not subjects or rng.random() < 0.06:
        return rng.choice(_TELL_ANY)
    counts = Counter(match.lower() for match in _SUBJECT.findall(told))
    first = rng.choices(subjects, [counts[subject] ** 2 / (i + 1) for i, subject in enumerate(subjects)])[0]
    wanted = _with_article(first)
    others = [s for s in subjects if s != first]
    if others and rng.random() < 0.2:
        wanted = f"{wanted} and {_with_article(rng.choice(others))}"
    return rng.choice(_TELL).format(x=wanted)


def _with_article(noun: str) -> str:
    if noun in ("sea", "wood", "forest"):
        return f"the {noun}"
    if noun in ("thieves", "wolves") or (noun.endswith("s") and not noun.endswith("ess")):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
