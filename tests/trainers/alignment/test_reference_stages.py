"""Both stages with whole towers: the losses and every parameter's gradient as the reference's own modules recorded them."""

import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from tests.golden import Golden, load
from tests.reference_layout import adapter_map, load_reference, reference_gradients, text_map, vision_map
from trainers.losses import info_nce_loss, instance_alignment_loss, structure_alignment_loss


def tiny_model(
    vision_config: dict, llm_size: int, projection_dim: int, num_layers: int, expansion: int
) -> ProCLIPModel:
    text_config = {"model_type": "llama", "hidden_size": llm_size, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = ProCLIPConfig(
        vision_config={"model_type": "clip_vision_model", **vision_config},
        text_config=text_config,
        projection_dim=projection_dim,
        adapter_num_layers=num_layers,
        adapter_expansion=expansion,
    )
    return ProCLIPModel(config, load_text_model=False)


def clip_tower_config(golden: Golden) -> dict:
    vision = golden.config["vision_cfg"]
    return {
        "hidden_size": vision["width"],
        "intermediate_size": 4 * vision["width"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision["head_width"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "projection_dim": golden.config["embed_dim"],
        "hidden_act": "quick_gelu",
    }


def test_stage1_with_towers_case():
    golden = load("g3_stage1_end_to_end")
    teacher_config = golden.config["teacher"]
    teacher = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=teacher_config["width"],
            intermediate_size=4 * teacher_config["width"],
            num_hidden_layers=teacher_config["layers"],
            num_attention_heads=teacher_config["heads"],
            vocab_size=teacher_config["vocab_size"],
            max_position_embeddings=teacher_config["context_length"],
            projection_dim=golden.config["embed_dim"],
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=2,  # Transformers' sign for pooling at the highest token id, as the reference does
        )
    ).eval()
    load_reference(teacher, golden.params, text_map(teacher_config["layers"]), "teacher.")
    tiny_vision = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    num_layers = golden.config["num_layers_text"]
    model = tiny_model(
        tiny_vision,
        golden.config["llm_dim"],
        golden.config["embed_dim"],
        num_layers,
        golden.config["expansion_factor"],
    )
    layout = adapter_map(num_layers)
    load_reference(model.text_adapter, golden.params, layout, "student.")

    embeds = {}
    for name in ("short", "noise"):
        features = model.get_text_features(llm_embeds=golden.inputs[f"{name}_embeds_llm"]).pooler_output
        with torch.no_grad():
            target = teacher(input_ids=golden.inputs[f"{name}_token_ids"]).text_embeds
        embeds[name] = F.normalize(features, dim=-1), F.normalize(target, dim=-1)
        for side, tensor in zip(("student", "teacher"), embeds[name], strict=True):
            golden.assert_close(f"out.{side}_{name}", tensor)
    structure = structure_alignment_loss(*embeds["short"], "sum", "smooth_l1")
    loss = (
        instance_alignment_loss(*embeds["short"], "sum") + instance_alignment_loss(*embeds["noise"], "sum") + structure
    )
    loss.backward()

    golden.assert_close("out.relation_loss_short", structure)
    golden.assert_close("out.total_loss", loss)
    for key, gradient in reference_gradients(model.text_adapter, layout).items():
        golden.assert_close(f"grad.param.{key}", gradient)
    assert golden.unchecked() == set()


def test_stage2_with_towers_case():
    golden = load("g3_stage2_end_to_end")
    tower = clip_tower_config(golden)
    teacher = CLIPVisionModelWithProjection(CLIPVisionConfig(**tower)).eval()
    load_reference(teacher, golden.params, vision_map(tower["num_hidden_layers"]), "teacher.")
    model = tiny_model(tower, golden.config["llm_dim"], golden.config["embed_dim"], num_layers=1, expansion=8)
    layout = vision_map(tower["num_hidden_layers"]) + adapter_map(1, ours="text_adapter.")
    layout.append(("logit_scale", ("logit_scale",)))
    load_reference(model, golden.params, layout, "student.")

    outputs = model(pixel_values=golden.inputs["pixel_values"], llm_embeds=golden.inputs["text_embeds_llm"])
    with torch.no_grad():
        target = F.normalize(teacher(pixel_values=golden.inputs["pixel_values"]).image_embeds, dim=-1)
    instance = instance_alignment_loss(outputs.image_embeds, target, "sum")
    structure = structure_alignment_loss(outputs.image_embeds, target, "sum", "smooth_l1")
    distill = golden.config["distill_loss_weight"] * (instance + structure)
    loss = info_nce_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()) + distill
    loss.backward()

    golden.assert_close("out.image_features", outputs.image_embeds)
    golden.assert_close("out.text_features", outputs.text_embeds)
    golden.assert_close("out.teacher_image_features", target)
    golden.assert_close("out.mse_sum_image", instance)
    golden.assert_close("out.relation_loss_image", structure)
    golden.assert_close("out.weighted_distill_loss", distill)
    golden.assert_close("out.total_loss", loss)
    for key, gradient in reference_gradients(model, layout).items():
        golden.assert_close(f"grad.param.{key}", gradient)
    assert golden.unchecked() == set()
