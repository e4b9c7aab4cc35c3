"""The names by which languages are compared: how they are found in a text, and what is said in place of them."""

import pytest

from trainers.openmoji.held_out import HeldOutNames
from trainers.openmoji.images import LANGUAGES, Concept
from trainers.openmoji.rows import openmoji_rows
from trainers.openmoji.task import SIZES, held_out_concepts, make_task
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


def test_parallel_names_are_translations_of_each_other():
    task = make_task(SIZES["small"], 0)
    names = task.parallel_names
    assert list(names) == list(LANGUAGES) and {len(of_language) for of_language in names.values()} == {59}
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


def test_a_benchmark_of_captions_shows_the_same_images_in_every_language():
    english, spanish = openmoji_rows("captions-en", "small"), openmoji_rows("captions-es", "small")
    task = make_task(SIZES["small"], 0)
    assert english["image"] == spanish["image"] and len(english) == len(task.language_retrieval)
    assert english["caption"] == [image.long for image in task.language_retrieval]
    view, concept = task.language_retrieval[0].view, task.concepts[task.language_retrieval[0].concept]
    assert spanish["caption"][0] == translated_caption(concept, view, "es")
