"""The report's numbers, words and page, from results whose outcomes are made up."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.headless_browser import open_page, take_screenshot
from tests.trainers.evaluation.report.made_results import write_examples, write_results
from trainers.evaluation.report import build_report, write_report
from trainers.evaluation.report.pairing import ModelResults, pair


pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three results folders and the report on them."""
    folder = tmp_path_factory.mktemp("report")
    write_results(folder / "proclip", "ProCLIP", skill=0.78, seed=1)
    write_results(folder / "llm2clip", "LLM2CLIP", skill=0.45, seed=2)
    write_results(folder / "clip", "CLIP", skill=0.8, seed=3, cka=False)
    write_examples(folder / "proclip", ["CLIP", "ProCLIP", "LLM2CLIP"])
    write_report(folder / "out", [folder / "proclip", folder / "llm2clip"], folder / "clip")
    return folder


@pytest.fixture(scope="module")
def report(results):
    return json.loads((results / "out" / "report.json").read_text(encoding="utf-8"))


# What it says


def test_scores_are_those_of_the_results(results, report):
    for number, folder in enumerate(("clip", "proclip", "llm2clip")):
        tasks = ModelResults.read(results / folder).tasks
        for row in report["scores"]:
            value = row["values"][number]
            assert value["low"] <= value["value"] <= value["high"]
            if row["metric"] == tasks[row["name"]]["metric"]:
                assert value["value"] == pytest.approx(tasks[row["name"]]["value"], abs=1e-12)
    recalls = [row["values"][1]["value"] for row in report["scores"] if row["name"] == "captions"]
    assert np.mean(recalls) == pytest.approx(ModelResults.read(results / "proclip").tasks["captions"]["value"])


def test_verdicts_follow_from_the_scores(report):
    proclip, llm2clip = (model["verdict"] for model in report["models"])
    assert llm2clip["answer"] == "yes" and "Zero-shot classification lost" in llm2clip["headline"]
    assert proclip["answer"] == "undecided"
    assert {entry["name"] for entry in proclip["averages"]} == {
        "zero-shot classification",
        "retrieval",
        "languages",
    }
    assert len(proclip["tasks"]) == 3 + 2 + 14
    for entry in llm2clip["tasks"]:
        difference = entry["difference"]
        assert difference["value"] == pytest.approx(entry["model"]["value"] - entry["baseline"]["value"])
        assert (entry["decision"] == "lost") == (difference["high"] < 0 and difference["low"] < -0.01)


def test_languages_on_the_same_images_are_resampled_together(results):
    tasks = pair(ModelResults.read(results / "llm2clip"), ModelResults.read(results / "clip")).tasks
    assert len({task.dataset for task in tasks if task.group == "multilingual"}) == 1
    assert len({task.dataset for task in tasks}) > 3


def test_confusions_are_counted_and_the_most_frequent_come_first(results, report):
    for entry in report["confusions"]:
        items = ModelResults.read(results / {"ProCLIP": "proclip", "LLM2CLIP": "llm2clip"}[entry["model"]]).items(
            entry["task"]
        )
        wrong = items["correct"] == 0
        assert entry["num_wrong"] == wrong.sum()
        counts = [row["count"] for row in entry["rows"]]
        assert counts == sorted(counts, reverse=True)
        top = entry["rows"][0]
        label, said = (int(top[side].strip("thing <>")) for side in ("right", "said"))
        assert ((items["label"] == label) & (items["prediction"] == said) & wrong).sum() == top["count"]
        assert (items["label"] == label).sum() == top["of"]


def test_what_was_not_measured_is_said(report):
    assert [words.split(":")[0].split(" (")[0] for words in report["not_measured"]] == [
        "retrieval by long captions",
        "fine-grained understanding",
        "linear probe",
    ]


def test_without_a_baseline_there_are_scores_and_no_verdict(results, tmp_path):
    page = write_report(write_results(tmp_path / "alone", "CLIP", skill=0.8, languages=1)).read_text(encoding="utf-8")
    assert "What changed" not in page and "Verdict" not in page and "things-unseen" in page


def test_the_layout_of_the_command_is_found_and_the_same_results_give_the_same_bytes(results, tmp_path):
    write_results(tmp_path / "run", "LLM2CLIP", skill=0.45, seed=2, languages=1)
    write_results(tmp_path / "run" / "baseline", "CLIP", skill=0.8, seed=3, languages=1)
    first = write_report(tmp_path / "run").read_bytes()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["baseline"] == "CLIP" and report["models"][0]["verdict"]["answer"] == "yes"
    assert write_report(tmp_path / "run").read_bytes() == first


def test_a_part_of_the_data_is_named_as_such(results, tmp_path):
    folder = write_results(tmp_path / "part", "CLIP", skill=0.8, languages=1)
    content = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**content, "partial": {"limit": 20}}))
    assert "was scored on a part of the data only (limit: 20)" in write_report(folder).read_text(encoding="utf-8")


# The page, in a browser


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    """What a browser sees."""
    return open_page(results / "out" / "report.html", tmp_path_factory.mktemp("browser"))


def test_the_page_needs_nothing_from_outside(results, page):
    assert page["violations"] == page["errors"] == page["requests"] == page["console"] == []
    html = (results / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "http://" not in html.replace("http://www.w3.org", "")
    assert len(html) < 2_000_000


def test_every_image_is_decoded_and_described(page):
    assert len(page["images"]) == 4 + 3 * 4
    for image in page["images"]:
        assert image["complete"] and image["width"] > 0 and image["height"] > 0 and image["shown"] > 40
        assert image["alt"]


def test_tables_have_the_numbers_of_the_json(report, page):
    tables = page["tables"]
    shown = {(row[0].split("\n")[0], row[1]): row for row in tables["all-scores"]["rows"]}
    assert len(shown) == len(report["scores"])
    names = {
        "top1": "top-1 accuracy",
        "mean_per_class": "mean per class",
        "i2t_r@1": "image → text R@1",
        "t2i_r@1": "text → image R@1",
    }
    for entry in report["scores"]:
        cells = shown[entry["name"], names[entry["metric"]]]
        values = [cells[3], cells[4], cells[6]]  # after a tuned model's score comes its change
        assert [cell.split("\n")[0] for cell in values] == [f"{100 * value['value']:.1f}" for value in entry["values"]]
    averages = [entry for model in report["models"] for entry in model["verdict"]["averages"]]
    for cells, entry in zip(tables["averages"]["rows"], averages, strict=True):
        assert cells[0] == entry["name"] and cells[5] == entry["decision"]
        assert cells[4].split("\n")[0].replace("−", "-") == f"{100 * entry['difference']['value']:+.1f}"
    for cells, row in zip(tables["cka-table"]["rows"], report["cka"]["ProCLIP"], strict=True):
        assert cells[:3] == [row["layer"], f"{row['cka_debiased']:.3f}", f"{row['cka']:.3f}"]
    assert len(tables["data"]["rows"]) == 4 + 14 + 1
    for model in report["models"]:
        assert model["verdict"]["headline"] in page["text"]


def test_headings_go_down_one_by_one_and_texts_are_not_markup(page):
    levels = [int(tag[1]) for tag, _ in page["headings"]]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert "said to be <b>bold</b> & square" in page["text"] and "thing <1>" in page["text"]


def test_narrow_and_dark_pages_are_readable(results, page, tmp_path):
    dark = open_page(results / "out" / "report.html", tmp_path, width=500, dark=True)
    assert page["overflow"] == dark["overflow"] == 0
    assert page["ground"] == "rgb(255, 255, 255)" and dark["ground"] == "rgb(15, 19, 24)"
    assert dark["tables"] == page["tables"]
    with Image.open(take_screenshot(results / "out" / "report.html", tmp_path, dark=True)) as shot:
        # Dark ground, light text, and the three models' colours: a page that did not render has one or two.
        colors = shot.convert("RGB").quantize(64).convert("RGB").getcolors()
        assert len(colors) > 20 and max(colors)[1] == (15, 19, 24)


def test_a_broken_page_is_noticed(results, tmp_path):
    html = (results / "out" / "report.html").read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    extra = '<img alt="a" src="https://example.org/a.png"><img alt="b" src="data:image/png;base64,AAAA">'
    broken.write_text(html.replace("</main>", extra + "</main>"), encoding="utf-8")
    facts = open_page(broken, tmp_path)
    assert facts["violations"] == ["https://example.org/a.png"]
    assert facts["console"] and facts["errors"]
    assert [image["width"] for image in facts["images"][-2:]] == [0, 0]


# Bad input


class Elements(HTMLParser):
    """The elements of a page in their order, with their attributes' names."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))


@pytest.mark.parametrize(
    "name",
    [
        '<script>alert(1)</script></table></main><img src=x onerror=alert(1)>" onload="alert(1)',
        "$\\frac{$",
        "_hidden {{ 7 * 7 }} line\nbreak\x1b[31m" + " long" * 100,
    ],
)
def test_hostile_names_stay_text(tmp_path, name):
    pages = []
    for place, called in (("harmless", "plain"), ("hostile", name)):
        folder = tmp_path / place
        write_results(folder / "clip", "CLIP", skill=0.8, seed=3)
        write_results(folder / "tuned", called, skill=0.7, seed=1)
        write_examples(folder / "tuned", ["CLIP", called])
        for model in ("clip", "tuned"):
            file = folder / model / "results.json"
            content = json.loads(file.read_text())
            for task in content["tasks"]:
                task |= {"title": f"{called} {task['name']}", "notes": [called]}
                task["dataset"]["source"] = called
                if "classes" in task["protocol"]:
                    task["protocol"]["classes"] = [f"{called} {i}" for i in range(len(task["protocol"]["classes"]))]
            file.write_text(json.dumps(content))
        pages.append(write_report(folder / "out", [folder / "tuned"], folder / "clip").read_text(encoding="utf-8"))
    harmless, hostile = (Elements(page).found for page in pages)
    assert hostile == harmless and "plain 1" in pages[0]


def test_missing_and_broken_results_are_refused(results, tmp_path):
    with pytest.raises(FileNotFoundError, match="results.json"):
        write_report(tmp_path)
    folder = shutil.copytree(results / "clip", tmp_path / "broken")
    (folder / "items" / "things-seen.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="things-seen.safetensors cannot be read .* evaluate 'things-seen' again"):
        write_report(folder)
    (folder / "items" / "things-seen.safetensors").unlink()
    with pytest.raises(ValueError, match="things-seen.safetensors cannot be read"):
        write_report(folder)
    (folder / "results.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="99"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_models_that_cannot_be_compared_are_told_apart(results, tmp_path):
    same = ModelResults.read(results / "llm2clip")
    with pytest.raises(ValueError, match="two of the models are called 'LLM2CLIP'"):
        build_report([same, same], ModelResults.read(results / "clip"))
    other = shutil.copytree(results / "clip", tmp_path / "other")
    content = json.loads((other / "results.json").read_text())
    content["tasks"][0]["dataset"]["fingerprint"] = "other data"
    content["tasks"].pop(1)
    (other / "results.json").write_text(json.dumps(content))
    left_out = pair(ModelResults.read(results / "proclip"), ModelResults.read(other)).left_out
    assert left_out == {
        "things-seen": "the two were scored on different data (their fingerprints differ)",
        "things-unseen": "CLIP was not scored on it",
    }
    content["tasks"] = content["tasks"][:1]
    (other / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no task that both models were scored on"):
        write_report(tmp_path / "none", [results / "proclip"], other)
