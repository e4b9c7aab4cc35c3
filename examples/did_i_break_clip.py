"""The report "Did I break CLIP?" on the quickstart's data: CLIP, LLM2CLIP and ProCLIP side by side.

    python examples/did_i_break_clip.py --output-dir did-i-break-clip

Runs `proclip quickstart` where its output is not there yet (eight minutes on two cores), trains LLM2CLIP as the quickstart does and keeps its
checkpoint (two minutes), and evaluates both against the CLIP that they came from (three minutes). Open `report.html` in the output directory.
docs/example_report/ was made by this command.
"""

import argparse
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from trainers.quickstart.baseline import train_llm2clip


def main() -> None:
    """Makes what is missing and evaluates it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart-dir", type=Path, default=Path("quickstart-output"), metavar="DIR")
    parser.add_argument("--output-dir", type=Path, default=Path("did-i-break-clip"), metavar="DIR")
    arguments = parser.parse_args()

    proclip = [sys.executable, "-m", "trainers.cli"]
    if not (arguments.quickstart_dir / "proclip").is_dir():
        subprocess.run([*proclip, "quickstart", "--output-dir", arguments.quickstart_dir], check=True)
    llm2clip = train_llm2clip(arguments.quickstart_dir)
    clip = str(files("trainers.quickstart") / "assets" / "emoji-clip")
    evaluation = [
        "--suite",
        "quickstart",
        "--baseline",
        clip,
        "--also",
        llm2clip,
        "--output-dir",
        arguments.output_dir,
    ]
    subprocess.run([*proclip, "evaluate", arguments.quickstart_dir / "proclip", *evaluation], check=True)


if __name__ == "__main__":
    main()
