"""From rows of captions to batches of stage 0: which two captions make a pair, which rows share a batch, and tokens with little padding."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase

from modeling_proclip.packing import pack_rows
from modeling_proclip.prompt_template import templated_tokenizer
from trainers.data.epochs import EpochDataset
from trainers.text_store.token_batches import TokenRow, length_sorted_batches, pad_rows


class CaptionPairs(EpochDataset):
    """Rows of captions as pairs: two of an image's captions are drawn in each epoch, in random order (LLM2CLIP, arXiv 2411.04997: two
    captions of one image are positives). The draw depends on seed, epoch and row only, as in [`DrawnCaptions`], so a resumed run and a run
    on another number of processes see the same pairs. Plain-text pairs follow after the captions and keep their order.

    Args:
        rows: Rows by number, each a mapping with
            "text": two or more captions of one image;
            "negative" (*optional*): a text, or a list of texts, that must not be found; all of them are used in every epoch;
            "id" (*optional*): identifies the image, a string or number. Rows with the same id are not negatives of each other.
        seed: Seed of the draw.
        plain_rows (*optional*): The same with "text": [query, document], and, *optional*, "instruction", read before the query and not pooled.

    Raises:
        ValueError: If `rows` is a stream, or, when it is read, a row has fewer than two captions or an empty one; names the row.
    """

    def __init__(self, rows: Any, seed: int, plain_rows: Any = None):
        for name, dataset in (("train_dataset", rows), ("plain_text_dataset", plain_rows)):
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"{name} is a stream ({type(dataset).__name__}): pairs are drawn by row number, so pass a dataset with len() and [i]."
                )
        super().__init__()
        self.rows, self.plain_rows, self.seed = rows, plain_rows, seed

    @property
    def num_plain(self) -> int:
        return 0 if self.plain_rows is None else len(self.plain_rows)

    def __len__(self) -> int:
        return len(self.rows) + self.num_plain

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"query": str, "document": str, "negatives": [str], "id": ..., "instruction": str | None}`."""
        if index >= len(self.rows):
            return plain_pair(self.plain_rows[index - len(self.rows)], f"plain-text row {index - len(self.rows)}")
        row = self.rows[index]
        captions = caption_list(row, f"row {index}")
        query, document = random.Random(f"{self.seed} {self.epoch} {index}").sample(captions, 2)
        return _pair(row, captions, query, document, f"row {index}")

    def texts(self) -> Iterator[tuple[str, str | None]]:
        """Every text that training can read, with its instruction."""
        for i in range(len(self.rows)):
            for text in caption_list(self.rows[i], f"row {i}") + negative_list(self.rows[i], f"row {i}"):
                yield text, None
        for i in range(self.num_plain):
            pair = plain_pair(self.plain_rows[i], f"plain-text row {i}")
            yield pair["query"], pair["instruction"]
            yield from ((text, None) for text in [pair["document"], *pair["negatives"]])


class OneSourceBatches(Sampler[int]):
    """Row numbers in an order in which every joined batch holds either captions or plain text, as in the training of LLM2CLIP and LLM2Vec
    (E5Data: batches of one data set, rows that do not fill one left out, batches shuffled): texts of two sources are too easy to tell
    apart. The order depends on the pairs' seed and epoch only.

    Args:
        pairs: The pairs.
        batch_size: Rows of a batch over all processes.
        plain_text_share: Share of the batches with plain text; plain rows are then repeated as needed. By default every row is read once.

    Raises:
        ValueError: If the captions do not fill a batch, or the plain rows do not.
    """

    def __init__(self, pairs: CaptionPairs, batch_size: int, plain_text_share: float | None = None):
        self.pairs, self.batch_size = pairs, batch_size
        self.num_caption_batches, self.num_plain_batches = count_batches(
            len(pairs.rows), pairs.num_plain, batch_size, plain_text_share
        )

    def __len__(self) -> int:
        return (self.num_caption_batches + self.num_plain_batches) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.pairs.seed} {self.pairs.epoch}")
        captions = list(range(len(self.pairs.rows)))
        rng.shuffle(captions)
        plain: list[int] = []
        while len(plain) < self.num_plain_batches * self.batch_size:
            pass_over = list(range(len(captions), len(self.pairs)))
            rng.shuffle(pass_over)
            plain += pass_over
        size = self.batch_size
        batches = [captions[i * size : (i + 1) * size] for i in range(self.num_caption_batches)]
        batches += [plain[i * size : (i + 1) * size] for i in range(self.num_plain_batches)]
        rng.shuffle(batches)
        for batch in batches:
            yield from batch


def count_batches(
    num_captions: int, num_plain: int, batch_size: int, plain_text_share: float | None = None
) -> tuple[int, int]:
    """How many batches of captions and of plain text an epoch has. Arguments and errors as for [`OneSourceBatches`]."""
    caption_batches, plain_batches = num_captions // batch_size, num_plain // batch_size
    if caption_batches == 0:
        raise ValueError(
            f"train_dataset has {num_captions} rows, fewer than one batch of {batch_size} over all processes: lower "
            "per_device_train_batch_size."
        )
    if num_plain and plain_batches == 0:
        raise ValueError(
            f"plain_text_dataset has {num_plain} rows, fewer than one batch of {batch_size} over all processes."
        )
    if num_plain and plain_text_share is not None:
        plain_batches = round(caption_batches * plain_text_share / (1 - plain_text_share))
    return caption_batches, plain_batches


class CaptionPairCollator:
    """Batches of stage 0: the texts' tokens in micro-batches of similar length, and the keys by which false negatives are recognised.

    Args:
        tokenizer: A [`TextTokenizer`], which applies the prompt template.
        max_texts, token_budget: Most texts and most padded tokens of a micro-batch; by default the batch is one micro-batch.
        packed: Whether a micro-batch is one row without padding, see [`pack_rows`].

    Returns:
        A dict, with B pairs and N texts: queries, documents, then hard negatives.
        "query_keys" `(B, 3)`, "document_keys" `(B, 2)`, "negative_keys" `(N - 2 B, 2)` int64, see `caption_contrastive_loss`;
        "micro_batches": list of `{"input_ids", "attention_mask", "token_type_ids"}`, each `(texts, length)` int64, or of packed rows;
        "order" `(N,)` int64: for each row of the joined micro-batches the number of its text.
    """

    def __init__(
        self,
        tokenizer: "TextTokenizer",
        max_texts: int | None = None,
        token_budget: int | None = None,
        packed: bool = False,
    ):
        self.tokenizer, self.max_texts, self.token_budget, self.packed = tokenizer, max_texts, token_budget, packed

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        negatives = [negative for pair in pairs for negative in pair["negatives"]]
        texts = [(pair["query"], pair["instruction"]) for pair in pairs]
        texts += [(text, None) for text in [pair["document"] for pair in pairs] + negatives]
        batches, order = micro_batches(
            self.tokenizer(texts), self.tokenizer.pad_token_id, self.max_texts, self.token_budget, self.packed
        )
        return {**pair_keys(pairs), "micro_batches": batches, "order": order}


class TextTokenizer:
    """Tokenizes texts in the LLM's prompt template, each with or without an instruction.

    Args:
        template: Contains `{text}`; see [`ProCLIPProcessor`].
        max_length: Most tokens of a text, including the template.
        instruction: Precedes texts that have no instruction of their own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, instruction: str | None = None
    ):
        self.template, self.max_length, self.instruction = template, max_length, instruction
        self.tokenizer = templated_tokenizer(tokenizer, template, instruction, max_length)
        self._by_instruction = {instruction: self.tokenizer}

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    def __call__(self, texts: Sequence[tuple[str, str | None]]) -> list[dict[str, list[int]]]:
        """Token rows of texts with their instructions, not padded; a long text is cut at its end, never the template."""
        rows: list[dict[str, list[int]]] = [{}] * len(texts)
        groups: dict[str | None, list[int]] = {}
        for i, (_, instruction) in enumerate(texts):
            groups.setdefault(instruction or self.instruction, []).append(i)
        for instruction, numbers in groups.items():
            if instruction not in self._by_instruction:
                self._by_instruction[instruction] = templated_tokenizer(
                    self.tokenizer, self.template, instruction, self.max_length
                )
            encoded = self._by_instruction[instruction](
                [texts[i][0].rstrip() for i in numbers], truncation=True, max_length=self.max_length
            )
            for row, i in enumerate(numbers):
                rows[i] = {name: values[row] for name, values in encoded.items()}
        return rows


def micro_batches(
    rows: Sequence[TokenRow],
    pad_token_id: int,
    max_texts: int | None = None,
    token_budget: int | None = None,
    packed: bool = False,
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Token rows in micro-batches of similar length, the longest first, each padded on the left to its own longest text only, or packed into one row
    without padding, see [`pack_rows`]. `max_texts` and `token_budget` are the most texts and padded tokens of one; a single text may have more tokens.

    Returns:
        The micro-batches, and `(len(rows),)` int64: for each row of the joined micro-batches its number in `rows`.
    """
    order = list(length_sorted_batches(rows, token_budget, max_texts))
    batches: list[dict[str, Any]] = []
    for chosen in order:
        some = [rows[i] for i in chosen]
        batches.append(pack_rows(some) if packed else pad_rows(some, pad_token_id, "left"))
    return batches, torch.tensor([i for chosen in order for i in chosen], dtype=torch.int64)


def pair_keys(pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The keys of a batch of pairs for `caption_contrastive_loss`. A document also fits another row's query if both rows have the same id, or if
    its text equals the query or the query's own document. A hard negative fits only by its text.
    """
    ids = [stable_hash(f"id {pair['id']}") for pair in pairs]
    queries, documents = ([stable_hash(f"text {pair[side]}") for pair in pairs] for side in ("query", "document"))
    negatives = [stable_hash(f"text {text}") for pair in pairs for text in pair["negatives"]]
    return {
        "query_keys": torch.tensor([ids, queries, documents]).T,
        "document_keys": torch.tensor([ids, documents]).T,
        "negative_keys": torch.tensor([negatives, negatives], dtype=torch.int64).T,
    }


def caption_list(row: Mapping[str, Any], name: str) -> list[str]:
    """The captions of a row, at least two. Raises ValueError if there are fewer or one is empty; calls the row `name`."""
    if "text" not in row:
        raise ValueError(
            f'{name} has no column "text", only {sorted(row)}: rename the column that holds the captions.'
        )
    captions = [row["text"]] if isinstance(row["text"], str) else list(row["text"])
    if len(captions) < 2:
        raise ValueError(
            f'{name} has {len(captions)} caption{"s" * (len(captions) != 1)} in "text", but stage 0 needs two of the same image: leave such '
            "rows out."
        )
    return _checked(captions, name, "text")


def negative_list(row: Mapping[str, Any], name: str) -> list[str]:
    """The hard negatives of a row, which may have none."""
    negatives = row.get("negative") or []
    return _checked([negatives] if isinstance(negatives, str) else list(negatives), name, "negative")


def plain_pair(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A plain-text row as a pair. Raises ValueError unless it has a query and a document."""
    texts = caption_list(row, name)
    if len(texts) != 2:
        raise ValueError(f'{name} has {len(texts)} texts in "text": plain text needs [query, document].')
    return _pair(row, texts, texts[0], texts[1], name) | {"instruction": row.get("instruction")}


def _pair(row: Mapping[str, Any], captions: list[str], query: str, document: str, name: str) -> dict[str, Any]:
    # Without an id, a repeated row is recognised by its captions.
    identity = row["id"] if row.get("id") is not None else "\n".join(sorted(captions))
    negatives = negative_list(row, name)
    return {"query": query, "document": document, "negatives": negatives, "id": identity, "instruction": None}


def _checked(texts: list[Any], name: str, column: str) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f'{name} has {text!r} as number {i} in "{column}": every text must be a string with something in it.'
            )
    return texts


def stable_hash(text: str) -> int:
    """63 bits that depend on `text` alone, not on the process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
