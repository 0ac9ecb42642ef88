"""Who is to blame for the deaths of rank groups: the policy, without processes."""

from __future__ import annotations

import itertools
import random

import pytest

from tpserve.engine.suspects import Condemned, Suspects, deaths_to_condemn


class World:
    """Groups that die when they run `poison` without its first token; everybody else gets a token in every step."""

    def __init__(self, names: str, poison: str = "", max_running: int = 64) -> None:
        self.suspects = Suspects(max_running)
        self.poison = set(poison)
        self.open = dict.fromkeys(names, 0)
        self.sent: list[str] = []
        self.condemned: list[Condemned] = []
        self.deaths = 0
        self.now_s = 0.0
        self.begin()

    def begin(self) -> None:
        self.sent = self.suspects.born(self.open, self.now_s) + self.suspects.due(self.now_s)

    def die(self) -> None:
        self.deaths += 1
        condemned = self.suspects.died()
        if condemned is not None:
            self.condemned.append(condemned)
            del self.open[condemned.request_id]
        self.begin()

    def step(self) -> None:
        """One step of the group: tokens, or its death."""
        self.now_s += 0.1
        if self.poison & set(self.sent):
            self.die()
            return
        for name in self.sent:
            self.suspects.proven(name)
        self.sent = self.suspects.due(self.now_s)

    def end(self, name: str) -> None:
        self.suspects.ended(name)
        del self.open[name]


def test_deaths_from_outside_cost_time_only() -> None:
    world = World("abc")
    for _ in range(20):
        world.step()
        world.die()
        assert world.sent == ["a", "b", "c"]  # all have had a token: nobody is suspected
    assert not world.condemned


def test_a_request_alone_is_condemned_at_its_third_death() -> None:
    world = World("p", poison="p")
    world.step()
    world.step()
    assert not world.condemned
    world.step()
    assert world.condemned == [Condemned("p", 3)]


@pytest.mark.parametrize("order", ["".join(p) for p in itertools.permutations("abp")])
def test_a_poisonous_request_in_company(order: str) -> None:
    world = World(order, poison="p")
    for _ in range(12):
        world.step()
    assert (world.condemned, world.deaths) == ([Condemned("p", 3)], 3)
    assert list(world.open) == [name for name in order if name != "p"]
    assert world.suspects.num_held == 0


def test_who_has_just_been_tried_is_tried_last() -> None:
    world = World("pab", poison="p")
    world.step()
    assert world.sent == ["p"]
    world.step()
    assert world.sent == ["a"]


def test_several_poisonous_requests() -> None:
    world = World("apbqc", poison="pq")
    for _ in range(30):
        world.step()
    assert {c.request_id for c in world.condemned} == {"p", "q"}
    assert list(world.open) == ["a", "b", "c"]
    assert world.deaths <= 6


def test_those_who_stream_go_on_at_once_and_first() -> None:
    world = World("ab")
    world.step()
    world.open["p"], world.poison = 0, {"p"}
    assert world.suspects.submitted("p", 0)
    world.sent = ["p"]
    world.step()
    assert world.sent == ["a", "b"]
    assert world.suspects.num_held == 1
    world.step()
    assert world.sent == ["p"]


def test_a_token_clears_a_suspect() -> None:
    world = World("a")
    for _ in range(10):
        world.die()
        world.die()
        world.step()
    assert not world.condemned


def test_new_requests_wait_until_the_suspects_have_been_tried() -> None:
    world = World("ab")
    world.die()
    assert world.sent == ["a"]
    assert not world.suspects.submitted("new", 0)
    world.open["new"] = 0
    world.step()
    assert world.sent == ["b"]
    world.step()
    assert world.sent == ["new"]
    assert world.suspects.submitted("newer", 0)


def test_new_requests_wait_through_a_further_death() -> None:
    suspects = Suspects(64)
    suspects.born({"a": 0}, 0.0)
    suspects.died()
    assert not suspects.submitted("between", 0)  # there is no group
    suspects.born({"a": 0, "between": 0}, 0.0)
    assert suspects.due(0.0) == ["a"]
    assert not suspects.submitted("during", 0)
    suspects.died()
    assert suspects.born({"a": 0, "between": 0, "during": 0}, 0.0) == []
    assert suspects.due(0.0) == ["a"]
    suspects.proven("a")
    assert suspects.due(0.0) == ["between", "during"]


def test_a_suspect_that_says_nothing_does_not_keep_the_others_waiting_for_ever() -> None:
    suspects = Suspects(64, max_trial_s=5.0)
    suspects.born({"beams": 0, "b": 0}, 0.0)
    suspects.died()
    assert suspects.born({"beams": 0, "b": 0}, 10.0) == []
    assert suspects.due(10.0) == ["beams"]
    assert suspects.due(14.9) == []
    assert suspects.due(15.1) == ["b"]
    suspects.proven("b")
    assert suspects.died() is None  # "beams" alone is unproven; it is its second death
    suspects.born({"beams": 0, "b": 0}, 20.0)
    suspects.proven("b")
    assert suspects.due(20.0) == ["beams"]
    assert suspects.died() == Condemned("beams", 3)


def test_suspects_that_end_are_forgotten() -> None:
    world = World("abc")
    world.die()
    assert world.sent == ["a"]
    for name in "ab":
        world.end(name)
    assert world.suspects.due(0.0) == ["c"]
    world.end("c")
    assert world.suspects.due(0.0) == []
    assert world.suspects.submitted("d", 0)


def test_only_those_that_could_have_run_are_suspected() -> None:
    world = World("abcdef", max_running=2)
    world.die()
    assert world.sent == ["a"]
    world.step()
    assert world.sent == ["b"]
    world.step()
    assert world.sent == ["c", "d", "e", "f"]


def test_the_group_admits_by_priority() -> None:
    suspects = Suspects(1)
    suspects.born({"low": 3, "high": -1}, 0.0)
    suspects.died()
    assert suspects.born({"low": 3, "high": -1}, 0.0) == []
    assert suspects.due(0.0) == ["high"]


def test_who_comes_while_a_group_is_torn_down_was_not_in_it() -> None:
    suspects = Suspects(64)
    suspects.born({}, 0.0)
    suspects.stopped()
    assert not suspects.submitted("a", 0)
    suspects.died()
    assert suspects.born({"a": 0}, 0.0) == ["a"]


def test_a_group_that_was_never_ready_blames_nobody() -> None:
    suspects = Suspects(64)
    for _ in range(5):
        assert suspects.died() is None
    assert suspects.born({"a": 0}, 0.0) == ["a"]


def test_every_order_of_events_ends_with_everybody_served() -> None:
    """Whatever happens: who is in flight has been sent or is held, and a quiet time sends everybody."""
    for seed in range(300):
        rng = random.Random(seed)
        suspects, now_s = Suspects(rng.choice((1, 3, 64))), 0.0
        names = itertools.count()
        flying: dict[str, int] = {}
        sent: set[str] = set()
        living = False

        def send(some: list[str]) -> None:
            assert not sent & set(some), "sent twice in a life"  # noqa: B023
            sent.update(some)  # noqa: B023

        for _ in range(60):
            now_s += rng.choice((0.1, 0.1, 6.0))
            event = rng.choice(("submit", "submit", "token", "token", "end", "die", "born", "due"))
            if event == "submit":
                name, priority = f"r{next(names)}", rng.randrange(3)
                flying[name] = priority
                if suspects.submitted(name, priority):
                    assert living
                    send([name])
            elif event == "token" and sent:
                suspects.proven(rng.choice(sorted(sent)))
            elif event == "end" and flying:
                name = rng.choice(sorted(flying))
                del flying[name]
                sent.discard(name)
                suspects.ended(name)
            elif event == "die":
                condemned = suspects.died()
                if condemned is not None:
                    del flying[condemned.request_id]
                living = False
                sent.clear()
            elif event == "born" and not living:
                living = True
                send(suspects.born(flying, now_s))
            if living:
                send(suspects.due(now_s))
                assert len(flying) == len(sent) + suspects.num_held
        if not living:
            send(suspects.born(flying, now_s))
        for _ in range(len(flying) + 1):
            now_s += 6.0
            send(suspects.due(now_s))
        assert sent == set(flying)


@pytest.mark.parametrize(("max_restarts", "deaths"), [(0, 3), (3, 3), (5, 5), (1000, 6)])
def test_who_expects_many_deaths_expects_coincidences(max_restarts: int, deaths: int) -> None:
    assert deaths_to_condemn(max_restarts) == deaths
    suspects = Suspects(64, deaths_to_condemn(max_restarts))
    said = []
    for _ in range(deaths):
        suspects.born({"a": 0}, 0.0)
        suspects.due(0.0)
        said.append(suspects.died())
    assert said == [None] * (deaths - 1) + [Condemned("a", deaths)]
