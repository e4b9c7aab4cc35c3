"""`convert`: anyone's download of ProCLIP or LLM2CLIP becomes a Transformers checkpoint."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, PreTrainedConfig

from ..configuration_proclip import ProCLIPConfig
from ..finite_weights import is_finite
from ..modeling_proclip import ProCLIPModel
from ..prompt_template import NO_TEMPLATE
from ..publisher import find_publisher
from .code_references import remove_code
from .convert_adapter_to_hf import Adapter, convert_adapter
from .convert_eva_to_hf import convert_eva
from .convert_llm_to_hf import TOKENIZER_FILES, convert_llm, is_llm
from .convert_openai_vit_to_hf import convert_hub_vit, convert_openai_vit
from .convert_siglip_to_hf import convert_siglip
from .errors import ConversionError
from .json_files import read_json
from .output import PlannedTensor, new_folder, plan_shards, write_tensors
from .processors import load_text_model, make_processor, vision_processor_for
from .rules import Options, Rule, Rules, Tower, build_config, check, describe_names
from .source import find_source
from .stored_tensors import DTYPES, StoredTensor, read_tensors


LN_100 = math.log(100)  # the scale that the cards of LLM2CLIP's Hub folders show


@dataclass(frozen=True)
class ConversionReport:
    """What was found, and what was or, in a dry run, would be written.

    Attributes:
        source, output (`Path`): File or folder that was read, and folder of the result.
        written (`bool`): Whether `output` was written.
        facts (`dict[str, str]`): What was found, in words: tower, sizes, adapter, parameters, dtype.
        config (`PreTrainedConfig`): The configuration of the result.
        files (`dict[str, int]`): Weight files and their bytes, header aside.
        ignored (`list[str]`): Tensors of the checkpoint that were expected and are not needed.
        notes (`list[str]`): Remarks for the user.
    """

    source: Path
    output: Path
    written: bool
    facts: dict[str, str]
    config: PreTrainedConfig
    files: dict[str, int]
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    head_width: int = 64,
    quick_gelu: bool | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    rope_pretrained_grid: int = 16,
    adapter_input_norm: Literal["l2", "none"] | None = None,
    vision_processor: str | os.PathLike | None = None,
    text_model: str | os.PathLike | None = None,
    text_model_revision: str | None = None,
    prompt_template: str | None = None,
    lora_adapters: Iterable[str | os.PathLike] = (),
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Turn a published checkpoint into a folder that `AutoModel.from_pretrained` loads without remote code.

    Depth, widths, patches, adapter and dtype are read from the shapes of the tensors, never from a file's name. The result is lean: vision
    tower, text adapter and logit scale, and the name of the LLM if `text_model` is given. Without it, load the result with
    `load_text_model=False`, or with `text_model=...`. An LLM (LLM2CLIP's caption-contrastive ones, LLM2Vec's) becomes a folder of its own,
    as a plain bidirectional model.

    Nothing in the checkpoint is run, and the result names no code. Tensors are written one at a time, so memory holds at most the file and one
    tensor. A new `output` appears when it is complete; an empty one that is there is filled, config.json last.

    Args:
        source: A `.pt`, `.bin` or `.safetensors` file, a folder, or one of these on the Hub: `owner/name` or `owner/name/path/in/it`.
        output: Folder of the result: a new one, or an empty one.
        head_width: Width of an attention head: 64 in OpenAI's and EVA02's towers. 64 means 72 for SigLIP2-So400m, whose width tells it.
        quick_gelu: Whether OpenAI's tower has QuickGELU. By default it has, as OpenAI's weights need, unless a config.json beside them says
            otherwise.
        image_size: Height and width of the images, if not those that the checkpoint is for: position embeddings are resized.
        patch_size: Size of the patches, if not the stored one; EVA's layout only.
        rope_pretrained_grid: Patches a side that EVA02's rotary positions were made for.
        adapter_input_norm: Whether the adapter divides its input by its length ("l2") or not ("none"). By default "none" for the SigLIP2
            layout and "l2" for the others, as published.
        vision_processor: Folder or Hub name of an image processor. By default the tower's usual one, of the right size.
        text_model: Folder or Hub name of the LLM: named in the result, with the hash of its weights and its tokenizer in the processor.
        text_model_revision: Its revision on the Hub.
        prompt_template: See [`ProCLIPProcessor`]; by default that of the LLM's chat markers.
        lora_adapters: Folders of PEFT adapters to merge into an LLM, in this order.
        revision: Commit, tag or branch of a source on the Hub.
        dtype: dtype of the result, such as "float16"; by default the widest of the checkpoint's.
        dry_run: Find out everything and write nothing. The weights themselves are not read.

    Returns:
        [`ConversionReport`].

    Raises:
        ConversionError: Naming file and tensor, if the checkpoint is damaged, needs code to load, or does not fit the layout; if an option is
            wrong or would be ignored; or if `output` holds files.
    """
    path, output = find_source(source, revision), Path(output)
    options = Options(head_width, quick_gelu, image_size, patch_size, rope_pretrained_grid)
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in (None, *DTYPES.values()):
        raise ConversionError(f"dtype={dtype!r} is not one of {', '.join(str(d) for d in DTYPES.values())}.")
    if path.is_dir() and (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ConversionError(
            f"{path} is a PEFT adapter: convert its base model ({base}), and merge this one into it (--lora, lora_adapters)."
        )
    tensors = read_tensors(path)
    lora_adapters = list(lora_adapters)
    if is_llm(tensors):
        of_towers = {
            "head_width": (head_width, 64),
            "quick_gelu": (quick_gelu, None),
            "image_size": (image_size, None),
            "patch_size": (patch_size, None),
            "rope_pretrained_grid": (rope_pretrained_grid, 16),
            "adapter_input_norm": (adapter_input_norm, None),
            "vision_processor": (vision_processor, None),
            "text_model": (text_model, None),
            "text_model_revision": (text_model_revision, None),
            "prompt_template": (prompt_template, None),
        }
        if given := [name for name, (value, default) in of_towers.items() if value != default]:
            raise ConversionError(
                f"{path} is an LLM itself: {', '.join(given)} {'is' if len(given) == 1 else 'are'} for the checkpoint of a vision tower."
            )
        lora_paths = [find_source(adapter, None) for adapter in lora_adapters]
        return _convert_llm(path, output, tensors, lora_paths, dtype, dry_run)
    if lora_adapters:
        raise ConversionError(f"{path} is no LLM: lora_adapters can only be merged into one.")

    if text_model_revision is not None and text_model is None:
        raise ConversionError("text_model_revision is that of text_model, which is not given.")
    tower = _tower(path, tensors, options)
    adapter = convert_adapter(tensors, adapter_input_norm)
    llm = None if text_model is None else load_text_model(text_model, text_model_revision, adapter.llm_size)
    config = _config(tower, adapter, {} if llm is None else llm.config_values)
    logit_scale = Rule(("logit_scale",), lambda tensor: tensor.reshape(()))
    if "logit_scale" not in tensors and "visual_projection.weight" in tensors:
        logit_scale = Rule((), lambda: torch.tensor(LN_100))
        tower.notes.append("The checkpoint holds no logit_scale; it is ln(100), as its card shows.")
    rules = {**tower.rules, **adapter.rules, "logit_scale": logit_scale}
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in ProCLIPModel(config, load_text_model=False).state_dict().items()}
    ignored = check(rules, tensors, shapes, tower.ignored)
    config.dtype = config.vision_config.dtype = dtype or _widest_dtype(rules, tensors)
    planned = _plan(rules, tensors, shapes, config.dtype)
    facts = _facts(tower, adapter, config, planned)
    processor = make_processor(
        vision_processor_for(tower.config, vision_processor), None if llm is None else llm.tokenizer, prompt_template
    )
    if llm is not None:
        facts |= {"LLM": llm.description, "prompt template": repr(processor.prompt_template)}
        if processor.prompt_template == NO_TEMPLATE and prompt_template is None:
            tower.notes.append(
                "The LLM's tokenizer has no chat template, so texts go in as they are; prompt_template sets one."
            )
    report = _report(path, output, not dry_run, facts, config, planned, ignored, tower.notes)
    if not dry_run:
        with new_folder(output) as folder:
            write_tensors(folder, planned)
            config.architectures = [ProCLIPModel.__name__]
            config.save_pretrained(folder)
            processor.save_pretrained(folder)
            remove_code(folder)
            _write_card(folder, report)
    return report


def _tower(path: Path, tensors: Mapping[str, StoredTensor], options: Options) -> Tower:
    tops = {".".join(name.split(".")[:2]) for name in tensors}
    eva = bool(tops & {"visual.blocks", "visual.patch_embed"})
    if options.patch_size is not None and not eva:
        raise ConversionError("patch_size resamples the patches of EVA's layout only, as in the published code.")
    if options.rope_pretrained_grid != Options.rope_pretrained_grid and not eva:
        raise ConversionError("rope_pretrained_grid is for the rotary positions of EVA02, and this tower has none.")
    if "visual.trunk" in tops:
        return convert_siglip(tensors, options)
    if eva:
        return convert_eva(tensors, options)
    if "visual.conv1" in tops:
        return convert_openai_vit(tensors, options)
    if any(name.startswith("vision_model.") for name in tensors):
        settings = read_json(path / "config.json") if path.is_dir() and (path / "config.json").is_file() else {}
        vision = settings.get("vision_config")
        hidden_act = vision.get("hidden_act") if isinstance(vision, dict) else None
        return convert_hub_vit(tensors, options, hidden_act if isinstance(hidden_act, str) else None)
    raise ConversionError(f"{path} holds no vision tower that is known; {describe_names(tensors)}.")


def _config(tower: Tower, adapter: Adapter, text_values: Mapping[str, Any]) -> ProCLIPConfig:
    if tower.projection_dim not in (None, adapter.projection_dim):
        raise ConversionError(
            f"The tower projects to {tower.projection_dim} dimensions and the text adapter to {adapter.projection_dim}: they do not belong "
            "together."
        )
    # What is known of an LLM that is not named is the size of its embeddings; a lean checkpoint never builds it from this.
    unnamed = {"text_config": LlamaConfig(hidden_size=adapter.llm_size, num_attention_heads=1, num_key_value_heads=1)}
    return build_config(
        ProCLIPConfig,
        vision_config=tower.config,
        projection_dim=adapter.projection_dim,
        vision_projection=tower.projection_dim is not None,
        vision_projection_bias=tower.projection_bias,
        adapter_num_layers=adapter.num_layers,
        adapter_expansion=adapter.expansion,
        adapter_input_norm=adapter.input_norm,
        adapter_output_bias=adapter.output_bias,
        lean=True,
        **(text_values or unnamed),
    )


def _widest_dtype(rules: Rules, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """A dtype that holds all tensors exactly; the logit scale, which the model keeps in float32, has no say."""
    names = {name for ours, rule in rules.items() if ours != "logit_scale" for name in rule.sources}
    return reduce(torch.promote_types, {tensors[name].dtype for name in names})


def _plan(
    rules: Rules, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> list[PlannedTensor]:
    def plan(ours: str, rule: Rule) -> PlannedTensor:
        target = torch.float32 if ours == "logit_scale" else dtype

        def make() -> torch.Tensor:
            stored = [tensors[name].read() for name in rule.sources]
            made = rule.transform(*stored)
            if not any(made is one for one in stored) and not is_finite(made):
                raise ConversionError(f"{ours}, made of {', '.join(rule.sources)}, would hold NaN or infinity.")
            narrowed = made.to(target)
            if narrowed.dtype != made.dtype and not is_finite(narrowed):
                raise ConversionError(
                    f"{', '.join(rule.sources)} overflows in {_dtype_name(target)}: pass another dtype."
                )
            return narrowed

        return PlannedTensor(ours, target, shapes[ours], make)

    return [plan(ours, rule) for ours, rule in sorted(rules.items())]


def _facts(tower: Tower, adapter: Adapter, config: ProCLIPConfig, planned: list[PlannedTensor]) -> dict[str, str]:
    vision = tower.config
    norm = {"l2": "divided by its length", "none": "as it is"}[adapter.input_norm]
    return {
        "tower": tower.title,
        "images": f"{vision.image_size} x {vision.image_size} pixels, patches of {vision.patch_size}",
        "tower sizes": f"width {vision.hidden_size}, {vision.num_hidden_layers} layers, {vision.num_attention_heads} heads, MLP "
        f"{vision.intermediate_size}",
        "embedding": f"{config.projection_dim} dimensions",
        "text adapter": f"{adapter.num_layers} block{'s' * (adapter.num_layers != 1)}, expansion {adapter.expansion:g}, LLM embedding of {adapter.llm_size}, {norm}",
        "parameters": f"{sum(torch.Size(t.shape).numel() for t in planned):,}",
        "dtype": _dtype_name(config.dtype),
    }


def _dtype_name(dtype: torch.dtype) -> str:
    """Such as "float16"."""
    return str(dtype).removeprefix("torch.")


def _report(path, output, written, facts, config, planned, ignored, notes) -> ConversionReport:
    files = {name: sum(t.num_bytes for t in shard) for name, shard in plan_shards(planned).items()}
    return ConversionReport(path, output, written, facts, config, files, list(ignored), list(notes))


def _convert_llm(
    path: Path,
    output: Path,
    tensors: Mapping[str, StoredTensor],
    lora_adapters: list[Path],
    dtype: torch.dtype | None,
    dry_run: bool,
) -> ConversionReport:
    if not path.is_dir() or not (path / "config.json").is_file():
        raise ConversionError(f"{path} holds an LLM without its config.json: name the folder that has both.")
    config, tensors, rules, ignored = convert_llm(path, tensors, lora_adapters)
    shapes = {name: tensors[rule.sources[0]].shape for name, rule in rules.items()}
    config.dtype = dtype or _widest_dtype(rules, tensors)
    planned = _plan(rules, tensors, shapes, config.dtype)
    tokenizer_files = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    facts = {
        "LLM": f"{config.architectures[0]}, bidirectional, width {config.hidden_size}, {config.num_hidden_layers} layers",
        "merged adapters": ", ".join(map(str, lora_adapters)) or "none",
        "parameters": f"{sum(torch.Size(t.shape).numel() for t in planned):,}",
        "dtype": _dtype_name(config.dtype),
        "tokenizer": ", ".join(tokenizer_files) or "none in the folder",
    }
    report = _report(path, output, not dry_run, facts, config, planned, ignored, [])
    if not dry_run:
        with new_folder(output) as folder:
            write_tensors(folder, planned)
            config.save_pretrained(folder)
            for name in tokenizer_files:
                shutil.copyfile(path / name, folder / name)
            remove_code(folder)
            _write_card(folder, report)
    return report


def _write_card(folder: Path, report: ConversionReport) -> None:
    publisher = find_publisher("converted")
    if publisher is not None:
        publisher.converted_card(report.source.name, report.facts, report.notes).save(folder / "README.md")
