"""The table that `proclip evaluate` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hub_cards.measurements import precision


def print_results(
    results: dict[str, Any], baseline: dict[str, Any] | None = None, console: Console | None = None
) -> None:
    """Print the numbers of a model in percent, and the difference to the baseline in points; both are contents of `results.json`, of the same tasks."""
    console = console or Console(highlight=False)
    console.print(results_table(results, baseline))
    for model in (results, *([] if baseline is None else [baseline])):
        console.print(Text(f"{model['model']['name']}: {precision(model['protocol'])}", style="dim"))
    sizes = {_sizes(task["embedding"]) for task in results["tasks"] if "embedding" in task}
    for size in sorted(sizes):
        console.print(Text(size, style="dim"))
    for task in results["tasks"]:
        for note in task["notes"]:
            console.print(Text(f"{task['name']}: {note}", style="dim"))
        cut = task["protocol"]["num_truncated"]
        if cut:
            console.print(Text(f"{task['name']}: the model did not read {cut} texts to the end.", style="dim"))
    if results["partial"]:
        console.print(
            Text(
                f"Partial: {results['partial']['limit']} rows of each benchmark. Not comparable with published numbers."
            )
        )


def results_table(results: dict[str, Any], baseline: dict[str, Any] | None = None) -> Table:
    """The table by itself: a row for each task and main metric, and the mean of each group of several tasks."""
    model = results["model"]["name"]
    table = Table("benchmark", "metric", model, box=box.SIMPLE_HEAD)
    table.columns[2].justify = "right"
    if baseline is not None:
        for title in (baseline["model"]["name"], "difference"):
            table.add_column(title, justify="right")
    whole = {task["name"]: task["embedding"]["whole"]["metrics"] for task in results["tasks"] if "embedding" in task}
    for title in ("whole", "lost") if whole else ():
        table.add_column(title, justify="right")
    before = {} if baseline is None else {task["name"]: task["metrics"] for task in baseline["tasks"]}
    groups: dict[str, list[dict[str, Any]]] = {}
    for task in results["tasks"]:
        groups.setdefault(task["group"], []).append(task)
    for group, tasks in groups.items():
        for task in tasks:
            for metric in _shown(task):
                ours, name = task["metrics"][metric], task["name"]
                _add(table, name, metric, ours, before.get(name, {}).get(metric), whole.get(name, {}).get(metric))
        if len(tasks) > 1 and len({task["metric"] for task in tasks}) == 1:
            metric = tasks[0]["metric"]
            for metric in _shown(tasks[0]):
                ours = sum(task["metrics"][metric] for task in tasks) / len(tasks)
                theirs = [before[task["name"]][metric] for task in tasks] if baseline is not None else []
                _add(
                    table, f"{group}, mean", metric, ours, sum(theirs) / len(theirs) if theirs else None, style="bold"
                )
        table.add_section()
    return table


def _sizes(embedding: dict[str, Any]) -> str:
    whole = embedding["whole"]
    return (
        f"Images are stored as {embedding['dim']} dimensions in {embedding['precision']}, {embedding['bytes']:,} bytes each; whole in float32 "
        f"({whole['dim']} dimensions) they take {whole['bytes']:,}, by which the columns whole and lost are measured."
    )


def _shown(task: dict[str, Any]) -> list[str]:
    return ["i2t_r@1", "t2i_r@1"] if task["kind"] == "retrieval" else [task["metric"]]


def _add(
    table: Table,
    name: str,
    metric: str,
    ours: float,
    theirs: float | None,
    whole: float | None = None,
    style: str = "",
) -> None:
    cells: list[Any] = [Text(name), Text(metric), f"{100 * ours:.1f}"]
    if theirs is not None:
        cells += [f"{100 * theirs:.1f}", f"{100 * (ours - theirs):+.1f}"]
    if whole is not None:
        cells += [f"{100 * whole:.1f}", f"{100 * (whole - ours):.1f}"]
    table.add_row(*cells, style=style)
