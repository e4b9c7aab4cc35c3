"""Long captions in five other languages, from one template each: how well sentences that no training read find their images."""

from dataclasses import dataclass

from .images import BACKGROUNDS, PLACES, SIZES, Concept, View


@dataclass(frozen=True)
class Phrases:
    """What a caption says of a view, in one language. The name stands apart, as its gender and number are not known.

    Attributes:
        template: With {name}, {size}, {place} and {background}.
        sizes, places, backgrounds: In the order of `SIZES`, `PLACES` and `BACKGROUNDS`.
    """

    template: str
    sizes: tuple[str, ...]
    places: tuple[str, ...]
    backgrounds: tuple[str, ...]


# fmt: off
PHRASES = {
    "es": Phrases(
        "{name}, tamaño {size}, {place}, sobre fondo {background}",
        ("pequeño", "grande"),
        ("en el centro", "en la esquina superior izquierda", "en la esquina superior derecha", "en la esquina inferior izquierda",
         "en la esquina inferior derecha"),
        ("blanco", "negro", "gris", "rojo", "verde", "azul", "amarillo", "rosa"),
    ),
    "pt": Phrases(
        "{name}, tamanho {size}, {place}, sobre fundo {background}",
        ("pequeno", "grande"),
        ("no centro", "no canto superior esquerdo", "no canto superior direito", "no canto inferior esquerdo", "no canto inferior direito"),
        ("branco", "preto", "cinza", "vermelho", "verde", "azul", "amarelo", "rosa"),
    ),
    "fr": Phrases(
        "{name}, en {size}, {place}, sur fond {background}",
        ("petit", "grand"),
        ("au centre", "dans le coin supérieur gauche", "dans le coin supérieur droit", "dans le coin inférieur gauche",
         "dans le coin inférieur droit"),
        ("blanc", "noir", "gris", "rouge", "vert", "bleu", "jaune", "rose"),
    ),
    "de": Phrases(
        "{name}, {size}, {place}, auf {background} Hintergrund",
        ("klein", "groß"),
        ("in der Mitte", "in der linken oberen Ecke", "in der rechten oberen Ecke", "in der linken unteren Ecke",
         "in der rechten unteren Ecke"),
        ("weißem", "schwarzem", "grauem", "rotem", "grünem", "blauem", "gelbem", "rosa"),
    ),
    "zh": Phrases(
        "{background}背景，{place}有一个{size}{name}",
        ("小", "大"),
        ("中间", "左上角", "右上角", "左下角", "右下角"),
        ("白色", "黑色", "灰色", "红色", "绿色", "蓝色", "黄色", "粉色"),
    ),
}
# fmt: on


def translated_caption(concept: Concept, view: View, language: str) -> str:
    """The long caption of an image in a language of `PHRASES`."""
    phrases = PHRASES[language]
    return phrases.template.format(
        name=concept.names[language],
        size=phrases.sizes[list(SIZES).index(view.size)],
        place=phrases.places[list(PLACES).index(view.place)],
        background=phrases.backgrounds[list(BACKGROUNDS).index(view.background)],
    )
