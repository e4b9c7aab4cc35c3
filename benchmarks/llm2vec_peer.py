"""The peer of `text_encoding.py`: encodes texts with llm2vec, in the environment that has it.

    python llm2vec_peer.py MODEL_FOLDER THREADS DTYPE

Reads one JSON object a line, `{"texts": [...], "batch_size": 32, "save": FILE or null}`, and answers each by one:
`{"seconds": ..., "cpu_seconds": ..., "shapes": [[batch, tokens], ...]}`, after the embeddings are saved to FILE (.npy) if there is one.
"""

import json
import sys
import time

import numpy as np
import torch
from llm2vec import LLM2Vec


def main(folder: str, threads: str, dtype: str) -> None:
    """Answers requests on standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # llm2vec prints what it does
    torch.set_num_threads(int(threads))
    encoder = LLM2Vec.from_pretrained(folder, pooling_mode="mean", max_length=512, torch_dtype=getattr(torch, dtype))
    shapes: list[list[int]] = []
    forward = encoder.forward

    def recording_forward(features):
        shapes.append(list(features["input_ids"].shape))
        return forward(features)

    encoder.forward = recording_forward
    for line in sys.stdin:
        request = json.loads(line)
        shapes.clear()
        started, cpu_started = time.perf_counter(), time.process_time()
        embeddings = encoder.encode(request["texts"], batch_size=request["batch_size"], show_progress_bar=False)
        answer = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "shapes": shapes,
        }
        if request["save"]:
            np.save(request["save"], embeddings.float().numpy())
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
