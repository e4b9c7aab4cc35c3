"""The evaluation's report on languages: CLIP, ProCLIP on Gemma 3 and ProCLIP on SmolLM2 side by side.

    python examples/language_report.py --output-dir language-report

Runs `proclip quickstart` with each LLM where its checkpoint is not there yet, and evaluates both against the CLIP that they came from. Gemma 3 is
under the Gemma Terms of Use. Open `report.html` in the output directory. docs/language_report/ was made by this command.
"""

import argparse
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path


PROCLIP = [sys.executable, "-m", "trainers.cli"]


def checkpoint(folder: Path, llm: str) -> Path:
    """The quickstart's ProCLIP on `llm`, trained unless it is in `folder`, which gives the report its name."""
    if not folder.is_dir():
        output = folder.with_name(f"{folder.name}-quickstart")
        subprocess.run([*PROCLIP, "quickstart", "--llm", llm, "--output-dir", output], check=True)
        shutil.copytree(output / "proclip", folder)
    return folder


def main() -> None:
    """Makes what is missing and evaluates it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("language-report"), metavar="DIR")
    output = parser.parse_args().output_dir
    output.mkdir(parents=True, exist_ok=True)
    gemma3, smollm2 = checkpoint(output / "proclip-gemma3", "gemma3"), checkpoint(output / "proclip-smollm2", "plain")
    clip = str(files("trainers.quickstart") / "assets" / "emoji-clip")
    options = ["--suite", "quickstart-languages", "--baseline", clip, "--also", smollm2, "--output-dir", output]
    subprocess.run([*PROCLIP, "evaluate", gemma3, *options], check=True)


if __name__ == "__main__":
    main()
