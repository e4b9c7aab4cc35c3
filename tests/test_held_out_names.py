"""No training reads a foreign name of a concept by which the quickstart compares languages: neither stage 0 nor stage 1 or 2."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest

from trainers.openmoji.images import LANGUAGES
from trainers.openmoji.task import SIZES, held_out_concepts, make_task


ROOT = Path(__file__).parents[1]
UNSPACED = ("zh", "ja", "ko")
NAMES = {language: [c.names[language].casefold() for c in held_out_concepts()] for language in LANGUAGES}


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        spec = importlib.util.spec_from_file_location("stage_0", ROOT / "examples" / "caption_contrastive_gemma3.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def words(text):
    return re.findall(r"\w+", text.casefold())


def held_out_in(texts, languages):
    """The held-out names in `texts`, found without `HeldOutNames`: as runs of words, in Chinese, Japanese and Korean as runs of characters."""
    spaced = {tuple(words(name)) for language in languages if language not in UNSPACED for name in NAMES[language]}
    unspaced = {name for language in languages if language in UNSPACED for name in NAMES[language]}
    longest, most = max(map(len, spaced), default=0), max(map(len, unspaced), default=0)
    found = set()
    for text in {text.casefold() for text in texts}:
        of_text = words(text)
        for start in range(len(of_text)):
            runs = (tuple(of_text[start : start + length]) for length in range(1, longest + 1))
            found |= {" ".join(run) for run in runs if run in spaced}
        if not text.isascii():
            runs = (text[start : start + length] for start in range(len(text)) for length in range(1, most + 1))
            found |= {run for run in runs if run in unspaced}
    return found


@pytest.fixture
def sources(tmp_path):
    """Stamps and keywords in which every held-out name stands alone, in a longer text, and beside a text that may be read."""
    rng = random.Random(0)
    stamps, keywords = tmp_path / "stamps", {language: {} for language in LANGUAGES}
    stamps.mkdir()
    characters = rng.sample([c.character for c in make_task(SIZES["full"], 0).concepts], 150)
    for i, concept in enumerate(held_out_concepts()):
        lines = [f"A kind of mirror {i}."]
        lines += [f"{language}.utf8=xx {concept.names[language]}, xx." for language in LANGUAGES[1:]]
        (stamps / f"{i}.txt").write_text(
            "\n".join([concept.name, *lines[1:]] if i % 3 == 0 else lines), encoding="utf-8"
        )
        for language in LANGUAGES:
            keywords[language][characters[i]] = {"default": [concept.names[language].upper(), f"qq {language} {i}"]}
    (stamps / "mirror.txt").write_text("A mirror.\nes.utf8=Un espejo.\n\nfr.utf8=Un miroir.\n", encoding="utf-8")
    for language, annotations in keywords.items():
        file = tmp_path / "cldr" / "annotations" / language / "annotations.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"annotations": {"annotations": annotations}}), encoding="utf-8")
    return stamps, tmp_path / "cldr"


def test_the_search_finds_planted_names():
    assert held_out_in(["Un GUSANO, xx"], ["es"]) == {"gusano"}
    assert held_out_in(["我的甜瓜汁"], ["zh"]) == {"甜瓜"}
    assert held_out_in(["gusanos"], ["es"]) == set()


def test_stage_0_reads_no_held_out_name_in_any_language(example, sources):
    rows = example.parallel_rows(*sources)
    texts = [text for row in rows for text in row["text"]]
    for row in example.description_pairs(seed=0):
        texts += [*row["text"], row["negative"]]
    assert held_out_in(texts, LANGUAGES) == set()
    # What may be read is: the names of emoji, a stamp, and the keywords that are no names.
    assert len(rows) > 10_000
    assert {"Un espejo", "Un miroir", "qq es 0"} <= set(texts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stage_1_and_2_read_no_foreign_name_but_as_an_english_word(seed):
    """The names that are English words too, such as "koala", are what `zero_shot_strict` of examples/multilingual.py leaves out."""
    task = make_task(SIZES["full"], seed)
    found = held_out_in(task.training_texts, LANGUAGES[1:])
    assert found == held_out_in([concept.name for concept in task.concepts], LANGUAGES[1:])
    assert len(found) < 60


def test_texts_that_the_adapters_input_is_normalised_with_hold_no_held_out_name():
    names = make_task(SIZES["full"], 0).parallel_names
    assert held_out_in([name for of_language in names.values() for name in of_language], LANGUAGES) == set()
    assert len(names["en"]) >= 350
