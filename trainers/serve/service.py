"""The model behind the server: requests to embeddings, in batches that several requests share."""

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from transformers import BatchFeature

from trainers.compute.precision import unit_length
from trainers.evaluation.scoring.encoders import Encoder, join_images

from .batching import Batcher, Item
from .inputs import EmbeddingRequest, InputError, decode_input


# What an image costs of the token budget: the patches of a ViT of 224 pixels and 14 a patch.
IMAGE_TOKENS = 256
# How much waits, in batches, before requests are turned away.
MAX_WAITING_BATCHES = 64


@dataclass(frozen=True)
class Limits:
    """What a request and a batch may hold at most."""

    inputs: int = 256
    body_bytes: int = 32 << 20
    batch_tokens: int = 16_384


@dataclass(frozen=True)
class Embeddings:
    """Embeddings `(num_inputs, dim)`, float32, of unit length, and the tokens that were read for them."""

    values: torch.Tensor
    num_tokens: int


class EmbeddingService:
    """Embeds what requests hold.

    Args:
        encoder: the model.
        limits: what a request and a batch may hold.
    """

    def __init__(self, encoder: Encoder, limits: Limits):
        self.encoder, self.limits = encoder, limits
        # A copy, which never truncates: the encoder's own changes its settings on another thread.
        self._tokenizer = copy.deepcopy(encoder.processor.tokenizer)
        self._max_length: int = encoder.protocol()["text"]["max_length"]
        self.registry = CollectorRegistry()
        self._inputs = Counter("proclip_inputs", "Texts and images embedded.", ["kind"], registry=self.registry)
        self._tokens = Counter("proclip_tokens", "Tokens of texts embedded.", registry=self.registry)
        sizes = Histogram(
            "proclip_batch_inputs",
            "Texts and images in a batch.",
            buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256],
            registry=self.registry,
        )
        self._batcher = Batcher(
            self._embed, limits.batch_tokens, MAX_WAITING_BATCHES * limits.batch_tokens, sizes.observe
        )
        Gauge("proclip_waiting_inputs", "Texts and images that wait.", registry=self.registry).set_function(
            lambda: self._batcher.waiting
        )

    @property
    def healthy(self) -> bool:
        """Whether requests are being answered."""
        return self._batcher.alive

    def close(self) -> None:
        """Answer what was accepted, and end."""
        self._batcher.close()

    async def answer(self, request: EmbeddingRequest) -> Embeddings:
        """The embeddings that `request` asks for.

        Raises:
            InputError: If it holds what cannot be embedded.
            Overloaded: If too much is waiting.
        """
        if request.model not in (None, self.encoder.name):
            raise InputError(f"there is no model {request.model!r} here, but {self.encoder.name!r}", "model", 404)
        if len(request.inputs) > self.limits.inputs:
            raise InputError(f"{len(request.inputs)} inputs, and at most {self.limits.inputs} are taken", "input", 413)
        items = await asyncio.to_thread(self._prepare, request)
        self._batcher.submit(items)
        embeddings = torch.stack(await asyncio.gather(*(asyncio.wrap_future(item.result) for item in items)))
        if (dimensions := request.dimensions) is not None:
            if dimensions > embeddings.shape[1]:
                raise InputError(f"dimensions must be at most {embeddings.shape[1]}, got {dimensions}", "dimensions")
            embeddings = unit_length(embeddings[:, :dimensions])
        texts = [item for item in items if isinstance(item.content, str)]
        num_tokens = sum(item.num_tokens for item in texts)
        self._inputs.labels("text").inc(len(texts))
        self._inputs.labels("image").inc(len(items) - len(texts))
        self._tokens.inc(num_tokens)
        return Embeddings(embeddings, num_tokens)

    def _prepare(self, request: EmbeddingRequest) -> list[Item]:
        """Decodes and counts: everything that can be wrong with an input shows here, before it shares a batch with others."""
        items = []
        for number, given in enumerate(request.inputs):
            name = f"input[{number}]" if isinstance(request.input, list) else "input"
            content = decode_input(given, name)
            if isinstance(content, Image.Image):
                items.append(Item(self.encoder.prepare_images([content]), IMAGE_TOKENS))
                continue
            num_tokens = len(self._tokenizer(content, verbose=False)["input_ids"])
            if num_tokens > self._max_length and not request.truncate:
                raise InputError(
                    f'{name} has {num_tokens} tokens and the model reads {self._max_length}: shorten it, or pass "truncate": true',
                    "input",
                )
            items.append(Item(content, min(num_tokens, self._max_length)))
        return items

    def _embed(self, contents: Sequence[str | BatchFeature]) -> torch.Tensor:
        texts = [i for i, content in enumerate(contents) if isinstance(content, str)]
        images = [i for i, content in enumerate(contents) if not isinstance(content, str)]
        rows: dict[int, torch.Tensor] = {}
        for batch in self.encoder.encode_texts([contents[i] for i in texts]) if texts else ():
            for index, embedding in zip(batch.indices, self.encoder.project_texts(batch.embeddings), strict=True):
                rows[texts[index]] = embedding
        if images:
            prepared = join_images([contents[i] for i in images])
            rows |= dict(zip(images, self.encoder.encode_images(prepared), strict=True))
        return unit_length(torch.stack([rows[i] for i in range(len(contents))]).float().cpu())
