"""The committed example of the report, opened in a real browser: pictures and tables are there, and the numbers are those of the JSON."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.headless_browser import open_page


EXAMPLE = Path(__file__).parents[1] / "docs" / "example_report"
MODELS = ["emoji-clip", "proclip", "llm2clip"]


@pytest.fixture(scope="module")
def report():
    return json.loads((EXAMPLE / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return open_page(EXAMPLE / "report.html", tmp_path_factory.mktemp("browser"))


def test_nothing_is_fetched_and_nothing_fails(page):
    assert page["violations"] == page["errors"] == page["requests"] == page["console"] == []


def test_plots_and_pictures_are_decoded(page):
    kinds = [image["source"].split(";")[0] for image in page["images"]]
    assert kinds.count("data:image/svg+xml") == 4  # changes, scores, languages, CKA
    assert kinds.count("data:image/jpeg") == 8 * 4  # examples: the right picture, and what three models find
    for image in page["images"]:
        assert image["complete"] and image["width"] > 0 and image["height"] > 0 and image["shown"] > 40
        assert image["alt"]


def test_tables_show_the_numbers_of_the_json(report, page):
    tables = page["tables"]
    assert tables["all-scores"]["header"][3:5] == MODELS[:2] and tables["all-scores"]["header"][6] == MODELS[2]
    assert len(tables["all-scores"]["rows"]) == len(report["scores"]) == 2 + 2 + 14 + 1
    for cells, entry in zip(tables["all-scores"]["rows"], report["scores"], strict=True):
        assert cells[0].split("\n")[0] == entry["name"]
        shown = [cells[i].split("\n")[0] for i in (3, 4, 6)]
        assert shown == [f"{100 * value['value']:.1f}" for value in entry["values"]]
    averages = [entry for model in report["models"] for entry in model["verdict"]["averages"]]
    assert [cells[5] for cells in tables["averages"]["rows"]] == [entry["decision"] for entry in averages]
    assert len(tables["cka-table"]["rows"]) == len(report["cka"]["proclip"])
    for model in report["models"]:
        assert model["verdict"]["headline"] in page["text"]


def test_the_example_shows_what_the_readme_says(report):
    answers = {model["name"]: model["verdict"] for model in report["models"]}
    assert report["baseline"] == MODELS[0] and list(answers) == MODELS[1:]
    lost = {name: -verdict["averages"][0]["difference"]["value"] for name, verdict in answers.items()}
    assert lost["llm2clip"] > 10 * lost["proclip"]
    assert all(run["partial"] is None for run in report["runs"])


def test_the_example_is_small_enough_to_commit():
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 2_000_000


LANGUAGES = EXAMPLE.parent / "language_report"


def test_the_report_on_languages_has_names_and_captions_of_the_teacher_and_both_llms():
    report = json.loads((LANGUAGES / "report.json").read_text(encoding="utf-8"))
    assert [report["baseline"], *(model["name"] for model in report["models"])] == [
        "emoji-clip",
        "proclip-gemma3",
        "proclip-smollm2",
    ]
    metrics = Counter(score["metric"] for score in report["scores"])
    assert metrics == {"top1": 14, "i2t_r@1": 6, "t2i_r@1": 6}
    assert all(len(score["values"]) == 3 and None not in score["values"] for score in report["scores"])
    others = [s for s in report["scores"] if s["metric"] == "top1" and not s["name"].endswith("-en")]
    clip, gemma3, smollm2 = (sum(score["values"][i]["value"] for score in others) / 13 for i in range(3))
    assert gemma3 > 5 * clip > 5 * smollm2 > 0.2
    page = (LANGUAGES / "report.html").read_text(encoding="utf-8")
    assert "14 languages: top-1 accuracy, chance 0.7 %" in page and "6 languages: text → image R@1" in page
    assert sum(path.stat().st_size for path in LANGUAGES.iterdir()) < 2_000_000
