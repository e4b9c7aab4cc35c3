"""What each further token of long captions is worth: retrieval by their first 32, 77, 128, ... tokens, beside CLIP.

    python examples/long_captions.py my-proclip photos/ --clip openai/clip-vit-large-patch14

Captions lie beside the images (photo.txt beside photo.jpg), in the folder's metadata.jsonl, or in a column of a table
(pairs.parquet --column long). CLIP reads 77 tokens at most. It costs one pass over the images, and one pass over the captions per length.
"""

import argparse

import torch
from transformers import AutoModel, AutoProcessor

import modeling_proclip  # noqa: F401 - registers the classes
from trainers.data import PairSource, encode_texts, open_pairs
from trainers.evaluation import retrieval_recall


@torch.inference_mode()
def embed_images(model, processor, images: list, batch_size: int = 32) -> torch.Tensor:
    """Unit-length embeddings, `(num_images, projection_dim)`."""
    batches = [
        processor(images=images[i : i + batch_size], return_tensors="pt") for i in range(0, len(images), batch_size)
    ]
    embeds = torch.cat([model.get_image_features(**batch).pooler_output for batch in batches])
    return torch.nn.functional.normalize(embeds, dim=1)


@torch.inference_mode()
def embed_texts(model, processor, texts: list[str]) -> torch.Tensor:
    """Unit-length embeddings, `(num_texts, projection_dim)`: a ProCLIP's LLM embeddings go through the adapter."""
    indices, batches, _ = zip(*encode_texts(texts, model, processor))  # sorted by length
    order = torch.tensor([i for batch in indices for i in batch]).argsort()
    embeds = torch.cat(batches)[order]
    if model.config.model_type == "proclip":
        embeds = model.get_text_features(llm_embeds=embeds).pooler_output
    return torch.nn.functional.normalize(embeds, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="ProCLIP checkpoint, a folder or a name on the Hub")
    parser.add_argument("source", help="folder or table of images with long captions")
    parser.add_argument("--column", default="text", help="column with the long caption")
    parser.add_argument("--clip", help="CLIP to compare with")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 77, 128, 256, 512])
    args = parser.parse_args()

    rows = open_pairs(PairSource(source=args.source, text_columns=args.column))
    images, captions = zip(*((row["image"], row["text"][0]) for row in rows))
    own_image = torch.arange(len(images))

    print(f"{'':24}{'I→T':>8}{'T→I':>8}   recall@1 of {len(images)} images")
    for name in [args.clip, args.model] if args.clip else [args.model]:
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(name)
        image_embeds = embed_images(model, processor, list(images))
        for length in args.lengths if name == args.model else [model.config.text_config.max_position_embeddings]:
            if name == args.model:
                processor = AutoProcessor.from_pretrained(name, max_length=length)
            recall = retrieval_recall(image_embeds, embed_texts(model, processor, list(captions)), own_image, ks=(1,))
            label = f"{model.config.model_type}, {length} tokens"
            print(f"{label:24}{recall['i2t_r@1']:8.1%}{recall['t2i_r@1']:8.1%}", flush=True)


if __name__ == "__main__":
    main()
