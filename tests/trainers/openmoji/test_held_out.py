"""What languages are compared by is held out: no training of the quickstart reads a foreign name that is not an English word too."""

import pytest

from trainers.openmoji.held_out import HeldOutNames, held_out_concepts
from trainers.openmoji.images import LANGUAGES, Concept
from trainers.openmoji.task import SIZES, make_task
from trainers.openmoji.translated_captions import PHRASES, translated_caption


CAT = Concept(
    "x", {**dict.fromkeys(LANGUAGES, "-"), "en": "cat", "es": "gato", "zh": "猫", "ko": "고양이", "fr": "chat noir"}
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Un GATO negro", "gato"),
        ("gatos", None),
        ("gato-montés", "gato"),
        ("黑猫", "猫"),
        ("검은고양이들", "고양이"),
        ("un chat", None),
        ("un Chat  noir", None),
        ("un chat noir, assis", "chat noir"),
        ("a cat", None),
    ],
)
def test_names_are_whole_words_but_where_words_are_not_set_apart(text, found):
    assert HeldOutNames([CAT], ["es", "zh", "ko", "fr"]).in_text(text) == found


def test_english_names_are_held_out_only_on_demand():
    assert HeldOutNames([CAT], ["en"]).in_text("a Cat sits") == "cat"


def test_the_concepts_are_the_same_for_every_seed():
    held_out = held_out_concepts()
    assert len(held_out) == 150
    for seed in (1, 2):
        task = make_task(SIZES["full"], seed)
        assert [task.concepts[i] for i in task.language_concepts] == held_out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_training_text_holds_a_foreign_name_that_no_english_name_holds(seed):
    """Of stage 1 and 2, which read English, and of the texts that the adapter's input is normalised with."""
    task, held_out = make_task(SIZES["full"], seed), held_out_concepts()
    english = HeldOutNames(held_out)
    cognates = {name for concept in task.concepts if (name := english.in_text(concept.name))}
    texts = [*task.inheritance_texts, *(text for picture in task.alignment for text in (picture.short, picture.long))]
    found = {english.in_text(text) for text in texts} - {None}
    assert found <= cognates and len(cognates) < 40
    assert not {name for name in found if not name.isascii()}
    fitted = task.parallel_names
    names = {language: {concept.names[language].casefold() for concept in held_out} for language in LANGUAGES[1:]}
    for language, of_language in names.items():
        # A few concepts share a name with a held-out one in some language.
        shared = of_language & {name.casefold() for name in fitted[language]}
        assert not shared, (language, shared)


def test_parallel_names_are_translations_of_each_other():
    task = make_task(SIZES["small"], 0)
    names = task.parallel_names
    assert list(names) == list(LANGUAGES) and {len(of_language) for of_language in names.values()} == {60}
    by_english = {concept.name: concept for concept in task.concepts}
    assert [by_english[name].names["fa"] for name in names["en"]] == names["fa"]


def test_a_translated_caption_says_all_of_a_view():
    task = make_task(SIZES["small"], 0)
    pictures = task.language_retrieval
    assert {picture.concept for picture in pictures} == set(task.language_concepts)
    for language in PHRASES:
        captions = {}
        for picture in pictures:
            view, concept = picture.view, task.concepts[picture.concept]
            caption = translated_caption(concept, view, language)
            assert concept.names[language] in caption and "{" not in caption
            said = (concept.names[language], view.size, view.place, view.background)
            assert captions.setdefault(caption, said) == said
