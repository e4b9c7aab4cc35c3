"""Every manifest of the package: what it states, and that the engine computes the right number on data of its schema."""

import dataclasses

import pytest
import yaml

from tests.trainers.evaluation.stand_ins import ColorWorld, stand_in
from trainers.evaluation.data.manifest import (
    MANIFESTS,
    RESOURCES,
    load_manifest,
    load_suite,
    manifest_names,
    parse_manifest,
    suite_names,
)
from trainers.evaluation.runner import evaluate


# CKA has no number by construction: it compares two models (test_comparison.py).
SCORED = [name for name in manifest_names() if load_manifest(name)[0].kind != "cka"]


@pytest.mark.parametrize("name", SCORED)
def test_every_manifest_gives_the_right_number_on_data_of_its_schema(name: str, tmp_path):
    manifest = load_manifest(name)[0]
    world = ColorWorld()
    made = stand_in(manifest, world, tmp_path)

    def run(manifest):
        return evaluate(
            [world.encoder()],
            [manifest],
            tmp_path / "out",
            sources={made.manifest.name: str(made.path)},
            progress=False,
        )

    (results,) = run(made.manifest)
    (task,) = results["tasks"]
    assert task["value"] == pytest.approx(made.value, abs=1e-12)
    assert task["value"] == task["metrics"][manifest.primary_metric]
    assert task["dataset"]["source"] == manifest.data.source and task["dataset"]["read_from"] == "local copy"
    if manifest.kind != "caption_retrieval":
        assert world.model.seen_images == made.num_images, "every picture is embedded once"

    # The manifest as it is in the package knows that this is not the whole benchmark.
    with pytest.raises(ValueError, match=f"benchmark {manifest.name}: .* rows where the manifest states"):
        run(
            dataclasses.replace(
                made.manifest, data=dataclasses.replace(made.manifest.data, num_items=manifest.data.num_items)
            )
        )

    if manifest.kind == "linear_probe":
        more = dataclasses.replace(made.manifest.train, num_items=manifest.train.num_items)
        with pytest.raises(ValueError, match="rows where the manifest states"):
            run(dataclasses.replace(made.manifest, train=more))

    if manifest.data.layout in ("table", "caption_file", "openmoji"):
        for key in manifest.columns:
            wrong = dataclasses.replace(made.manifest, columns={**manifest.columns, key: "elsewhere"})
            with pytest.raises(ValueError, match="has no column 'elsewhere'"):
                run(wrong)
    if manifest.kind == "zero_shot":
        assert task["protocol"]["num_classes_without_images"] == manifest.classes.count - 3
        few = dataclasses.replace(manifest.classes, count=2, pick=[0, 1] if manifest.classes.pick else None)
        with pytest.raises(ValueError, match="classes where the manifest states 2|is neither a whole number below 2"):
            run(dataclasses.replace(made.manifest, classes=few))
    if manifest.kind == "retrieval":
        more = dataclasses.replace(made.manifest.data, num_captions=made.manifest.data.num_captions + 1)
        with pytest.raises(ValueError, match="captions where the manifest states"):
            run(dataclasses.replace(made.manifest, data=more))


def test_counts_and_metrics_are_those_of_the_papers():
    tasks = {task.name: task for name in manifest_names() for task in load_manifest(name)}
    counts = {
        name: tasks[name].data.num_items for name in ("flickr30k", "coco", "sharegpt4v", "urban1k", "docci", "dci")
    }
    assert counts == {"flickr30k": 1000, "coco": 5000, "sharegpt4v": 1000, "urban1k": 1000, "docci": 5000, "dci": 7805}
    zero_shot = {name: task for name, task in tasks.items() if task.kind == "zero_shot"}
    per_class = {name for name, task in zero_shot.items() if task.metric == "mean_per_class"}
    assert per_class == {"aircraft", "pets", "caltech101", "flowers"}
    assert [len(load_suite(name).tasks) for name in ("zero-shot", "robustness", "multilingual")] == [11, 5, 36]
    assert sum(task.data.num_captions for task in load_suite("multilingual").tasks) == 261_375
    assert sum(task.data.num_items for task in load_manifest("sugarcrepe-kinds")) == tasks["sugarcrepe"].data.num_items
    assert len(load_suite("proclip").tasks) == 2 + 4 + 36 + 11 + 5 + 2
    prompts = {name: len(task.prompt_templates) for name, task in tasks.items()}
    assert [prompts[n] for n in ("imagenet", "cifar10", "caltech101", "dtd", "cars", "food101")] == [
        80,
        18,
        34,
        8,
        8,
        1,
    ]


def test_the_classes_of_imagenets_parts_are_named_right():
    names = (RESOURCES / "imagenet_classes.txt").read_text().splitlines()
    assert len(names) == 1000 and (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet paper")
    first = {part: [names[i] for i in load_manifest(f"imagenet-{part}")[0].classes.pick][:3] for part in "aro"}
    assert first["o"] == ["goldfish", "triceratops", "harvestman"]
    assert first["r"] == ["goldfish", "great white shark", "hammerhead shark"]
    assert first["a"] == ["stingray", "goldfinch", "junco"]
    for part in "aro":
        pick = load_manifest(f"imagenet-{part}")[0].classes.pick
        assert len(pick) == 200 and pick == sorted(set(pick))


def test_every_manifest_says_where_its_facts_are_from():
    for name in manifest_names():
        assert len(load_manifest(name)[0].facts) > 40, name
    used = "".join(path.read_text() for path in MANIFESTS.glob("*.yaml"))
    assert {path.name for path in RESOURCES.iterdir()} == {
        n for n in (p.name for p in RESOURCES.iterdir()) if n in used
    }
    in_suites = {task.name for name in suite_names() for task in load_suite(name).tasks}
    alone = {task.name for name in manifest_names() for task in load_manifest(name)} - in_suites
    assert all(name.startswith("sugarcrepe-") for name in alone)


GOOD = """
name: mine
title: Mine
kind: zero_shot
group: own
data: {source: some/where, num_items: 3}
columns: {image: image, label: label}
classes: {count: 2, names: [cat, dog]}
prompts: ["a {}"]
"""


def test_a_manifest_in_ten_lines_is_read():
    (task,) = parse_manifest(yaml.safe_load(GOOD), "here")
    assert (task.name, task.primary_metric, task.data.split, task.classes.names) == (
        "mine",
        "top1",
        "test",
        ["cat", "dog"],
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: mine", "name: ../mine", "name must be at most 100 letters"),
        ("name: mine", "name: a/b", "name must be at most 100 letters"),
        ("name: mine", "name: .mine", "name must be at most 100 letters"),
        ("name: mine", 'name: "{variant}"\nvariants: [../a]', "name must be at most 100 letters"),
        ("source: some/where", "source: some/where, own_captions: x.csv", "here: data.own_captions: unknown key; "),
        ("source: some/where", "source: s3://bucket/a.parquet", "here: data: source must be a dataset on the Hub"),
        ("source: some/where", "source: https://10.0.0.1/a.parquet", "reaches no other server"),
        (
            "name: mine\ntitle: Mine\nkind: zero_shot\ngroup: own\ndata: {source: some/where",
            'name: "a{variant}"\ntitle: Mine\nkind: zero_shot\ngroup: own\nvariants: [s3]\ndata: {source: "{variant}://a"',
            "reaches no other server",
        ),
        ('["a {}"]', "resource:../manifest.py", "there is no resource '../manifest.py'"),
        ("title: Mine", "titel: Mine", "here: titel: unknown key; did you mean 'title'?"),
        ("title: Mine\n", "", "here: title: is missing"),
        ("num_items: 3", "num_item: 3", "here: data.num_item: unknown key; did you mean 'num_items'?"),
        ("num_items: 3", "num_items: three", "here: data.num_items: must be a whole number, got the text 'three'"),
        ("num_items: 3", "num_items: true", "here: data.num_items: must be a whole number, got true"),
        ("kind: zero_shot", "kind: zeroshot", "kind: must be 'retrieval', 'zero_shot'"),
        ("label: label}", "labels: label}", "here: columns.labels: unknown key; did you mean 'label'?"),
        ("label: label}", "image_2: label}", "here: columns.image_2: unknown key"),
        ("names: [cat, dog]", "names: [cat, no]", "here: classes.names[1]: must be text, got false"),
        ("names: [cat, dog]", "names: labels", "names must be a list, feature"),
        ("count: 2", "count: 1", "at least 2 classes"),
        ("count: 2", "count: 2, pick: [1]", "pick must hold 2 different places"),
        ('["a {}"]', '["a cat"]', "a prompt must hold {} once"),
        ('["a {}"]', "resource:nothing.txt", "there is no resource 'nothing.txt'"),
        ("group: own", "group: own\nmetric: recall", "metric must be one of top1"),
        ("group: own", "group: own\nvariants: [a, b]", "a name with {variant} in it"),
        ("group: own", "group: own\nmax_captions: 0", "here: max_captions: must be greater than 0, got 0"),
        (
            "name: mine",
            'name: "{variant}"\nvariants: {a: {num_item: 3}}',
            "here: variants.a.num_item: must be 'num_items'",
        ),
        ("group: own", "group: own\nvariant_of: x", "here: variant_of: unknown key; "),
        (
            "source: some/where",
            "source: some/where, layout: tables",
            "here: data.layout: must be 'table', 'caption_file', ",
        ),
        ("source: some/where", "source: some/where, caption_file: x.csv", "caption_file belongs to the layout"),
    ],
)
def test_a_wrong_manifest_is_refused(old: str, new: str, message: str):
    assert old in GOOD
    with pytest.raises(ValueError) as error:
        parse_manifest(yaml.safe_load(GOOD.replace(old, new)), "here")
    assert message in str(error.value)


def test_suites_of_ones_own(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine.yaml").write_text(GOOD)
    (tmp_path / "suite.yaml").write_text(
        "name: all\ntasks:\n  - dtd\n  - more/mine.yaml\n  - {name: two, title: Two, kind: retrieval, group: own, data: {source: x}, "
        "columns: {image: i, captions: c}}\n"
    )
    assert [task.name for task in load_suite(tmp_path / "suite.yaml").tasks] == ["dtd", "mine", "two"]
    assert [task.name for task in load_suite(tmp_path / "more" / "mine.yaml").tasks] == ["mine"]
    assert [task.name for task in load_suite("dtd").tasks] == ["dtd"]

    def refused(content: str) -> str:
        (tmp_path / "wrong.yaml").write_text(content)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_suite(tmp_path / "wrong.yaml")
        return str(error.value)

    assert "several tasks are called 'dtd'" in refused("name: x\ntasks: [dtd, dtd]")
    assert "wrong.yaml: tasks: must be a list, got the text 'dtd'" in refused("name: x\ntasks: dtd")
    assert "wrong.yaml: tasks: name at least one" in refused("name: x\ntasks: []")
    assert "wrong.yaml: tasks[0]: must be text or a mapping, got 3" in refused("name: x\ntasks: [3]")
    assert "wrong.yaml: must be a mapping, got ['x']" in refused("[x]")
    assert "there is no benchmark 'dtds'; did you mean 'dtd'?" in refused("name: x\ntasks: [dtds]")
    assert "there is no file" in refused("name: x\ntasks: [other.yaml]")
    assert "lies outside of" in refused(f"name: x\ntasks: [{tmp_path.parent}/other.yaml]")
    assert "lies outside of" in refused("name: x\ntasks: [../other.yaml]")
    (tmp_path / "link.yaml").symlink_to(MANIFESTS / "dtd.yaml")
    assert "lies outside of" in refused("name: x\ntasks: [link.yaml]")
    assert "wrong.yaml: task: unknown key; did you mean 'tasks'?" in refused("name: x\ntask: [dtd]")
    assert "wrong.yaml, line 1: expected the node content" in refused("name: [")
    with pytest.raises(ValueError, match="there is no suite 'zero-shots'; did you mean 'zero-shot'"):
        load_suite("zero-shots")


def test_the_page_lists_every_benchmark_with_its_count():
    page = (MANIFESTS.parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name in manifest_names():
        tasks = load_manifest(name)
        data = tasks[0].data
        if data.layout == "openmoji":
            continue
        shown = name if len(tasks) == 1 else {"sugarcrepe-kinds": "sugarcrepe-…"}.get(name, f"{name}-…")
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{shown}` |")]
        count = "7,511 in all" if name == "sugarcrepe-kinds" else f"{data.num_items:,} |"
        assert f"`{data.source}`" in row and count in row and tasks[0].primary_metric in row
