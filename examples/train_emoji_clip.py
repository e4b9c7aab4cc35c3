"""Train the quickstart's teacher: a small CLIP that learns the OpenMoji concepts from pictures and short English captions.

    python examples/train_emoji_clip.py --minutes 60

It writes a stock `CLIPModel` (fp16 safetensors), its own BPE tokenizer and its image processor to
`trainers/quickstart/assets/emoji-clip`, where `proclip quickstart` finds them, with its zero-shot score in `score.json`.
"""

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from trainers.openmoji.images import IMAGE_SIZE, ZERO_SHOT_TEMPLATES, load_concepts, random_view, render, short_caption


VOCABULARY = 1280
CONTEXT = 24  # tokens; the longest caption has fewer
BATCH = 512  # different concepts, so that no two captions of a batch fit one picture
PEAK_LEARNING_RATE = 1.5e-3
WARM_UP = 0.05  # share of the training time


def train_tokenizer(concepts) -> CLIPTokenizer:
    rng = random.Random(0)
    captions = [short_caption(concept, random_view(rng), rng) for concept in concepts for _ in range(20)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    empty = CLIPTokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[])
    return empty.train_new_from_iterator(captions, VOCABULARY, show_progress=False, end_of_word_suffix="</w>")


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        vision_config={**tower, "num_hidden_layers": 5, "image_size": IMAGE_SIZE, "patch_size": 8},
        text_config={
            **tower,
            **special,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT,
        },
        projection_dim=128,
    )
    return CLIPModel._from_config(config, attn_implementation="eager")


def draw_batch(concepts, rng, image_processor, tokenizer):
    chosen = rng.sample(concepts, BATCH)
    views = [random_view(rng) for _ in chosen]
    pictures = [render(concept, view) for concept, view in zip(chosen, views)]
    captions = [short_caption(concept, view, rng) for concept, view in zip(chosen, views)]
    pixel_values = image_processor(pictures, return_tensors="pt").pixel_values
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    return {"pixel_values": pixel_values, "input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


@torch.no_grad()
def zero_shot(model, concepts, image_processor, tokenizer, views_per_concept=4) -> float:
    """Share of new pictures whose concept is named right among all concepts, captions by `ZERO_SHOT_TEMPLATES`."""
    rng = random.Random(10_001)
    model.eval()
    classes = 0
    for template in ZERO_SHOT_TEMPLATES:
        tokens = tokenizer([template.format(c.name) for c in concepts], padding=True, return_tensors="pt")
        classes += torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    correct = 0
    for _ in range(views_per_concept):
        pictures = [render(concept, random_view(rng)) for concept in concepts]
        images = model.get_image_features(**image_processor(pictures, return_tensors="pt")).pooler_output
        correct += ((images @ classes.T).argmax(1) == torch.arange(len(concepts))).sum().item()
    model.train()
    return correct / (views_per_concept * len(concepts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="training time; the schedule follows the clock")
    parser.add_argument("--output", type=Path, default=Path("trainers/quickstart/assets/emoji-clip"))
    arguments = parser.parse_args()

    concepts = list(load_concepts())
    tokenizer = train_tokenizer(concepts)
    tokenizer.model_max_length = CONTEXT
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    model = build_model(tokenizer).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.98)
    )

    rng = random.Random(0)
    start, steps = time.monotonic(), 0
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while (progress := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
            cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - WARM_UP) / (1 - WARM_UP)))
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * min(progress / WARM_UP, cosine)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**draw_batch(concepts, rng, image_processor, tokenizer), return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            steps += 1
            bar.n = round(100 * progress)
            if steps % 100 == 0:
                bar.set_postfix(
                    step=steps,
                    loss=f"{loss.item():.3f}",
                    zero_shot=f"{zero_shot(model, concepts, image_processor, tokenizer, 1):.3f}",
                )
            bar.refresh()

    model = model.half()
    staging = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    image_processor.save_pretrained(staging)
    score = {
        "zero_shot_top1": zero_shot(model.float(), concepts, image_processor, tokenizer),
        "concepts": len(concepts),
        "steps": steps,
        "pictures_seen": steps * BATCH,
        "parameters": model.num_parameters(),
        "minutes": arguments.minutes,
    }
    (staging / "score.json").write_text(json.dumps(score, indent=2) + "\n")
    shutil.rmtree(arguments.output, ignore_errors=True)
    staging.rename(arguments.output)
    print(json.dumps(score, indent=2))


if __name__ == "__main__":
    main()
