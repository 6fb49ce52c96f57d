"""Video transformers; see rules.py for the notation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WAN = """
blocks.N.self_attn.q <- blocks.N.attn1.to_q
blocks.N.self_attn.k <- blocks.N.attn1.to_k
blocks.N.self_attn.v <- blocks.N.attn1.to_v
blocks.N.self_attn.o <- blocks.N.attn1.to_out.0
blocks.N.self_attn.norm_q <- blocks.N.attn1.norm_q
blocks.N.self_attn.norm_k <- blocks.N.attn1.norm_k
blocks.N.cross_attn.q <- blocks.N.attn2.to_q
blocks.N.cross_attn.k <- blocks.N.attn2.to_k
blocks.N.cross_attn.v <- blocks.N.attn2.to_v
blocks.N.cross_attn.o <- blocks.N.attn2.to_out.0
blocks.N.cross_attn.norm_q <- blocks.N.attn2.norm_q
blocks.N.cross_attn.norm_k <- blocks.N.attn2.norm_k
blocks.N.cross_attn.k_img <- blocks.N.attn2.add_k_proj
blocks.N.cross_attn.v_img <- blocks.N.attn2.add_v_proj
blocks.N.cross_attn.norm_k_img <- blocks.N.attn2.norm_added_k
blocks.N.ffn.0 <- blocks.N.ffn.net.0.proj
blocks.N.ffn.2 <- blocks.N.ffn.net.2
blocks.N.norm3 <- blocks.N.norm2
blocks.N.modulation <- blocks.N.scale_shift_table
text_embedding.0 <- condition_embedder.text_embedder.linear_1
text_embedding.2 <- condition_embedder.text_embedder.linear_2
time_embedding.0 <- condition_embedder.time_embedder.linear_1
time_embedding.2 <- condition_embedder.time_embedder.linear_2
time_projection.1 <- condition_embedder.time_proj
img_emb.proj.0 <- condition_embedder.image_embedder.norm1
img_emb.proj.1 <- condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3 <- condition_embedder.image_embedder.ff.net.2
img_emb.proj.4 <- condition_embedder.image_embedder.norm2
img_emb.emb_pos <- condition_embedder.image_embedder.pos_embed
head.head <- proj_out
head.modulation <- scale_shift_table
"""

WAN_VACE = (
    """
vace_blocks.N.before_proj <- vace_blocks.N.proj_in
vace_blocks.N.after_proj <- vace_blocks.N.proj_out
"""
    + WAN
    + "\n".join(line.replace("blocks.N", "vace_blocks.N") for line in WAN.splitlines() if line.startswith("blocks.N"))
)

# Its face encoder's convolutions go from 512 pixels down to 4.
WAN_ANIMATE = (
    """
motion_encoder.enc.net_app.convs.0.1.bias[1,*,1,1] <- motion_encoder.conv_in.act_fn.bias[*]
motion_encoder.enc.net_app.convs.0.0 <- motion_encoder.conv_in
motion_encoder.enc.net_app.convs.8.weight <- motion_encoder.conv_out.weight
motion_encoder.enc.fc <- motion_encoder.motion_network
motion_encoder.dec.direction.weight <- motion_encoder.motion_synthesis_weight
face_adapter.fuser_blocks.N.linear1_q <- face_adapter.N.to_q
face_adapter.fuser_blocks.N.linear1_kv <- face_adapter.N.{to_k to_v}
face_adapter.fuser_blocks.N.linear2 <- face_adapter.N.to_out
face_adapter.fuser_blocks.N.q_norm <- face_adapter.N.norm_q
face_adapter.fuser_blocks.N.k_norm <- face_adapter.N.norm_k
"""
    + "".join(
        f"face_encoder.{name}.conv.{leaf} <- face_encoder.{name}.{leaf}\n"
        for name in ("conv1_local", "conv2", "conv3")
        for leaf in ("weight", "bias")
    )
    + "".join(
        f"""
motion_encoder.enc.net_app.convs.{i + 1}.conv1.1.bias[1,*,1,1] <- motion_encoder.res_blocks.{i}.conv1.act_fn.bias[*]
motion_encoder.enc.net_app.convs.{i + 1}.conv1.0 <- motion_encoder.res_blocks.{i}.conv1
motion_encoder.enc.net_app.convs.{i + 1}.conv2.2.bias[1,*,1,1] <- motion_encoder.res_blocks.{i}.conv2.act_fn.bias[*]
motion_encoder.enc.net_app.convs.{i + 1}.conv2.1 <- motion_encoder.res_blocks.{i}.conv2
motion_encoder.enc.net_app.convs.{i + 1}.skip.1 <- motion_encoder.res_blocks.{i}.conv_skip
"""
        for i in range(7)
    )
    + WAN
)


def wan_animate_filters(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The filters that smooth the face before every second convolution, float32 ``[4, 4]``."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0])
    names = [f"motion_encoder.enc.net_app.convs.{i + 1}.{part}.0.kernel" for i in range(7) for part in ("conv2", "skip")]
    return {name: torch.outer(line, line) / 64 for name in names}


LTX = """
patchify_proj <- proj_in
adaln_single <- time_embed
transformer_blocks.N.attn1.q_norm <- transformer_blocks.N.attn1.norm_q
transformer_blocks.N.attn1.k_norm <- transformer_blocks.N.attn1.norm_k
transformer_blocks.N.attn2.q_norm <- transformer_blocks.N.attn2.norm_q
transformer_blocks.N.attn2.k_norm <- transformer_blocks.N.attn2.norm_k
"""

HUNYUAN_VIDEO = """
double_blocks.N.img_attn.qkv <- transformer_blocks.N.attn.{to_q to_k to_v}
double_blocks.N.txt_attn.qkv <- transformer_blocks.N.attn.{add_q_proj add_k_proj add_v_proj}
double_blocks.N.img_attn.proj <- transformer_blocks.N.attn.to_out.0
double_blocks.N.txt_attn.proj <- transformer_blocks.N.attn.to_add_out
double_blocks.N.img_attn.norm.query_norm <- transformer_blocks.N.attn.norm_q
double_blocks.N.img_attn.norm.key_norm <- transformer_blocks.N.attn.norm_k
double_blocks.N.txt_attn.norm.query_norm <- transformer_blocks.N.attn.norm_added_q
double_blocks.N.txt_attn.norm.key_norm <- transformer_blocks.N.attn.norm_added_k
double_blocks.N.img_mod.lin <- transformer_blocks.N.norm1.linear
double_blocks.N.txt_mod.lin <- transformer_blocks.N.norm1_context.linear
double_blocks.N.img_mlp.0 <- transformer_blocks.N.ff.net.0.proj
double_blocks.N.img_mlp.2 <- transformer_blocks.N.ff.net.2
double_blocks.N.txt_mlp.0 <- transformer_blocks.N.ff_context.net.0.proj
double_blocks.N.txt_mlp.2 <- transformer_blocks.N.ff_context.net.2
single_blocks.N.linear1 <- single_transformer_blocks.N.{attn.to_q:in attn.to_k:in attn.to_v:in proj_mlp}
single_blocks.N.linear2 <- single_transformer_blocks.N.proj_out
single_blocks.N.norm.query_norm <- single_transformer_blocks.N.attn.norm_q
single_blocks.N.norm.key_norm <- single_transformer_blocks.N.attn.norm_k
single_blocks.N.modulation.lin <- single_transformer_blocks.N.norm.linear
txt_in.individual_token_refiner.blocks.N.self_attn.qkv <- REFINER.attn.{to_q to_k to_v}
txt_in.individual_token_refiner.blocks.N.self_attn.proj <- REFINER.attn.to_out.0
txt_in.individual_token_refiner.blocks.N.mlp.0 <- REFINER.ff.net.0.proj
txt_in.individual_token_refiner.blocks.N.mlp.2 <- REFINER.ff.net.2
txt_in.individual_token_refiner.blocks.N.norm1 <- REFINER.norm1
txt_in.individual_token_refiner.blocks.N.norm2 <- REFINER.norm2
txt_in.individual_token_refiner.blocks.N.adaLN_modulation.1 <- REFINER.norm_out.linear
txt_in.input_embedder <- context_embedder.proj_in
txt_in.t_embedder.in_layer <- context_embedder.time_text_embed.timestep_embedder.linear_1
txt_in.t_embedder.out_layer <- context_embedder.time_text_embed.timestep_embedder.linear_2
txt_in.c_embedder.in_layer <- context_embedder.time_text_embed.text_embedder.linear_1
txt_in.c_embedder.out_layer <- context_embedder.time_text_embed.text_embedder.linear_2
img_in.proj <- x_embedder.proj
time_in.in_layer <- time_text_embed.timestep_embedder.linear_1
time_in.out_layer <- time_text_embed.timestep_embedder.linear_2
guidance_in.in_layer <- time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer <- time_text_embed.guidance_embedder.linear_2
vector_in.in_layer <- time_text_embed.text_embedder.linear_1
vector_in.out_layer <- time_text_embed.text_embedder.linear_2
final_layer.linear <- proj_out
final_layer.adaLN_modulation.1 <- ~norm_out.linear
""".replace("REFINER", "context_embedder.token_refiner.refiner_blocks.N")

MOCHI = """
x_embedder.proj <- patch_embed.proj
t_embedder.mlp.0 <- time_embed.timestep_embedder.linear_1
t_embedder.mlp.2 <- time_embed.timestep_embedder.linear_2
t5_y_embedder <- time_embed.pooler
t5_yproj <- time_embed.caption_proj
blocks.N.mod_x <- transformer_blocks.N.norm1.linear
blocks.LAST.mod_y <- transformer_blocks.LAST.norm1_context.linear_1
blocks.N.mod_y <- transformer_blocks.N.norm1_context.linear
blocks.N.attn.qkv_x <- transformer_blocks.N.attn1.{to_q to_k to_v}
blocks.N.attn.qkv_y <- transformer_blocks.N.attn1.{add_q_proj add_k_proj add_v_proj}
blocks.N.attn.proj_x <- transformer_blocks.N.attn1.to_out.0
blocks.N.attn.proj_y <- transformer_blocks.N.attn1.to_add_out
blocks.N.attn.q_norm_x <- transformer_blocks.N.attn1.norm_q
blocks.N.attn.k_norm_x <- transformer_blocks.N.attn1.norm_k
blocks.N.attn.q_norm_y <- transformer_blocks.N.attn1.norm_added_q
blocks.N.attn.k_norm_y <- transformer_blocks.N.attn1.norm_added_k
blocks.N.mlp_x.w1 <- ~transformer_blocks.N.ff.net.0.proj
blocks.N.mlp_x.w2 <- transformer_blocks.N.ff.net.2
blocks.N.mlp_y.w1 <- ~transformer_blocks.N.ff_context.net.0.proj
blocks.N.mlp_y.w2 <- transformer_blocks.N.ff_context.net.2
final_layer.mod <- ~norm_out.linear
final_layer.linear <- proj_out
"""

HUNYUAN_VIDEO_15 = (
    """
time_in.in_layer <- time_embed.timestep_embedder.linear_1
time_in.out_layer <- time_embed.timestep_embedder.linear_2
time_r_in.in_layer <- time_embed.timestep_embedder_r.linear_1
time_r_in.out_layer <- time_embed.timestep_embedder_r.linear_2
byt5_in.layernorm <- context_embedder_2.norm
byt5_in.fc1 <- context_embedder_2.linear_1
byt5_in.fc2 <- context_embedder_2.linear_2
byt5_in.fc3 <- context_embedder_2.linear_3
vision_in.proj.0 <- image_embedder.norm_in
vision_in.proj.1 <- image_embedder.linear_1
vision_in.proj.3 <- image_embedder.linear_2
vision_in.proj.4 <- image_embedder.norm_out
cond_type_embedding <- cond_type_embed
"""
    + HUNYUAN_VIDEO
)

HUNYUAN_IMAGE = (
    HUNYUAN_VIDEO_15.replace(" time_embed.", " time_guidance_embed.")
    + """
guidance_in.in_layer <- time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer <- time_guidance_embed.guidance_embedder.linear_2
"""
)

COSMOS2 = """
x_embedder.proj.1 <- patch_embed.proj
t_embedder.1 <- time_embed.t_embedder
t_embedding_norm <- time_embed.norm
final_layer.adaln_modulation.1 <- norm_out.linear_1
final_layer.adaln_modulation.2 <- norm_out.linear_2
final_layer.linear <- proj_out
blocks.N.adaln_modulation_self_attn.1 <- transformer_blocks.N.norm1.linear_1
blocks.N.adaln_modulation_self_attn.2 <- transformer_blocks.N.norm1.linear_2
blocks.N.adaln_modulation_cross_attn.1 <- transformer_blocks.N.norm2.linear_1
blocks.N.adaln_modulation_cross_attn.2 <- transformer_blocks.N.norm2.linear_2
blocks.N.adaln_modulation_mlp.1 <- transformer_blocks.N.norm3.linear_1
blocks.N.adaln_modulation_mlp.2 <- transformer_blocks.N.norm3.linear_2
blocks.N.mlp.layer1 <- transformer_blocks.N.ff.net.0.proj
blocks.N.mlp.layer2 <- transformer_blocks.N.ff.net.2
""" + "".join(
    f"""
blocks.N.{native}.q_proj <- transformer_blocks.N.{diffusers}.to_q
blocks.N.{native}.k_proj <- transformer_blocks.N.{diffusers}.to_k
blocks.N.{native}.v_proj <- transformer_blocks.N.{diffusers}.to_v
blocks.N.{native}.output_proj <- transformer_blocks.N.{diffusers}.to_out.0
blocks.N.{native}.q_norm <- transformer_blocks.N.{diffusers}.norm_q
blocks.N.{native}.k_norm <- transformer_blocks.N.{diffusers}.norm_k
"""
    for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
)

COGVIDEOX = """
time_embedding_linear_1 <- time_embedding.linear_1
time_embedding_linear_2 <- time_embedding.linear_2
ofs_embedding_linear_1 <- ofs_embedding.linear_1
ofs_embedding_linear_2 <- ofs_embedding.linear_2
blocks.N.q <- transformer_blocks.N.attn1.to_q
blocks.N.k <- transformer_blocks.N.attn1.to_k
blocks.N.v <- transformer_blocks.N.attn1.to_v
blocks.N.attn_out <- transformer_blocks.N.attn1.to_out.0
blocks.N.norm_q <- transformer_blocks.N.attn1.norm_q
blocks.N.norm_k <- transformer_blocks.N.attn1.norm_k
blocks.N.ff_proj <- transformer_blocks.N.ff.net.0.proj
blocks.N.ff_out <- transformer_blocks.N.ff.net.2
blocks.N.norm1 <- transformer_blocks.N.norm1
blocks.N.norm2 <- transformer_blocks.N.norm2
"""

# The first half of a feed-forward layer's rows is the gate here and the value there.
MINIMAX_H3 = """
video_patch_proj <- proj_in
audio_patch_proj <- audio_proj_in
condition_proj <- context_embedder
time_embedder.proj_in <- time_embedder.linear_1
time_embedder.proj_out <- time_embedder.linear_2
final_layer.norm <- norm_out.norm
final_layer.adaln_proj.linear <- norm_out.linear
final_layer.video_out <- proj_out
final_layer.audio_out <- audio_proj_out
blocks.N.adaln_proj <- transformer_blocks.N.adaln_proj
""" + "".join(
    f"""
{native}.attn.qkv_proj <- {diffusers}.attn.{{to_q to_k to_v}}
{native}.attn.out_proj <- {diffusers}.attn.to_out.0
{native}.attn.q_norm <- {diffusers}.attn.norm_q
{native}.attn.k_norm <- {diffusers}.attn.norm_k
{native}.mlp.fc1 <- ~{diffusers}.ff.net.0.proj
{native}.mlp.fc2 <- {diffusers}.ff.net.2
{native}.norm1 <- {diffusers}.norm1
{native}.norm2 <- {diffusers}.norm2
"""
    for native, diffusers in (("blocks.N", "transformer_blocks.N"), ("token_refiner.blocks.N", "token_refiner.refiner_blocks.N"))
)


def minimax_h3_frequencies(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rotations' frequencies, which ComfyUI stores, float32 ``[rope_freq_dim]``."""
    size = settings["rope_freq_dim"]
    return {"rope.inv_freq": settings["rope_theta"] ** -(torch.arange(size, dtype=torch.float32) / size)}


LTX2 = """
patchify_proj <- proj_in
audio_patchify_proj <- audio_proj_in
adaln_single <- time_embed
audio_adaln_single <- audio_time_embed
prompt_adaln_single <- prompt_adaln
audio_prompt_adaln_single <- audio_prompt_adaln
av_ca_video_scale_shift_adaln_single <- av_cross_attn_video_scale_shift
av_ca_a2v_gate_adaln_single <- av_cross_attn_video_a2v_gate
av_ca_audio_scale_shift_adaln_single <- av_cross_attn_audio_scale_shift
av_ca_v2a_gate_adaln_single <- av_cross_attn_audio_v2a_gate
transformer_blocks.N.scale_shift_table_a2v_ca_video <- transformer_blocks.N.video_a2v_cross_attn_scale_shift_table
transformer_blocks.N.scale_shift_table_a2v_ca_audio <- transformer_blocks.N.audio_a2v_cross_attn_scale_shift_table
""" + "".join(
    f"""
transformer_blocks.N.{name}.q_norm <- transformer_blocks.N.{name}.norm_q
transformer_blocks.N.{name}.k_norm <- transformer_blocks.N.{name}.norm_k
"""
    for name in ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
)

LTX2_CONNECTORS = "".join(
    f"""
{name}_embeddings_connector.learnable_registers <- {name}_connector.learnable_registers
{name}_embeddings_connector.transformer_1d_blocks.N.attn1.q_norm <- {name}_connector.transformer_blocks.N.attn1.norm_q
{name}_embeddings_connector.transformer_1d_blocks.N.attn1.k_norm <- {name}_connector.transformer_blocks.N.attn1.norm_k
{name}_embeddings_connector.transformer_1d_blocks <- {name}_connector.transformer_blocks
"""
    for name in ("video", "audio")
)

ANIMA_ADAPTER = """
llm_adapter.embed <- embed
llm_adapter.in_proj <- in_proj
llm_adapter.blocks <- blocks
llm_adapter.out_proj <- out_proj
llm_adapter.norm <- norm
"""

# ComfyUI's names of diffusers' settings.
LTX2_SETTINGS = {
    "in_channels": "in_channels",
    "attention_head_dim": "attention_head_dim",
    "num_attention_heads": "num_attention_heads",
    "cross_attention_dim": "cross_attention_dim",
    "caption_channels": "caption_channels",
    "audio_in_channels": "audio_in_channels",
    "audio_attention_head_dim": "audio_attention_head_dim",
    "audio_num_attention_heads": "audio_num_attention_heads",
    "audio_cross_attention_dim": "audio_cross_attention_dim",
    "positional_embedding_theta": "rope_theta",
    "rope_type": "rope_type",
    "timestep_scale_multiplier": "timestep_scale_multiplier",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier",
    "apply_gated_attention": "gated_attn",
    "cross_attention_adaln": "cross_attn_mod",
}
LTX2_CONNECTOR_SETTINGS = {
    "connector_num_layers": "video_connector_num_layers",
    "connector_num_attention_heads": "video_connector_num_attention_heads",
    "connector_attention_head_dim": "video_connector_attention_head_dim",
    "audio_connector_num_attention_heads": "audio_connector_num_attention_heads",
    "audio_connector_attention_head_dim": "audio_connector_attention_head_dim",
    "connector_apply_gated_attention": "video_gated_attn",
}


def ltx2_told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """ComfyUI's settings of LTX-2, all of which it reads from metadata."""
    connectors = settings.get("connectors", {})
    told = {name: settings[theirs] for name, theirs in LTX2_SETTINGS.items() if theirs in settings}
    told |= {name: connectors[theirs] for name, theirs in LTX2_CONNECTOR_SETTINGS.items() if theirs in connectors}
    embedded = settings.get("use_prompt_embeddings", True)  # 2.0 projects the text in the transformer, 2.3 before it
    return told | {
        "positional_embedding_max_pos": [settings["pos_embed_max_pos"], settings["base_height"], settings["base_width"]],
        "audio_positional_embedding_max_pos": [settings["audio_pos_embed_max_pos"]],
        "frequencies_precision": "float64" if settings.get("rope_double_precision", True) else "float32",
        "use_middle_indices_grid": True,
        "causal_temporal_positioning": True,
        "caption_proj_before_connector": not embedded,
        "caption_projection_first_linear": bool(embedded),
    }
