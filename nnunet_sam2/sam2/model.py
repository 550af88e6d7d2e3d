"""A SAM 2 of any image size from an architecture and its weights, built of sam2's own classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2.config import ModelConfig, check_image_size

# What only the video part of SAM 2 uses. A checkpoint without any of it still is a whole image model.
_MEMORY_PARTS = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "mask_downsample.",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    "sam_mask_decoder.pred_obj_score_head.",
)
_SCORE_HEAD = "sam_mask_decoder.pred_obj_score_head."
_MEMORY_CORE = ("memory_attention.", "memory_encoder.")


def model_arguments(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Return the keyword arguments of ``SAM2Base`` (and of its predictors) for an architecture at an image size.

    The values are those of Meta's configuration files, with the stability fallback of the decoder that Meta's builders
    add. Holes in masks are not filled here: that is fusion's work, in three dimensions.
    """
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention

    from nnunet_sam2.sam2.hiera import KeptHiera

    check_image_size(image_size)
    d_model, mem_dim = config.d_model, config.mem_dim
    grid = (image_size // 16, image_size // 16)
    trunk = config.trunk
    image_encoder = ImageEncoder(
        # Three levels reach the decoder; a coarser one only feeds the third from above.
        scalp=len(trunk.stages) - 3,
        trunk=KeptHiera(
            embed_dim=trunk.embed_dim,
            num_heads=trunk.num_heads,
            q_pool=len(trunk.stages) - 1,
            stages=trunk.stages,
            global_att_blocks=trunk.global_att_blocks,
            window_pos_embed_bkg_spatial_size=trunk.window_pos_embed_bkg_spatial_size,
            window_spec=trunk.window_spec,
        ),
        neck=FpnNeck(
            position_encoding=PositionEmbeddingSine(num_pos_feats=d_model, normalize=True, temperature=10000),
            d_model=d_model,
            backbone_channel_list=trunk.channels_coarse_to_fine,
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
        ),
    )
    rope = {"rope_theta": 10000.0, "feat_sizes": grid, "embedding_dim": d_model, "num_heads": 1, "downsample_rate": 1}
    memory_attention = MemoryAttention(
        d_model=d_model,
        pos_enc_at_input=True,
        num_layers=config.memory_layers,
        layer=MemoryAttentionLayer(
            activation="relu",
            dim_feedforward=config.memory_feedforward,
            dropout=0.1,
            pos_enc_at_attn=False,
            d_model=d_model,
            pos_enc_at_cross_attn_keys=True,
            pos_enc_at_cross_attn_queries=False,
            self_attention=RoPEAttention(dropout=0.1, **rope),
            cross_attention=RoPEAttention(dropout=0.1, rope_k_repeat=True, kv_in_dim=mem_dim, **rope),
        ),
    )
    memory_encoder = MemoryEncoder(
        in_dim=d_model,
        out_dim=mem_dim,
        position_encoding=PositionEmbeddingSine(num_pos_feats=mem_dim, normalize=True, temperature=10000),
        mask_downsampler=MaskDownSampler(embed_dim=d_model, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(
            CXBlock(dim=d_model, kernel_size=7, padding=3, layer_scale_init_value=1e-6, use_dwconv=True), num_layers=2
        ),
    )
    newer = config.version == "2.1"
    return {
        "image_encoder": image_encoder,
        "memory_attention": memory_attention,
        "memory_encoder": memory_encoder,
        "num_maskmem": 7,
        "image_size": image_size,
        "sigmoid_scale_for_mem_enc": 20.0,
        "sigmoid_bias_for_mem_enc": -10.0,
        "binarize_mask_from_pts_for_mem_enc": True,
        "use_mask_input_as_output_without_sam": True,
        "directly_add_no_mem_embed": True,
        "no_obj_embed_spatial": newer,
        "use_high_res_features_in_sam": True,
        "multimask_output_in_sam": True,
        "iou_prediction_use_sigmoid": True,
        "use_obj_ptrs_in_encoder": True,
        "add_tpos_enc_to_obj_ptrs": newer,
        "proj_tpos_enc_in_obj_ptrs": newer,
        "use_signed_tpos_enc_to_obj_ptrs": newer,
        "only_obj_ptrs_in_the_past_for_eval": True,
        "pred_obj_scores": True,
        "pred_obj_scores_mlp": True,
        "fixed_no_obj_ptr": True,
        "multimask_output_for_tracking": True,
        "use_multimask_token_for_obj_ptr": True,
        "multimask_min_pt_num": 0,
        "multimask_max_pt_num": 1,
        "use_mlp_for_obj_ptr_proj": True,
        "sam_mask_decoder_extra_args": {
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    }


def build_model(config: ModelConfig, image_size: int) -> torch.nn.Module:
    """Build a SAM 2 in evaluation mode; its weights are those of sam2's constructors until `load_weights`."""
    from sam2.modeling.sam2_base import SAM2Base

    model: torch.nn.Module = SAM2Base(**model_arguments(config, image_size))
    return model.eval().requires_grad_(False)


def build_untrained(config: ModelConfig, image_size: int) -> torch.nn.Module:
    """Build a SAM 2 whose weights are drawn with the architecture's seed; the caller's generator is left as it was."""
    if config.seed is None:
        raise ValueError(f"{config.name} has no seed: it wants a checkpoint")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config, image_size)
        for name, parameter in model.named_parameters():
            # Trained later or never: sam2 leaves these at zero, and an encoder without them does not know where it is.
            if name.endswith(("pos_embed", "pos_embed_window")):
                torch.nn.init.trunc_normal_(parameter, std=0.02)
    return model


def load_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor], *, where: str) -> bool:
    """Load a checkpoint's weights into a model and return whether its video memory came with them.

    A checkpoint with all image parts and nothing of the memory is taken: the object score is then not asked for, since
    its head is missing too (its token stays: the decoder was trained with it). Anything else that is missing, left over
    or of another shape raises `InputError` naming ``where``.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    left_over = sorted(state.keys() - expected.keys())
    reshaped = [key for key in sorted(expected.keys() & state.keys()) if expected[key].shape != state[key].shape]
    has_memory = any(key.startswith(_MEMORY_CORE) for key in state)
    needed = [key for key in missing if has_memory or not key.startswith(_MEMORY_PARTS)]
    for keys, what in ((needed, "lacks"), (left_over, "has foreign"), (reshaped, "has in another shape")):
        if keys:
            raise InputError(
                f"{where} {what} {len(keys)} weights, first {keys[0]}; it is damaged or not a SAM 2 of this size"
            )
    model.load_state_dict(dict(state), strict=False)
    if any(key.startswith(_SCORE_HEAD) for key in missing):
        sam2_model: Any = model
        sam2_model.pred_obj_scores = False
    return has_memory
