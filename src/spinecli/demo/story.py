"""The grammar of a story: who there is, what happens, and where everything ends up.

Each function puts one sentence or part of one on the page and returns what the reader of
that sentence now knows.  The state of a story is never anything else than what its words
have said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from spinecli.demo import vocabulary as v
from spinecli.demo.story_sampler import StorySampler, Weighted
from spinecli.demo.tables import ALL_PLACES, TOPIC_OF, Phrase, world

FEWEST_EVENTS, MOST_EVENTS = 6, 12

_PLACE_OPTIONS = tuple(((place,), 1.0) for place in ALL_PLACES)
_NAME_OPTIONS = tuple(
    ((name,), 1.0 / (2 + rank // 2))
    for rank, name in enumerate(name for pair in zip(v.WOMEN, v.MEN, strict=True) for name in pair)
)
_WOMEN = frozenset(v.WOMEN)


@dataclass
class Item:
    """A thing in the story: somebody holds it, or it lies in a spot at a place."""

    noun: str
    adjective: str
    holder: str = ""
    spot: Phrase = ()
    place: str = ""


@dataclass(frozen=True)
class Person:
    """Somebody in the story."""

    name: str
    job: str

    @property
    def pronoun(self) -> str:
        """How a following sentence refers to this person as its subject."""
        return "she" if self.name in _WOMEN else "he"


@dataclass
class Scene:
    """Everything that the story has said so far."""

    place: str
    weather: str
    people: list[Person] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    speaker: int = 0
    """Index into ``people`` of the subject of the last sentence."""


def tell(pen: StorySampler) -> None:
    """Write one whole story, up to and including the word that ends it."""
    scene = _opening(pen)
    _introduction(pen, scene)
    for count in range(MOST_EVENTS):
        closing = 0.0 if count < FEWEST_EVENTS else 1.0 / (MOST_EVENTS - count)
        if not _event(pen, scene, closing):
            break
    else:
        pen.write("in", "the", "end")
    _ending(pen, scene)


def _opening(pen: StorySampler) -> Scene:
    pen.write("at", "the")
    (place,) = pen.choose(_PLACE_OPTIONS)
    pen.write("it", "was", "a")
    weather, _time = pen.choose(world().weather[place])
    pen.write(".")
    return Scene(place, weather)


def _introduction(pen: StorySampler, scene: Scene) -> None:
    """Two people, each with a job and one or two belongings."""
    tables = world()
    (name,) = pen.choose(_NAME_OPTIONS)
    pen.write("the")
    (job,) = pen.choose(tables.local_profession[scene.place])
    scene.people.append(Person(name, job))
    pen.write("had")
    _belongings(pen, scene, scene.people[0])
    if pen.choose(((("there", scene.people[0].pronoun, "met"), 0.6), (("with",), 0.4)))[0] == "with":
        pen.write("her" if scene.people[0].pronoun == "she" else "him", "was")
    (name,) = pen.choose([option for option in _NAME_OPTIONS if option[0][0] != name])
    pen.write("the")
    (other_job,) = pen.choose([option for option in tables.local_profession[scene.place] if option[0][0] != job])
    scene.people.append(Person(name, other_job))
    pen.write(",", "who")
    if pen.choose(((("came", "from", "the"), 0.5), (("had",), 0.5)))[0] == "came":
        pen.choose(tables.home[other_job])
        pen.write("and", "had")
    _belongings(pen, scene, scene.people[1])


def _belongings(pen: StorySampler, scene: Scene, owner: Person) -> None:
    """One or two things that the owner has not shown before, then a full stop."""
    for last in (False, True):
        taken = {item.noun for item in scene.items}
        options = [option for option in world().belonging[owner.job] if option[0][2] not in taken]
        _article, adjective, noun = pen.choose(options)
        scene.items.append(Item(noun, adjective, holder=owner.name))
        if last:
            pen.write(".")
        elif pen.choose((((".",), 0.6), (("and",), 0.4))) == (".",):
            return


def _event(pen: StorySampler, scene: Scene, closing: float) -> bool:
    """One event; or, with chance ``closing``, the words that begin the ending (then false)."""
    subjects: list[tuple[Phrase, float]] = []
    for index, person in enumerate(scene.people):
        same = index == scene.speaker
        if same:
            subjects.append(((person.pronoun,), 0.36))
        subjects.append(((person.name,), 0.08 if same else 0.28))
        subjects.append((("the", person.job), 0.08 if same else 0.20))
    options: list[tuple[Phrase, float]] = []
    for opener, share in (((), 0.55), (("then",), 0.15), (("soon",), 0.15), (("later",), 0.15)):
        options += [((*opener, *subject), share * weight) for subject, weight in subjects]
    if closing:
        options = [(phrase, (1.0 - closing) * weight) for phrase, weight in options]
        options.append((("in", "the", "end"), closing))
    phrase = pen.choose(options)
    if phrase[0] == "in":
        return False
    for index, person in enumerate(scene.people):
        if phrase[-1] in (person.name, person.job) or (index == scene.speaker and phrase[-1] == person.pronoun):
            scene.speaker = index
            break
    _predicate(pen, scene, may_relate=phrase[-1] not in ("he", "she"))
    return True


def _predicate(pen: StorySampler, scene: Scene, may_relate: bool) -> None:
    """What the subject of the sentence did, after a relative clause if there may be one."""
    who, other = scene.people[scene.speaker], scene.people[1 - scene.speaker]
    held = [item for item in scene.items if item.holder == who.name]
    here = [item for item in scene.items if not item.holder and item.place == scene.place]
    choices: list[tuple[Phrase, float]] = [(("saw",), 1.6), (("felt",), 0.5), (("asked",), 0.5), (("went",), 0.5)]
    verbs = world().work[who.job]
    scale = 7.0 / math.fsum(weight for _, weight in verbs)
    choices += [(verb, scale * weight) for verb, weight in verbs]
    if held:
        choices += [(("put",), 1.6), (("gave",), 0.6)]
    if here:
        choices += [(("looked",), 0.4), (("found",), 1.1)]
    if may_relate:
        choices.append(((",", "who"), 0.8))
    verb = pen.choose(choices)[0]
    if verb == ",":
        _relative_clause(pen, who, held)
        verb = pen.choose(choices[:-1])[0]
    if verb == "saw":
        _sight(pen, scene)
    elif verb == "felt":
        pen.choose(world().mood[scene.weather, who.job])
    elif verb == "asked":
        _question(pen, scene, who, other)
    elif verb == "went":
        pen.write("with")
        _mention(pen, other)
        pen.write("to", "the")
        (scene.place,) = pen.choose(world().next_place[scene.place])
    elif verb == "put":
        item = _pick(pen, held)
        item.spot = pen.choose(world().spot[item.noun, TOPIC_OF[scene.place]])
        item.holder, item.place = "", scene.place
    elif verb == "gave":
        item = _pick(pen, held)
        pen.write("to")
        _mention(pen, other)
        item.holder = other.name
    elif verb == "looked":
        spot = pen.choose(_distinct([(item.spot, 1.0) for item in here]))
        pen.write("and", "saw")
        _all_of(pen, [item for item in here if item.spot == spot])
    elif verb == "found":
        item = _pick(pen, here)
        pen.write(*item.spot)
        item.holder = who.name
    else:
        _work(pen, who, verb)
        return
    pen.write(".")


def _relative_clause(pen: StorySampler, who: Person, held: list[Item]) -> None:
    """Say again what the subject holds, or else where people of that job come from."""
    if held:
        pen.write("still", "had")
        _all_of(pen, held)
    else:
        pen.write("came", "from", "the")
        pen.choose(world().home[who.job])
    pen.write(",")


def _sight(pen: StorySampler, scene: Scene) -> None:
    creature = pen.choose(world().creature[scene.place])[-1]
    if pen.choose(((("that", "was"), 0.7), (("near", "the"), 0.3)))[0] == "that":
        pen.choose(world().doing[creature])
    else:
        pen.write(scene.place)


def _question(pen: StorySampler, scene: Scene, who: Person, other: Person) -> None:
    """Somebody asks about a thing, and the answer says who has it or where it lies."""
    _mention(pen, other)
    pen.write("about")
    item = _pick(pen, scene.items)
    pen.write(",", "and", other.pronoun, "said", "that")
    if item.holder:
        pen.write(item.holder, "had", "it")
    else:
        pen.write("it", "was", "at", "the", item.place, *item.spot)


def _work(pen: StorySampler, who: Person, verb: str) -> None:
    """What somebody did for a living, with the full stop of the sentence."""
    pen.choose(world().goods[who.job, verb])
    (after,) = pen.choose(world().manner[verb])
    if after == "and":
        (second,) = pen.choose([option for option in world().work[who.job] if option[0][0] != verb])
        pen.choose(world().goods[who.job, second])
    if after != ".":
        pen.write(".")


def _mention(pen: StorySampler, person: Person) -> None:
    """Refer to somebody by name or by job."""
    pen.choose((((person.name,), 0.6), (("the", person.job), 0.4)))


def _pick(pen: StorySampler, items: list[Item]) -> Item:
    """Name one of the things, at times with its adjective."""
    options: list[tuple[Phrase, float]] = []
    for item in items:
        options += [(("the", item.noun), 0.6), (("the", item.adjective, item.noun), 0.4)]
    noun = pen.choose(options)[-1]
    return next(item for item in items if item.noun == noun)


def _all_of(pen: StorySampler, items: list[Item]) -> None:
    """Name all the things in the order in which the story brought them in."""
    for index, item in enumerate(items):
        pen.write(*(("and",) if index else ()), "the", item.adjective, item.noun)


def _distinct(options: Weighted) -> Weighted:
    return list(dict(options).items())


def _ending(pen: StorySampler, scene: Scene) -> None:
    """Tell of one of the things who has it or where it lies."""
    options: list[tuple[Phrase, float]] = []
    for item in scene.items:
        if item.holder:
            options.append(((item.holder, "had", "the", item.adjective, item.noun), 1.0))
        else:
            options.append((("the", item.adjective, item.noun, "lay", *item.spot), 1.0))
    pen.choose(options)
    pen.write(".", v.END)
