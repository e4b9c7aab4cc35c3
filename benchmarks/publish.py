"""Bytes of a lean publish of an 8B-shaped model: foretold, sent by the real client over HTTP, and of the full one.

    python benchmarks/publish.py --json publish.json [--tower L/14]

The model has the shape of CLIP ViT-L/14 beside Llama-3-8B with an adapter of 4 blocks, expansion 2, in bfloat16. Image encoder and adapter are
random; the LLM is never made, as a lean checkpoint only names it. It is published to the stand-in Hub of the tests, which counts what arrives,
twice: the second time nothing is to be sent. "peer" is the full checkpoint, as `publish --full --dry-run` foretells it. Needs 3 GB of disk in the
temporary directory, 3 GB of memory and a minute.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub import constants


sys.path.insert(0, str(Path(__file__).parents[1]))  # for the stand-in Hub of the tests

TOWERS = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 32,
    },
    "L/14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}


def write_checkpoint(folder: Path, tower: str, adapter_num_layers: int = 4) -> int:
    """A lean checkpoint in `folder`; returns the bytes of its tensors."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor
    from tests.modeling_proclip import tiny

    vision = {"model_type": "clip_vision_model", "image_size": 224, "dtype": "bfloat16", **TOWERS[tower]}
    config = ProCLIPConfig(
        vision_config=vision,
        text_config=LLAMA_3_8B,
        projection_dim=768,
        adapter_num_layers=adapter_num_layers,
        text_model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct",
        text_model_sha256="0" * 64,
    )
    model = ProCLIPModel(config, load_text_model=False).to(torch.bfloat16)
    model.save_pretrained(folder)
    ProCLIPProcessor(CLIPImageProcessorPil(), tiny.tokenizer()).save_pretrained(folder)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def measure(tower: str, adapter_num_layers: int = 4) -> dict[str, float]:
    """Bytes of the tensors, foretold and sent, of a second publish, and of the full checkpoint; seconds of the first publish."""
    from hub_cards.publish import publish
    from tests.hub_server import TOKEN, hub_server

    with tempfile.TemporaryDirectory() as folder, hub_server(Path(folder) / "hub") as hub:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub.url, False, True
        checkpoint = Path(folder) / "checkpoint"
        tensors = write_checkpoint(checkpoint, tower, adapter_num_layers)
        foretold = publish(checkpoint, "alice/lean", dry_run=True)
        full = publish(checkpoint, "alice/full", lean=False, dry_run=True)
        start = time.perf_counter()
        publish(checkpoint, "alice/lean", token=TOKEN)
        seconds = time.perf_counter() - start
        sent, lfs = hub.bytes_received(), hub.bytes_received("^/lfs/")
        arrived = sum(blob.size for name, blob in hub.files("alice/lean").items() if name != ".gitattributes")
        publish(checkpoint, "alice/lean", token=TOKEN)
        return {
            "tensors": tensors,
            "foretold": foretold.num_bytes,
            "arrived": arrived,
            "weights sent": lfs,
            "request bodies": sent,
            "second publish, weights": hub.bytes_received("^/lfs/") - lfs,
            "second publish, request bodies": hub.bytes_received() - sent,
            "the LLM, named": foretold.text_model_bytes,
            "full, foretold": full.num_bytes,
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=list(TOWERS), default="L/14")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = measure(options.tower)
    for name, value in found.items():
        print(f"{name:32} {value:>18,.1f}" if name == "seconds" else f"{name:32} {value:>18,}")
    row = {
        "name": f"bytes of a publish, {options.tower} beside Llama-3-8B, lean against full",
        "ours": found["request bodies"],
        "peer": found["full, foretold"],
        "ratio": found["full, foretold"] / found["request bodies"],
        "unit": "bytes",
    }
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    options.json.write_text(
        json.dumps({"machine": machine | {"date": time.strftime("%Y-%m-%d")}, "rows": [row], **found}, indent=2)
    )


if __name__ == "__main__":
    main()
