"""Stage 0 on a real LLM: SmolLM2-135M learns, on one core, that the names of a thing in 14 languages mean the same.

    python examples/caption_contrastive_smollm2.py train --output stage-0
    python examples/caption_contrastive_smollm2.py measure --output stage-0

`train` writes the LoRA to `stage-0/adapter` and the curve of the held-out measures to `stage-0/curve.json`; stopped, it goes on where it was.
`measure` runs the quickstart's ProCLIP (stage 1 and 2) on the LLM as it is and as it was tuned, with `adapter_input_norm` "standardize" and
"l2", and writes everything to `stage-0/results.json`.

What is trained on: the names of emoji in 14 languages (Unicode CLDR, through the package `emoji`), an English name and one in another
language making a pair; one batch in ten pairs two English descriptions of one picture, with a third of another picture of the same thing as
hard negative. What is held out: the 150 concepts by whose names the quickstart compares languages. None of their names is trained on, in
any language, nor a name that another emoji shares with them; single words of theirs can be ("cat" in "black cat").
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, TrainerCallback

from trainers import CaptionContrastiveConfig, CaptionContrastiveTrainer
from trainers.quickstart.emoji_pictures import LANGUAGES, Concept, View, long_caption, random_view
from trainers.quickstart.evaluate import score, zero_shot_by_language
from trainers.quickstart.language_model import merge_tuning, native_dtype, unpack_language_model
from trainers.quickstart.run import ADAPTER, Quickstart
from trainers.quickstart.task import SIZES, make_task


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 128,
    "learning_rate": 5e-4,
    "warmup_steps": 50,
    "lora_num_layers": 12,
    "lora_dropout": 0.0,
    "cache_frozen_layers": True,
    "plain_text_share": 0.1,
    "micro_batch_tokens": 1000,
}


def all_concepts() -> list[Concept]:
    """Every emoji that has a name in all languages, without the copies in five skin tones."""
    import emoji

    emoji.config.load_language()
    return [
        Concept(character, {language: data[language].strip(":").replace("_", " ") for language in LANGUAGES})
        for character, data in emoji.EMOJI_DATA.items()
        if data["status"] == emoji.STATUS["fully_qualified"]
        and all(language in data for language in LANGUAGES)
        and "skin_tone" not in data["en"]
    ]


def held_out_concepts() -> list[Concept]:
    """The 150 concepts by which the quickstart compares languages."""
    task = make_task(SIZES["full"], seed=0)
    return [task.concepts[i] for i in task.language_concepts]


def trained_concepts() -> list[Concept]:
    """The others, without those that share a name with a held-out one."""
    taken = {(language, name.casefold()) for c in held_out_concepts() for language, name in c.names.items()}
    return [c for c in all_concepts() if not taken & {(lang, name.casefold()) for lang, name in c.names.items()}]


def name_rows(concepts: list[Concept]) -> list[dict[str, Any]]:
    return [
        {"text": [concept.name, concept.names[language]], "id": concept.character}
        for concept in concepts
        for language in LANGUAGES
        if concept.names[language] != concept.name
    ]


def descriptions(concept: Concept, view: View) -> list[str]:
    """Every way of saying how the picture looks."""
    return sorted({long_caption(concept, view, random.Random(i)) for i in range(16)})


def description_rows(concepts: list[Concept], seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"descriptions-{seed}")
    rows = []
    for concept in concepts:
        query, document = rng.sample(descriptions(concept, random_view(rng)), 2)
        rows.append({"text": [query, document], "negative": long_caption(concept, random_view(rng), rng)})
    return rows


def evaluation_rows() -> dict[str, list[dict[str, Any]]]:
    """Of held-out concepts: two English descriptions of one picture, and the English name with that in each other language."""
    concepts, rng = held_out_concepts(), random.Random("evaluation")
    rows = {"captions": [{"text": rng.sample(descriptions(c, random_view(rng)), 2)} for c in concepts * 2]}
    for language in LANGUAGES[1:]:
        rows[language] = [{"text": [concept.name, concept.names[language]]} for concept in concepts]
    return rows


class Clock(TrainerCallback):
    """CPU seconds of the steps, without evaluation, in this process."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.start
        self.steps += 1


def train(output: Path, steps: int, seed: int) -> None:
    unpack_language_model(output / "llm", native_dtype())
    config = AutoConfig.from_pretrained(output / "llm")
    config.is_causal = False
    # Eager attention: the fused kernel's backward is half as fast again on texts as short as these.
    llm = AutoModel.from_pretrained(output / "llm", config=config, attn_implementation="eager")
    concepts = trained_concepts()
    names, plain = name_rows(concepts), description_rows(concepts, seed)
    print(f"{len(concepts)} concepts, {len(names)} pairs of names, {len(plain)} pairs of descriptions")
    arguments = CaptionContrastiveConfig(
        str(output / "training"),
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=80,
        eval_on_start=True,
        save_steps=50,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=native_dtype() == torch.bfloat16,
        seed=seed,
        **SETTINGS,
    )
    trainer = CaptionContrastiveTrainer(
        llm,
        arguments,
        names,
        evaluation_rows(),
        processing_class=AutoTokenizer.from_pretrained(output / "llm"),
        plain_text_dataset=plain,
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=any((output / "training").glob("checkpoint-*")) or None)
    trainer.save_model(str(output / "adapter"))
    curve = {
        "steps": steps,
        "seed": seed,
        "settings": SETTINGS,
        "num_concepts": len(concepts),
        "num_held_out": len(held_out_concepts()),
        "num_name_pairs": len(names),
        "num_description_pairs": len(plain),
        "cpu_seconds_per_step": round(clock.seconds / max(clock.steps, 1), 2),
        "log": trainer.state.log_history,
    }
    (output / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")


def measure(output: Path, seed: int) -> None:
    unpack_language_model(output / "llm", native_dtype())
    merge_tuning(output / "llm", output / "llm-tuned", output / "adapter")
    file = output / "results.json"
    training = json.loads((output / "curve.json").read_text())
    results = json.loads(file.read_text()) if file.is_file() else {"training": training, "rows": []}
    for llm in ("plain", "tuned"):
        for norm in ("standardize", "l2"):
            if any((row["llm"], row["input_norm"]) == (llm, norm) for row in results["rows"]):
                continue
            row = {"llm": llm, "input_norm": norm, "seed": seed, **align(output, seed, llm, norm)}
            results["rows"].append(row)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(file)


def align(output: Path, seed: int, llm: str, norm: str) -> dict[str, Any]:
    """The quickstart's scores after stage 1 and stage 2, and zero-shot by language for concepts whose names stage 0 did train on."""
    quickstart = Quickstart(output, "full", seed, llm, {**ADAPTER, "adapter_input_norm": norm})
    quickstart.draw()
    quickstart.pair_with_llm()
    task, trained = quickstart.task, {concept.character for concept in trained_concepts()}
    familiar = [i for i in range(1, len(task.concepts), 4) if task.concepts[i].character in trained]
    prompts = [task.class_prompts(language, familiar) for language in LANGUAGES]
    quickstart.build_stores([text for language in prompts for ensemble in language for text in ensemble])

    def scores(model) -> dict[str, Any]:
        images, embed_texts = quickstart.encode(model)
        languages = zero_shot_by_language(task, images, embed_texts, familiar)
        return {**score(task, images, embed_texts), "zero_shot_by_language_trained": languages}

    model = quickstart.inherit(quickstart.untrained())
    stage_1 = scores(model)
    model = quickstart.tune(model, "proclip", "ProCLIP, stage 2", quickstart.size.tuning_steps)
    return {"num_trained": len(familiar), "stage_1": stage_1, "stage_2": scores(model)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--output", type=Path, default=Path("stage-0"))
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.what == "train":
        train(arguments.output, arguments.steps, arguments.seed)
    else:
        measure(arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
