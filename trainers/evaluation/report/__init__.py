"""The "did I break CLIP?" report: verdict, plots and one self-contained HTML page from the results of an evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path

from trainers.storage.files import write_file

from .build import build_report
from .pairing import ModelResults
from .verdict import MARGIN


def write_report(
    output_dir: str | Path,
    models: Sequence[str | Path] | None = None,
    baseline: str | Path | None = None,
    *,
    margin: float = MARGIN,
) -> Path:
    """Writes `report.json` and `report.html` to `output_dir`.

    Args:
        output_dir: of `proclip evaluate`: it has `results.json`, and `baseline/` and `also/NAME/` where there were such models.
        models: the results folders to report instead, the one that examples are shown for first.
        baseline: with `models`, the results folder of the model that they came from.
        margin: the largest loss that counts as kept, a fraction of 1.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: without results.
        ValueError: if results are broken, or nothing was scored on the same data.
        ModuleNotFoundError: without matplotlib.
    """
    from .render import render  # matplotlib is needed for a report alone

    output_dir = Path(output_dir)
    if models is None:
        models = [output_dir, *sorted(path.parent for path in output_dir.glob("also/*/results.json"))]
        baseline = output_dir / "baseline" if (output_dir / "baseline" / "results.json").is_file() else None
    results = [ModelResults.read(Path(folder)) for folder in models]
    report = build_report(results, ModelResults.read(Path(baseline)) if baseline else None, margin=margin)
    html = render(report, results[0].examples())
    output_dir.mkdir(parents=True, exist_ok=True)
    write_file(output_dir / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
    write_file(output_dir / "report.html", html.encode("utf-8"))
    return output_dir / "report.html"


__all__ = ["build_report", "write_report"]
