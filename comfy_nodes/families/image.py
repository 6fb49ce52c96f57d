"""Image transformers; see rules.py for the notation."""

from __future__ import annotations

FLUX_BLOCKS = """
double_blocks.N.img_attn.qkv <- transformer_blocks.N.attn.{to_q to_k to_v}
double_blocks.N.txt_attn.qkv <- transformer_blocks.N.attn.{add_q_proj add_k_proj add_v_proj}
double_blocks.N.img_attn.proj <- transformer_blocks.N.attn.to_out.0
double_blocks.N.txt_attn.proj <- transformer_blocks.N.attn.to_add_out
double_blocks.N.img_attn.norm.query_norm.scale|weight <- transformer_blocks.N.attn.norm_q.weight
double_blocks.N.img_attn.norm.key_norm.scale|weight <- transformer_blocks.N.attn.norm_k.weight
double_blocks.N.txt_attn.norm.query_norm.scale|weight <- transformer_blocks.N.attn.norm_added_q.weight
double_blocks.N.txt_attn.norm.key_norm.scale|weight <- transformer_blocks.N.attn.norm_added_k.weight
single_blocks.N.norm.query_norm.scale|weight <- single_transformer_blocks.N.attn.norm_q.weight
single_blocks.N.norm.key_norm.scale|weight <- single_transformer_blocks.N.attn.norm_k.weight
txt_in <- context_embedder
final_layer.linear <- proj_out
"""

FLUX_MLP = """
double_blocks.N.img_mlp.0 <- transformer_blocks.N.ff.net.0.proj
double_blocks.N.img_mlp.2 <- transformer_blocks.N.ff.net.2
double_blocks.N.txt_mlp.0 <- transformer_blocks.N.ff_context.net.0.proj
double_blocks.N.txt_mlp.2 <- transformer_blocks.N.ff_context.net.2
single_blocks.N.linear1 <- single_transformer_blocks.N.{attn.to_q:in attn.to_k:in attn.to_v:in proj_mlp}
single_blocks.N.linear2 <- single_transformer_blocks.N.proj_out
"""

FLUX = (
    FLUX_BLOCKS
    + FLUX_MLP
    + """
double_blocks.N.img_mod.lin <- transformer_blocks.N.norm1.linear
double_blocks.N.txt_mod.lin <- transformer_blocks.N.norm1_context.linear
single_blocks.N.modulation.lin <- single_transformer_blocks.N.norm.linear
img_in <- x_embedder
time_in.in_layer <- time_text_embed.timestep_embedder.linear_1
time_in.out_layer <- time_text_embed.timestep_embedder.linear_2
guidance_in.in_layer <- time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer <- time_text_embed.guidance_embedder.linear_2
vector_in.in_layer <- time_text_embed.text_embedder.linear_1
vector_in.out_layer <- time_text_embed.text_embedder.linear_2
final_layer.adaLN_modulation.1 <- ~norm_out.linear
"""
)

# A small network makes the modulations of all blocks.
CHROMA = (
    FLUX_BLOCKS
    + FLUX_MLP
    + """
img_in <- x_embedder
distilled_guidance_layer.in_proj <- distilled_guidance_layer.in_proj
distilled_guidance_layer.layers.N.in_layer <- distilled_guidance_layer.layers.N.linear_1
distilled_guidance_layer.layers.N.out_layer <- distilled_guidance_layer.layers.N.linear_2
distilled_guidance_layer.norms.N.scale|weight <- distilled_guidance_layer.norms.N.weight
"""
)

FLUX2 = (
    FLUX_BLOCKS
    + """
double_blocks.N.img_mlp.0 <- transformer_blocks.N.ff.linear_in
double_blocks.N.img_mlp.2 <- transformer_blocks.N.ff.linear_out
double_blocks.N.txt_mlp.0 <- transformer_blocks.N.ff_context.linear_in
double_blocks.N.txt_mlp.2 <- transformer_blocks.N.ff_context.linear_out
single_blocks.N.linear1 <- single_transformer_blocks.N.attn.to_qkv_mlp_proj
single_blocks.N.linear2 <- single_transformer_blocks.N.attn.to_out
double_stream_modulation_img.lin <- double_stream_modulation_img.linear
double_stream_modulation_txt.lin <- double_stream_modulation_txt.linear
single_stream_modulation.lin <- single_stream_modulation.linear
img_in <- x_embedder
time_in.in_layer <- time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer <- time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer <- time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer <- time_guidance_embed.guidance_embedder.linear_2
final_layer.adaLN_modulation.1 <- ~norm_out.linear
"""
)

SD3 = """
joint_blocks.LAST.context_block.adaLN_modulation.1 <- ~transformer_blocks.LAST.norm1_context.linear
joint_blocks.N.x_block.adaLN_modulation.1 <- transformer_blocks.N.norm1.linear
joint_blocks.N.context_block.adaLN_modulation.1 <- transformer_blocks.N.norm1_context.linear
joint_blocks.N.x_block.attn.qkv <- transformer_blocks.N.attn.{to_q to_k to_v}
joint_blocks.N.x_block.attn2.qkv <- transformer_blocks.N.attn2.{to_q to_k to_v}
joint_blocks.N.context_block.attn.qkv <- transformer_blocks.N.attn.{add_q_proj add_k_proj add_v_proj}
joint_blocks.N.x_block.attn.proj <- transformer_blocks.N.attn.to_out.0
joint_blocks.N.x_block.attn2.proj <- transformer_blocks.N.attn2.to_out.0
joint_blocks.N.context_block.attn.proj <- transformer_blocks.N.attn.to_add_out
joint_blocks.N.x_block.attn.ln_q <- transformer_blocks.N.attn.norm_q
joint_blocks.N.x_block.attn.ln_k <- transformer_blocks.N.attn.norm_k
joint_blocks.N.x_block.attn2.ln_q <- transformer_blocks.N.attn2.norm_q
joint_blocks.N.x_block.attn2.ln_k <- transformer_blocks.N.attn2.norm_k
joint_blocks.N.context_block.attn.ln_q <- transformer_blocks.N.attn.norm_added_q
joint_blocks.N.context_block.attn.ln_k <- transformer_blocks.N.attn.norm_added_k
joint_blocks.N.x_block.mlp.fc1 <- transformer_blocks.N.ff.net.0.proj
joint_blocks.N.x_block.mlp.fc2 <- transformer_blocks.N.ff.net.2
joint_blocks.N.context_block.mlp.fc1 <- transformer_blocks.N.ff_context.net.0.proj
joint_blocks.N.context_block.mlp.fc2 <- transformer_blocks.N.ff_context.net.2
x_embedder.proj <- pos_embed.proj
pos_embed <- pos_embed.pos_embed
context_embedder <- context_embedder
t_embedder.mlp.0 <- time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 <- time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 <- time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 <- time_text_embed.text_embedder.linear_2
final_layer.linear <- proj_out
final_layer.adaLN_modulation.1 <- ~norm_out.linear
"""

PIXART = """
blocks.N.attn.qkv <- transformer_blocks.N.attn1.{to_q to_k to_v}
blocks.N.attn.proj <- transformer_blocks.N.attn1.to_out.0
blocks.N.cross_attn.q_linear <- transformer_blocks.N.attn2.to_q
blocks.N.cross_attn.kv_linear <- transformer_blocks.N.attn2.{to_k to_v}
blocks.N.cross_attn.proj <- transformer_blocks.N.attn2.to_out.0
blocks.N.mlp.fc1 <- transformer_blocks.N.ff.net.0.proj
blocks.N.mlp.fc2 <- transformer_blocks.N.ff.net.2
blocks.N.scale_shift_table <- transformer_blocks.N.scale_shift_table
x_embedder.proj <- pos_embed.proj
y_embedder.y_embedding <- caption_projection.y_embedding
y_embedder.y_proj.fc1 <- caption_projection.linear_1
y_embedder.y_proj.fc2 <- caption_projection.linear_2
t_embedder.mlp.0 <- adaln_single.emb.timestep_embedder.linear_1
t_embedder.mlp.2 <- adaln_single.emb.timestep_embedder.linear_2
csize_embedder.mlp.0 <- adaln_single.emb.resolution_embedder.linear_1
csize_embedder.mlp.2 <- adaln_single.emb.resolution_embedder.linear_2
ar_embedder.mlp.0 <- adaln_single.emb.aspect_ratio_embedder.linear_1
ar_embedder.mlp.2 <- adaln_single.emb.aspect_ratio_embedder.linear_2
t_block.1 <- adaln_single.linear
final_layer.linear <- proj_out
final_layer.scale_shift_table <- scale_shift_table
"""

AURAFLOW = """
double_layers.N.attn.w2q <- joint_transformer_blocks.N.attn.to_q
double_layers.N.attn.w2k <- joint_transformer_blocks.N.attn.to_k
double_layers.N.attn.w2v <- joint_transformer_blocks.N.attn.to_v
double_layers.N.attn.w2o <- joint_transformer_blocks.N.attn.to_out.0
double_layers.N.attn.w1q <- joint_transformer_blocks.N.attn.add_q_proj
double_layers.N.attn.w1k <- joint_transformer_blocks.N.attn.add_k_proj
double_layers.N.attn.w1v <- joint_transformer_blocks.N.attn.add_v_proj
double_layers.N.attn.w1o <- joint_transformer_blocks.N.attn.to_add_out
double_layers.N.modX.1 <- joint_transformer_blocks.N.norm1.linear
double_layers.N.modC.1 <- joint_transformer_blocks.N.norm1_context.linear
double_layers.N.mlpX.c_fc1 <- joint_transformer_blocks.N.ff.linear_1
double_layers.N.mlpX.c_fc2 <- joint_transformer_blocks.N.ff.linear_2
double_layers.N.mlpX.c_proj <- joint_transformer_blocks.N.ff.out_projection
double_layers.N.mlpC.c_fc1 <- joint_transformer_blocks.N.ff_context.linear_1
double_layers.N.mlpC.c_fc2 <- joint_transformer_blocks.N.ff_context.linear_2
double_layers.N.mlpC.c_proj <- joint_transformer_blocks.N.ff_context.out_projection
single_layers.N.attn.w1q <- single_transformer_blocks.N.attn.to_q
single_layers.N.attn.w1k <- single_transformer_blocks.N.attn.to_k
single_layers.N.attn.w1v <- single_transformer_blocks.N.attn.to_v
single_layers.N.attn.w1o <- single_transformer_blocks.N.attn.to_out.0
single_layers.N.modCX.1 <- single_transformer_blocks.N.norm1.linear
single_layers.N.mlp.c_fc1 <- single_transformer_blocks.N.ff.linear_1
single_layers.N.mlp.c_fc2 <- single_transformer_blocks.N.ff.linear_2
single_layers.N.mlp.c_proj <- single_transformer_blocks.N.ff.out_projection
positional_encoding <- pos_embed.pos_embed
register_tokens <- register_tokens
init_x_linear <- pos_embed.proj
cond_seq_linear <- context_embedder
t_embedder.mlp.0 <- time_step_proj.linear_1
t_embedder.mlp.2 <- time_step_proj.linear_2
final_linear <- proj_out
modF.1 <- ~norm_out.linear
"""

LUMINA2_BLOCK = """
{0}.attention.qkv <- {0}.attn.{{to_q:in to_k to_v}}
{0}.attention.out <- {0}.attn.to_out.0
{0}.attention.q_norm <- {0}.attn.norm_q
{0}.attention.k_norm <- {0}.attn.norm_k
{0}.feed_forward.w1 <- {0}.feed_forward.linear_1
{0}.feed_forward.w2 <- {0}.feed_forward.linear_2
{0}.feed_forward.w3 <- {0}.feed_forward.linear_3
{0}.adaLN_modulation.1 <- {0}.norm1.linear
{0}.attention_norm1 <- {0}.norm1.norm
{0}.attention_norm2 <- {0}.norm2
{0}.ffn_norm1 <- {0}.ffn_norm1
{0}.ffn_norm2 <- {0}.ffn_norm2
"""

LUMINA2 = (
    LUMINA2_BLOCK.format("layers.N")
    + LUMINA2_BLOCK.format("noise_refiner.N")
    + LUMINA2_BLOCK.replace("norm1.norm", "norm1").format("context_refiner.N")
    + """
cap_embedder.0 <- time_caption_embed.caption_embedder.0
cap_embedder.1 <- time_caption_embed.caption_embedder.1
t_embedder.mlp.0 <- time_caption_embed.timestep_embedder.linear_1
t_embedder.mlp.2 <- time_caption_embed.timestep_embedder.linear_2
final_layer.adaLN_modulation.1 <- norm_out.linear_1
final_layer.linear <- norm_out.linear_2
"""
)

Z_IMAGE_BLOCK = """
{0}.attention.qkv <- {0}.attention.{{to_q to_k to_v}}
{0}.attention.out <- {0}.attention.to_out.0
{0}.attention.q_norm <- {0}.attention.norm_q
{0}.attention.k_norm <- {0}.attention.norm_k
"""

Z_IMAGE = (
    "".join(Z_IMAGE_BLOCK.format(name) for name in ("layers.N", "noise_refiner.N", "context_refiner.N"))
    + """
x_embedder <- all_x_embedder.2-1
final_layer <- all_final_layer.2-1
"""
)

# The modulations of a block lie end to end in one vector.
KREA2 = """
blocks.N.mod.lin[*] <- transformer_blocks.N.scale_shift_table[6,*]
last.modulation.lin <- final_layer.scale_shift_table
last.norm.scale <- final_layer.norm.weight
last.linear <- final_layer.linear
first <- img_in
tmlp.0 <- time_embed.linear_1
tmlp.2 <- time_embed.linear_2
tproj.1 <- time_mod_proj
txtmlp.0.scale <- txt_in.norm.weight
txtmlp.1 <- txt_in.linear_1
txtmlp.3 <- txt_in.linear_2
txtfusion.projector <- text_fusion.projector
""" + "".join(
    f"""
{native}.prenorm.scale <- {diffusers}.norm1.weight
{native}.postnorm.scale <- {diffusers}.norm2.weight
{native}.attn.wq <- {diffusers}.attn.to_q
{native}.attn.wk <- {diffusers}.attn.to_k
{native}.attn.wv <- {diffusers}.attn.to_v
{native}.attn.gate <- {diffusers}.attn.to_gate
{native}.attn.wo <- {diffusers}.attn.to_out.0
{native}.attn.qknorm.qnorm.scale <- {diffusers}.attn.norm_q.weight
{native}.attn.qknorm.knorm.scale <- {diffusers}.attn.norm_k.weight
{native}.mlp <- {diffusers}.ff
"""
    for native, diffusers in (
        ("blocks.N", "transformer_blocks.N"),
        ("txtfusion.layerwise_blocks.N", "text_fusion.layerwise_blocks.N"),
        ("txtfusion.refiner_blocks.N", "text_fusion.refiner_blocks.N"),
    )
)

IDEOGRAM4 = """
layers.N.attention.qkv <- layers.N.attention.{to_q to_k to_v}
layers.N.attention.o <- layers.N.attention.to_out.0
"""

LONGCAT = """
time_in.in_layer <- time_embed.timestep_embedder.linear_1
time_in.out_layer <- time_embed.timestep_embedder.linear_2
""" + FLUX.replace("scale|weight", "weight|scale")  # which ComfyUI renames in Flux only
