"""Word lists of the built-in language.

Every list is ordered, and the order is part of the language: the tables in
:mod:`spinecli.demo.tables` are drawn over these positions, so re-ordering a list changes
every text that was ever generated.  A word belongs to one list only, which keeps the
role of every word in a sentence readable from the word alone.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


END = "<eos>"
"""The word that closes a document.  In running text it is written as a line break."""

TOPICS = ("sea", "farm", "town", "hills")

# One row per topic, in the order of TOPICS.
PLACES = (
    ("harbour", "beach", "lighthouse", "island", "pier"),
    ("barn", "orchard", "meadow", "mill", "stable"),
    ("market", "library", "inn", "station", "chapel"),
    ("forest", "valley", "cave", "quarry", "camp"),
)
PROFESSIONS = (
    ("sailor", "fisher", "diver", "captain", "boatman", "netmaker"),
    ("farmer", "miller", "shepherd", "gardener", "beekeeper", "carter"),
    ("baker", "tailor", "teacher", "clerk", "cook", "painter"),
    ("hunter", "miner", "guide", "woodcutter", "mason", "trapper"),
)

WOMEN = _words(
    """
    anna clara dora ella flora greta hilda irma julia karin laura maria
    nina olga paula rosa sara tilda ursula vera wanda yara zoe berta
    """
)
MEN = _words(
    """
    adam boris carl david emil felix georg hugo ivan jakob konrad leo
    max nils oskar peter quentin robert stefan tomas urban viktor walter yuri
    """
)

OBJECTS = _words(
    """
    key lamp kite book drum flute bell clock coin ring scarf hat coat boot glove belt
    basket bucket bottle jar cup bowl plate spoon knife fork candle mirror comb brush map letter
    rope hammer chisel axe plane shovel rake ladder wheel saddle whip horn pipe fiddle ball doll
    marble mask crown sword shield bow spear net hook anchor compass telescope box chest bag purse
    blanket pillow quilt broom kettle pan lantern umbrella stick cane stone shell feather bead button whistle
    """
)
ADJECTIVES = _words(
    """
    small large red blue green yellow black white brown grey brass copper silver golden wooden
    broken heavy light narrow wide round square long short smooth rough shiny dusty rusty painted
    carved plain soft hard warm cold wet dry clean dirty new strange pretty simple strong fragile
    """
)
VERBS = _words(
    """
    cleaned counted carried mended polished sorted measured washed weighed sold bought packed
    loaded pulled pushed stacked lifted dragged gathered checked covered filled emptied dried
    cut split tied folded rolled shaped warmed cooled mixed stirred tasted boiled
    marked drew copied taught guarded followed fed caught hunted planted watered picked
    """
)
GOODS = _words(
    """
    apples pears plums cherries onions carrots beans cabbages turnips barley wheat oats rye hay straw
    flour bread cakes pies honey butter cheese milk eggs wool cloth silk linen leather thread
    nets sails oars ropes anchors boats crabs oysters herrings eels cod salmon salt pearls sand
    bricks stones planks logs beams nails tools chains barrels crates sacks carts wagons wheels
    horses sheep goats cows pigs geese hens ducks bees dogs deer rabbits foxes furs traps arrows
    gems coal iron tin clay pots pans lamps candles books letters maps pictures songs coats shirts
    hats gloves tents paths
    """
)
ADVERBS = _words(
    """
    slowly quickly carefully quietly gladly proudly calmly badly neatly gently
    boldly firmly kindly lazily loudly patiently roughly silently wisely happily
    """
)
CREATURES = _words(
    """
    gull heron seal otter walrus dolphin pelican turtle swan puffin cormorant tern
    hen goose lamb calf foal rooster pony donkey hare hedgehog swallow mole
    cat pigeon mouse rat sparrow dog magpie crow beetle moth spider parrot
    wolf bear fox eagle hawk owl stag badger lynx raven marten viper
    """
)
DOINGS = _words(
    """
    sleeping eating drinking swimming flying running jumping hiding digging singing fighting playing
    climbing waiting limping hunting calling nesting washing stealing shivering staring yawning resting
    """
)
# Every piece of furniture keeps one preposition.
SPOTS = tuple(
    (preposition, "the", noun)
    for preposition, nouns in (
        ("under", ("bench", "table", "bed", "bridge", "stairs")),
        ("behind", ("door", "curtain", "stove", "fence", "hedge")),
        ("beside", ("well", "gate", "fire", "oak", "wall")),
        ("inside", ("cupboard", "drawer", "cellar", "shed", "trunk", "oven")),
        ("near", ("window", "path", "stream", "ladders")),
        ("on", ("shelf", "roof", "chair", "cart", "desk", "steps", "windowsill")),
    )
    for noun in nouns
)
WEATHERS = _words("sunny rainy foggy windy snowy stormy cloudy frosty misty humid chilly mild")
TIMES = ("morning", "noon", "afternoon", "evening", "night", "day")
MOODS = _words("happy sad tired angry afraid proud lonely curious bored hopeful nervous calm")

FUNCTION_WORDS = _words(
    """
    . , a an the it was at in and he she her him who had with to that then soon later there
    came from put found gave saw looked met asked about said still lay end went felt
    under behind beside inside near on
    """
)
