"""How well the quickstart's ProCLIP is searched in 14 languages, by its language model.

    python examples/multilingual.py --output quickstart-output --llm gemma3 --seed 0
    python examples/multilingual.py --output quickstart-output --llm plain --seed 0

Each call trains ProCLIP (stage 1 and 2, five minutes where the texts are embedded already) and adds a row to `quickstart-output/multilingual.json`: what `proclip quickstart`
measures, and besides

- `zero_shot_strict`: as `zero_shot_by_language`, without the images of concepts whose name in that language stands in a text that stage 1 or 2
  read, as it is an English word too ("koala");
- `captions`: recall@1 of retrieval by long captions in English and five other languages, from one template each that no training read, among
  the images of the concepts by which languages are compared.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from trainers.evaluation import retrieval_recall
from trainers.openmoji.held_out import HeldOutNames
from trainers.openmoji.images import LANGUAGES
from trainers.openmoji.translated_captions import PHRASES
from trainers.quickstart.evaluate import embed_images, score, zero_shot_by_language
from trainers.quickstart.language_model import LANGUAGE_MODELS
from trainers.quickstart.run import Quickstart


def measure(output: Path, llm: str, seed: int, size: str = "full") -> list[dict[str, Any]]:
    """The rows of the teacher, of ProCLIP after stage 1 and of ProCLIP."""
    run = Quickstart(output, size, seed, llm)
    run.draw()
    run.pair_with_llm()
    images = run.task.language_retrieval
    captions = {language: run.task.long_captions(images, language) for language in ("en", *PHRASES)}
    run.build_stores([caption for of_language in captions.values() for caption in of_language])

    def row(model: str, image_embeds: torch.Tensor, embed_texts: Any) -> dict[str, Any]:
        positions = [run.task.retrieval.index(image) for image in images]
        own = torch.arange(len(images))
        return {
            "model": model,
            "llm": llm,
            "seed": seed,
            **score(run.task, image_embeds, embed_texts),
            "zero_shot_strict": strict(run, image_embeds, embed_texts),
            "captions": {
                language: retrieval_recall(image_embeds[positions], embed_texts(texts), own, ks=(1,))
                for language, texts in captions.items()
            },
        }

    rows = [row("clip", embed_images(run.clip, run.test_pixels), run.teacher_store.lookup)]
    model = run.inherit(run.untrained())
    rows.append(row("proclip-stage1", *run.encode(model)))
    model = run.tune(model, "proclip", "ProCLIP, stage 2", run.size.tuning_steps)
    rows.append(row("proclip", *run.encode(model)))
    return rows


def strict(run: Quickstart, image_embeds: torch.Tensor, embed_texts: Any) -> dict[str, float]:
    """Zero-shot by language over all its concepts, on images of those whose name stage 1 and 2 have not read in an English text."""
    task = run.task
    read = " | ".join(task.training_texts)
    result = {}
    for language in LANGUAGES[1:]:
        unread = [i for i in task.language_concepts if not HeldOutNames([task.concepts[i]], [language]).in_text(read)]
        result[language] = zero_shot_by_language(
            task, image_embeds, embed_texts, task.language_concepts, languages=[language], shown=unread
        )[language]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--llm", choices=LANGUAGE_MODELS, default="gemma3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=("small", "full"), default="full")
    arguments = parser.parse_args()
    terms = LANGUAGE_MODELS[arguments.llm].weights.terms
    if terms is not None:
        print(terms)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "multilingual.json"
    rows = measure(arguments.output, arguments.llm, arguments.seed, arguments.size)
    earlier = json.loads(file.read_text()) if file.is_file() else []
    kept = [row for row in earlier if (row["llm"], row["seed"]) != (arguments.llm, arguments.seed)]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps([*kept, *rows], indent=1) + "\n")
    partial.replace(file)


if __name__ == "__main__":
    main()
