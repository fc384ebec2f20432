"""The table of model families that the suite runs: a new family joins with one entry.

Every decoder has 4 layers of width 32; an image makes about 16 vision tokens, of different number per image
where the family allows it. Knows nothing about the library under test.
"""

from __future__ import annotations

from typing import Any

import torch

from .family import Family, Vision
from .few_queries import heed_queries
from .inputs import (
    BOS,
    BREAK,
    END,
    EOS,
    IMAGE,
    IS_IMAGE,
    IS_VIDEO,
    PAD,
    START,
    TILE,
    UNK,
    VIDEO,
    VOCABULARY,
    Draw,
    Part,
    Row,
    TokenTypes,
    flat,
    per_row,
    vision,
)
from .patch_tower import register_towers

__all__ = ["FAMILIES"]

heed_queries()
register_towers()

# --- towers and text models


def text(model_type: str, **more: Any) -> dict[str, Any]:
    """A text model's config."""
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **more,
    }


def mrope(model_type: str, **more: Any) -> dict[str, Any]:
    """A text model's config with rotary positions in time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return text(model_type, **{"rope_parameters": {**rope, **more.pop("rope", {})}, **more})


def tower(model_type: str, image_size: int, patch_size: int, **more: Any) -> dict[str, Any]:
    """A vision tower's config."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        **more,
    }


CLIP = tower("clip_vision_model", 28, 7, projection_dim=32)
SIGLIP = tower("siglip_vision_model", 28, 7, vision_use_head=False)


def config(text_config: dict[str, Any], vision_config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A multimodal config."""
    return {
        "text_config": text_config,
        "vision_config": vision_config,
        "tie_word_embeddings": False,
        "image_token_id": IMAGE,
        **more,
    }


# --- what an image or a video looks like


def fixed(size: int, tokens: int, *, marks: bool = False, name: str = "pixel_values") -> Vision:
    """Every image has the same size and number of tokens; `marks`: between a start and an end token."""

    def make(draw: Draw, number: int) -> Part:
        pieces: list[int | list[int]] = [[START], tokens, [END]] if marks else [tokens]
        return vision(pieces, [tokens], {name: draw.pixels(1, 3, size, size)})

    return make


def stacked_tiles(size: int, count: int, tokens: int) -> Vision:
    """Every image is cut into so many tiles, of which one is the overview (PerceptionLM)."""

    def make(draw: Draw, number: int) -> Part:
        return vision([count * tokens], [tokens] * count, {"pixel_values": draw.pixels(1, count, 3, size, size)})

    return make


def two_sizes(size: int, large: int, tokens: int) -> Vision:
    """Every image comes twice, for two towers (DeepSeek-VL)."""

    def make(draw: Draw, number: int) -> Part:
        tensors = {
            "pixel_values": draw.pixels(1, 3, size, size),
            "high_res_pixel_values": draw.pixels(1, 3, large, large),
        }
        return vision([tokens], [tokens], tensors)

    return make


def tiles(size: int, tokens: int, *, mark: bool) -> Vision:
    """An image is cut into one or three tiles; `mark`: a marker before each makes it an image of its own."""

    def make(draw: Draw, number: int) -> Part:
        count = (3, 1)[number % 2]
        pieces: list[int | list[int]] = [[START]]
        for _ in range(count):
            pieces += [[TILE], tokens] if mark else [tokens]
        pixels = {"pixel_values": draw.pixels(count, 3, size, size)}
        return vision([*pieces, [END]], [tokens] * count if mark else [tokens * count], pixels)

    return make


def marked_rows(size: int, tokens: int) -> Vision:
    """As `tiles`, with the pixel mask and the axis "images of a row" that Idefics asks for."""

    def make(draw: Draw, number: int) -> Part:
        part = tiles(size, tokens, mark=True)(draw, number)
        pixels = part.tensors["pixel_values"]
        mask = torch.ones(len(pixels), size, size, dtype=torch.long)
        return Part(part.ids, part.kinds, part.groups, {"pixel_values": pixels, "pixel_attention_mask": mask})

    return make


def masked_tiles(size: int, tokens: int) -> Vision:
    """As `tiles`, with a mask of the tiles that a row has (Granite Docling)."""

    def make(draw: Draw, number: int) -> Part:
        part = tiles(size, tokens, mark=True)(draw, number)
        mask = torch.ones(len(part.tensors["pixel_values"]), dtype=torch.bool)
        return Part(part.ids, part.kinds, part.groups, {**part.tensors, "pixel_attention_mask": mask})

    return make


def views(size: int, local: int, overview: int, tile: int, behind: int) -> Vision:
    """An overview, perhaps a tile before it (Step 3.7), and a separator behind (DeepSeek-OCR 2)."""

    def make(draw: Draw, number: int) -> Part:
        count = (1, 0)[number % 2]
        tokens = count * tile + overview + behind
        tensors = {"pixel_values": draw.pixels(1, 3, size, size), "num_local_patches": torch.tensor([count])}
        if count:
            tensors["pixel_values_local"] = draw.pixels(count, 3, local, local)
        return vision([tokens], [tokens], tensors)

    return make


def any_resolution(size: int, base: int, grid: int) -> Vision:
    """An overview and tiles, unpadded, with a token at the end of each row of patches (LLaVA-NeXT)."""
    shapes = [(size * 2, size * 2, 4), (size, size * 2, 2), (size * 2, size, 2)]

    def make(draw: Draw, number: int) -> Part:
        height, width, count = shapes[number % len(shapes)]
        rows, columns = height // size * grid, width // size * grid
        tokens = base + rows * (columns + 1)
        return vision(
            [tokens],
            [tokens],
            {"pixel_values": draw.pixels(1, 1 + count, 3, size, size), "image_sizes": torch.tensor([[height, width]])},
        )

    return make


def patches(patch: int, merge: int = 2, *, frames: int = 2, flat: bool = True, sizes: bool = False) -> Vision:
    """Patches in a list, with their grid (Qwen-VL, GLM-V).

    Args:
        patch: its side in pixels.
        merge: side in patches of what becomes a token.
        frames: that a patch spans.
        flat: a patch is a list of numbers, or has channels, height and width.
        sizes: the inputs say `merge` too.
    """
    grids = [(1, 8, 8), (1, 4, 10), (1, 6, 8)] if merge > 1 else [(1, 4, 4), (1, 2, 5), (1, 3, 4)]

    def make(draw: Draw, number: int) -> Part:
        grid = grids[number % len(grids)]
        tokens = grid[0] * grid[1] * grid[2] // merge**2
        shape = (3 * frames * patch * patch,) if flat else (3, patch, patch)
        tensors = {
            "pixel_values": draw.pixels(tokens * merge**2, *shape),
            "image_grid_thw": torch.tensor([grid]),
            **({"image_merge_sizes": torch.tensor([merge])} if sizes else {}),
        }
        return vision([[START], tokens, [END]], [tokens], tensors)

    return make


def patch_lines(patch: int) -> Vision:
    """Patches in a list, with their grid; tokens before and behind an image, and at the end of each line (HunYuan)."""
    grids = [(6, 8), (4, 10), (6, 6)]

    def make(draw: Draw, number: int) -> Part:
        height, width = grids[number % len(grids)]
        tokens = height // 2 * (width // 2 + 1) + 2
        tensors = {
            "pixel_values": draw.pixels(height * width, 3 * patch * patch),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
        return vision([[START], tokens, [END]], [tokens], tensors)

    return make


def patch_video(
    patch: int,
    merge: int = 2,
    *,
    token: int = VIDEO,
    stamps: bool,
    depth: int = 2,
    sizes: bool = False,
    halved: bool = False,
) -> Vision:
    """A video as patches of so many frames with their grid; `stamps`: each frame stands behind its own time stamp;
    `sizes`: the inputs say `merge` too; `halved`: two frames become one's tokens (ERNIE 4.5 VL)."""

    def make(draw: Draw, number: int) -> Part:
        frames, height, width = ((2, 6, 6), (4 if halved else 3, 4, 6))[number % 2]
        tokens = height * width // merge**2
        tensors = {
            "pixel_values_videos": draw.pixels(frames * height * width, 3 * depth * patch * patch),
            "video_grid_thw": torch.tensor([[frames, height, width]]),
            **({"video_merge_sizes": torch.tensor([merge])} if sizes else {}),
        }
        frames = frames // 2 if halved else frames
        pieces: list[int | list[int]] = [[START], frames * tokens, [END]]
        if stamps:
            pieces = [piece for _ in range(frames) for piece in ([*draw.words(2), START], tokens, [END])]
        return vision(pieces, [frames * tokens], tensors, token=token, kind=IS_VIDEO)

    return make


def frames(size: int, count: int, groups: list[int]) -> Vision:
    """A video as frames (videos, frames, 3, height, width)."""

    def make(draw: Draw, number: int) -> Part:
        pixels = {"pixel_values_videos": draw.pixels(1, count, 3, size, size)}
        return vision([sum(groups)], groups, pixels, token=VIDEO, kind=IS_VIDEO)

    return make


def pixtral(patch: int, *, breaks: bool, **sizes: str) -> Vision:
    """Images of any shape, with a marker at the end of each row of tokens."""
    shapes = [(4, 4), (2, 5), (3, 4)]

    def make(draw: Draw, number: int) -> Part:
        height, width = shapes[number % len(shapes)]
        pieces: list[int | list[int]] = []
        for row in range(height):
            pieces += [width, [END if row == height - 1 else BREAK]]
        return vision(
            pieces if breaks else [height * width],
            [height * width],
            {
                "pixel_values": draw.pixels(1, 3, height * patch, width * patch),
                "image_sizes": torch.tensor([[height * patch, width * patch]]),
            },
        )

    return make


def pooled_patches(patch: int, pool: int, patches: int, grids: list[tuple[int, int]]) -> Vision:
    """Patches with their places, filled up to one number, of which blocks become tokens (Gemma 4)."""

    def make(draw: Draw, number: int) -> Part:
        height, width = grids[number % len(grids)]
        pixels, places = placed(draw, 1, height, width, patches, patch)
        tokens = height * width // pool**2
        return vision(
            [[START], tokens, [END]], [tokens], {"pixel_values": pixels.sigmoid(), "image_position_ids": places}
        )

    return make


def pooled_video(patch: int, pool: int, patches: int, grids: list[tuple[int, int, int]]) -> Vision:
    """A video as frames of patches with their places (Gemma 4)."""

    def make(draw: Draw, number: int) -> Part:
        count, height, width = grids[number % len(grids)]
        pixels, places = placed(draw, count, height, width, patches, patch)
        tokens = height * width // pool**2
        pieces: list[int | list[int]] = [
            piece for _ in range(count) for piece in ([*draw.words(2), START], tokens, [END])
        ]
        tensors = {"pixel_values_videos": pixels.sigmoid(), "video_position_ids": places}
        tensors["num_frames_per_video"] = torch.tensor([count])
        return vision(pieces, [count * tokens], tensors, token=VIDEO, kind=IS_VIDEO)

    return make


def placed(
    draw: Draw, count: int, height: int, width: int, patches: int, patch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of images (count, patches, numbers) and the column and row of each, -1 at filling."""
    grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=-1).reshape(-1, 2)
    places = torch.full((count, patches, 2), -1)
    places[:, : len(grid)] = grid
    return draw.pixels(count, patches, 3 * patch * patch), places


def seconds(make: Vision) -> Vision:
    """A video whose time steps are told in seconds (Qwen-Omni)."""

    def timed(draw: Draw, number: int) -> Part:
        part = make(draw, number)
        return Part(part.ids, part.kinds, part.groups, {**part.tensors, "video_second_per_grid": torch.tensor([1.0])})

    return timed


def pools(start: int, side: int, rows: int, columns: int) -> torch.Tensor:
    """Which patches of a crop of side x side each of rows x columns tokens is made of, four each (Molmo2)."""
    places = start + torch.arange(side * side).view(side, side)[: 2 * rows, : 2 * columns]
    return places.view(rows, 2, columns, 2).transpose(1, 2).reshape(rows * columns, 4)


def pooled_crops(patch: int, side: int) -> Vision:
    """An overview and a crop, of whose patches tokens are made (Molmo2)."""
    grids = [(3, 3), (2, 3), (3, 2)]

    def make(draw: Draw, number: int) -> Part:
        rows, columns = grids[number % len(grids)]
        tensors = {
            "pixel_values": draw.pixels(2, side * side, 3 * patch * patch),
            "image_token_pooling": torch.cat([pools(0, side, 2, 2), pools(side * side, side, rows, columns)]),
            "image_grids": torch.tensor([[2, 2, rows, columns]]),
        }
        pieces: list[int | list[int]] = [[START], 4, [END, TILE], rows * columns, [END]]
        return vision(pieces, [4 + rows * columns], tensors)

    return make


def padded_patches(patch: int) -> Vision:
    """Patches of an image filled up to one number for all, with their shape and mask (LFM2-VL)."""
    shapes, most = [(8, 8), (4, 10), (6, 8)], 64

    def make(draw: Draw, number: int) -> Part:
        height, width = shapes[number % len(shapes)]
        tokens, real = height * width // 4, (torch.arange(most) < height * width).long()
        tensors = {
            "pixel_values": draw.pixels(1, most, 3 * patch * patch),
            "pixel_attention_mask": real[None],
            "spatial_shapes": torch.tensor([[height, width]]),
        }
        return vision([[START], tokens, [END]], [tokens], tensors)

    return make


def pooled_frames(patch: int, side: int) -> Vision:
    """A video as frames, of whose patches tokens are made (Molmo2)."""

    def make(draw: Draw, number: int) -> Part:
        count = (2, 3)[number % 2]
        tensors = {
            "pixel_values_videos": draw.pixels(count, side * side, 3 * patch * patch),
            "video_token_pooling": torch.cat([pools(frame * side * side, side, 2, 3) for frame in range(count)]),
            "video_grids": torch.tensor([[count, 2, 3]]),
        }
        pieces: list[int | list[int]] = [piece for _ in range(count) for piece in ([*draw.words(2), START], 6, [END])]
        return vision(pieces, [6 * count], tensors, kind=IS_VIDEO)

    return make


def strips(patch: int, side: int, *, video: bool = False) -> Vision:
    """Patches in a strip as high as one of them, with their grids; a token stands for a square of that `side`, and a
    video is frames one after the other (MiniCPM)."""
    grids = [(4 * side, 4 * side), (2 * side, 5 * side), (3 * side, 4 * side)]
    end, token, kind = ("_videos", VIDEO, IS_VIDEO) if video else ("", IMAGE, IS_IMAGE)

    def make(draw: Draw, number: int) -> Part:
        grid = grids[number % len(grids)]
        count, tokens = 2 if video else 1, grid[0] * grid[1] // side**2
        tensors = {
            f"pixel_values{end}": draw.pixels(1, 3, patch, count * grid[0] * grid[1] * patch),
            f"target_sizes{end}": torch.tensor([grid] * count),
        }
        return vision([[START], tokens, [END]] * count, [tokens] * count, tensors, token=token, kind=kind)

    return make


def offset_pools(rows: list[Row]) -> dict[str, torch.Tensor]:
    """All images end to end; patches are counted over the crops of all (Molmo2)."""
    start, moved = 0, []
    for part in (part for row in rows for part in row.parts):
        tensors = dict(part.tensors)
        for name in tensors.keys() & {"image_token_pooling", "video_token_pooling"}:
            tensors[name] = tensors[name] + start
        start += sum(len(t) * t.shape[1] for name, t in tensors.items() if name.startswith("pixel_values"))
        moved.append(Part(part.ids, part.kinds, part.groups, tensors))
    return flat([Row(moved)])


def side_by_side(rows: list[Row]) -> dict[str, torch.Tensor]:
    """As `flat`, but for strips of patches, which follow each other in their last dimension."""
    parts = [part.tensors for row in rows for part in row.parts]
    names = ("pixel_values", "pixel_values_videos")
    joined = {name: [part[name] for part in parts if name in part] for name in names}
    others = {name: tensor for name, tensor in flat(rows).items() if name not in names}
    return {**{name: torch.cat(strip, dim=-1) for name, strip in joined.items() if strip}, **others}


# --- the table

MM_TYPES = TokenTypes("mm_token_type_ids", text=0, image=1, video=2, answer=0)
PREFIX_TYPES = TokenTypes("token_type_ids", text=0, image=0, video=0, answer=1, first_turn_only=True)
VIDEO_ID = {"video_token_id": VIDEO}
MARKS = {"vision_start_token_id": START, "vision_end_token_id": END, **VIDEO_ID}
GLM_MARKS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": TILE,
    "video_end_token_id": BREAK,
    **VIDEO_ID,
}
PINPOINTS = {"image_grid_pinpoints": [[56, 56], [28, 56], [56, 28]]}
PATCH_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
}
QWEN2_TOWER = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
QWEN25_TOWER = {**PATCH_TOWER, "window_size": 16, "fullatt_block_indexes": [1]}
QWEN3_TOWER = {**PATCH_TOWER, "depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
GLM_TOWER = {**PATCH_TOWER, "image_size": 32}
PERCEIVER = {
    "hidden_size": 32,
    "resampler_n_latents": 12,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
    "num_key_value_heads": 2,
}
INTERNVL_TOWER = tower("internvl_vision", 42, 7)
IDEFICS_TOWER = tower("idefics3_vision", 42, 7)
PIXTRAL_TOWER = tower("pixtral", 64, 4)
GEMMA3_TEXT = text(
    "gemma3_text", query_pre_attn_scalar=8, sliding_window=10, layer_types=["sliding_attention", "full_attention"] * 2
)
AUDIO = {
    **{"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 32},
    **{"num_mel_bins": 16, "max_source_positions": 20},
}
# transformers 5.23 counts the places of a later turn's image as if it were text
OMNI: dict[str, Any] = {"images_later": False, "in_space": True}
OMNI_MARKS = {"audio_token_id": UNK, "audio_start_token_id": TILE, "audio_end_token_id": BREAK}
GEMMA4_TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
COHERE2_TEXT = text(
    "cohere2",
    sliding_window=10,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    logit_scale=1.0,
)
GLM_EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}

FLAT_TOWER = tower("", 32, 4)  # of images of any size
WINDOWED_TOWER = {**QWEN25_TOWER, "num_heads": 4}
SAM_TOWER = tower(
    "got_ocr2_vision", 64, 4, output_channels=8, mlp_dim=48, window_size=6, global_attn_indexes=[1], qkv_bias=True
)
LATENT = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,  # of the rotary part
}
GRANITE = {"attention_multiplier": 0.35, "embedding_multiplier": 1.5, "residual_multiplier": 0.8, "logits_scaling": 0.5}
WINDOWED_LAYERS = {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"] * 2}
# a layer that attends, two that carry a state and do not, one that attends
GATED_DELTA_NET = {
    "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN35_VISION_TOWER = {**PATCH_TOWER, "num_position_embeddings": 64}
LFM3_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "patch_size": 4,
    "layer_types": ["conv", "full_attention", "conv"],
}
MINICPM_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
TIMM_TOWER = {
    **{"model_type": "timm_wrapper", "architecture": "maps", "hidden_size": 24, "model_args": {"patch_size": 7}},
    "label_names": ["any"],  # else they would be read from the package
}
# queries are scaled by the position of their token, from the eighth on
SCALED_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
}
QWEN35_ROPE = {"mrope_interleaved": True, "partial_rotary_factor": 1.0}

# transformers 5.23 hands the images of a GLM prompt, or of Granite Vision's, to its beams in the wrong order
ONE_IMAGE_EACH = ([3, 5], [2, 9], [7])
NO_FLEX = ("sdpa", "eager")  # stock refuses flex_attention
# a ring buffer of the window's length has no room for columns that are fewer than the window counts
WINDOWS = dict.fromkeys(("static cache", "compiled"), "StaticSlidingWindowLayer, from which tokens cannot")

TABLE = [
    Family(
        name="llava",
        model_class="LlavaForConditionalGeneration",
        config=config(text("llama"), CLIP),
        image=fixed(28, 16),
        core=True,
    ),
    Family(
        name="llava-mistral",
        model_class="LlavaForConditionalGeneration",
        config=config(text("mistral", sliding_window=10), CLIP),
        image=fixed(28, 16),
        refuses=WINDOWS,
    ),
    Family(
        name="llava-qwen2",
        model_class="LlavaForConditionalGeneration",
        config=config(text("qwen2"), CLIP),
        image=fixed(28, 16),
    ),
    Family(
        name="llava-next",
        model_class="LlavaNextForConditionalGeneration",
        config=config(text("mistral", sliding_window=None), {**CLIP, "patch_size": 14}, **PINPOINTS),
        image=any_resolution(28, base=4, grid=2),
    ),
    Family(
        name="llava-onevision",
        model_class="LlavaOnevisionForConditionalGeneration",
        config=config(text("qwen2"), {**SIGLIP, "patch_size": 14}, **PINPOINTS, **VIDEO_ID),
        image=any_resolution(28, base=4, grid=2),
        video=frames(28, 11, [12]),
    ),
    Family(
        name="vipllava",
        model_class="VipLlavaForConditionalGeneration",
        config=config(text("llama"), CLIP, vision_feature_layers=[-2, -3]),
        image=fixed(28, 16),
    ),
    *(
        Family(
            name=f"internvl-{model_type}",
            model_class="InternVLForConditionalGeneration",
            config=config(text(model_type), INTERNVL_TOWER, image_seq_length=9),
            image=tiles(42, 9, mark=False),
            core=model_type == "qwen2",
        )
        for model_type in ("qwen2", "qwen3", "llama")
    ),
    Family(
        name="qwen2-vl",
        model_class="Qwen2VLForConditionalGeneration",
        config=config(mrope("qwen2_vl_text"), QWEN2_TOWER, **MARKS),
        image=patches(4),
        video=patch_video(4, stamps=False),
        types=MM_TYPES,
        attn=NO_FLEX,
    ),
    Family(
        name="qwen2.5-vl",
        model_class="Qwen2_5_VLForConditionalGeneration",
        config=config(mrope("qwen2_5_vl_text"), QWEN25_TOWER, **MARKS),
        image=patches(4),
        video=patch_video(4, stamps=False),
        types=MM_TYPES,
        attn=NO_FLEX,
    ),
    Family(
        name="qwen3-vl",
        model_class="Qwen3VLForConditionalGeneration",
        config=config(mrope("qwen3_vl_text", rope={"mrope_interleaved": True}), QWEN3_TOWER, **MARKS),
        image=patches(4),
        video=patch_video(4, stamps=True),
        types=MM_TYPES,
        attn=NO_FLEX,
        core=True,
    ),
    Family(
        name="smolvlm",
        model_class="SmolVLMForConditionalGeneration",
        config=config(text("llama"), {**IDEFICS_TOWER, "model_type": "smolvlm_vision"}, scale_factor=2),
        image=marked_rows(42, 9),
        collate=per_row,
        core=True,
    ),
    Family(
        name="idefics3",
        model_class="Idefics3ForConditionalGeneration",
        config=config(text("llama"), IDEFICS_TOWER, scale_factor=2),
        image=marked_rows(42, 9),
        collate=per_row,
    ),
    Family(
        name="gemma3",
        model_class="Gemma3ForConditionalGeneration",
        config=config(GEMMA3_TEXT, {**SIGLIP, "image_size": 56}, mm_tokens_per_image=16),
        image=fixed(56, 16, marks=True),
        types=TokenTypes("token_type_ids", text=0, image=1, video=1, answer=0),
        core=True,
        refuses=WINDOWS,
    ),
    Family(
        name="gemma4",
        model_class="Gemma4ForConditionalGeneration",
        config=config(
            text(
                "gemma4_text",
                intermediate_size=48,
                sliding_window=40,
                layer_types=["sliding_attention", "full_attention"] * 2,
                num_kv_shared_layers=1,
                use_double_wide_mlp=True,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=VOCABULARY,
                global_head_dim=16,
            ),
            GEMMA4_TOWER,
            audio_config=None,
            audio_token_id=UNK,
            **VIDEO_ID,
        ),
        image=pooled_patches(4, 2, 64, [(8, 8), (4, 10), (6, 8)]),
        video=pooled_video(4, 2, 36, [(2, 6, 6), (3, 4, 6)]),
        refuses=WINDOWS,
    ),
    Family(
        name="gemma4-moe",
        model_class="Gemma4ForConditionalGeneration",
        config=config(
            text(
                "gemma4_text",
                sliding_window=10,
                layer_types=["sliding_attention", "full_attention"] * 2,
                hidden_size_per_layer_input=0,
                global_head_dim=16,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
                enable_moe_block=True,
                num_experts=4,
                top_k_experts=2,
                moe_intermediate_size=32,
                use_bidirectional_attention="vision",
            ),
            GEMMA4_TOWER,
            audio_config=None,
            audio_token_id=UNK,
            **VIDEO_ID,
        ),
        image=pooled_patches(4, 2, 64, [(8, 8), (4, 10), (6, 8)]),
        video=pooled_video(4, 2, 36, [(2, 6, 6), (3, 4, 6)]),
        types=MM_TYPES,
        refuses=WINDOWS,
    ),
    Family(
        name="gemma4-unified",
        model_class="Gemma4UnifiedForConditionalGeneration",
        config=config(
            text(
                "gemma4_unified_text",
                sliding_window=10,
                layer_types=["sliding_attention", "full_attention"] * 2,
                global_head_dim=16,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
            ),
            {
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 24,
                "mm_posemb_size": 16,
                "output_proj_dims": 24,
            },
            audio_config=None,
            audio_token_id=UNK,
            **VIDEO_ID,
        ),
        image=pooled_patches(4, 1, 24, [(4, 6), (4, 4), (2, 6)]),
        video=pooled_video(4, 1, 9, [(2, 3, 3), (3, 2, 4)]),
        types=MM_TYPES,
        refuses=WINDOWS,
    ),
    Family(
        name="llama4",
        model_class="Llama4ForConditionalGeneration",
        config=config(
            text(
                "llama4_text",
                intermediate_size_mlp=48,
                num_local_experts=4,
                interleave_moe_layer_step=2,
                no_rope_layer_interval=2,
                attention_chunk_size=24,
            ),
            tower(
                *("llama4_vision_model", 28, 7),
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
                **{"intermediate_size": 128, "pixel_shuffle_ratio": 0.5},
            ),
        ),
        image=tiles(28, 4, mark=False),
        encodes_ahead=False,  # its features are not where `generate` looks for them
        refuses=WINDOWS,
    ),
    Family(
        name="qwen2.5-omni",
        model_class="Qwen2_5OmniThinkerForConditionalGeneration",
        config=config(mrope("qwen2_5_omni_text"), QWEN25_TOWER, audio_config=AUDIO, **MARKS, **OMNI_MARKS),
        image=patches(4),
        video=seconds(patch_video(4, stamps=False)),
        attn=NO_FLEX,
        **OMNI,
    ),
    Family(
        name="qwen3-omni",
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        config=config(
            mrope("qwen3_omni_moe_text", rope={"mrope_interleaved": True}, **QWEN_EXPERTS),
            QWEN3_TOWER,
            audio_config={**AUDIO, "downsample_hidden_size": 8},
            **MARKS,
            **OMNI_MARKS,
        ),
        image=patches(4),
        video=seconds(patch_video(4, stamps=False)),
        attn=NO_FLEX,
        **OMNI,
    ),
    Family(
        name="molmo2",
        model_class="Molmo2ForConditionalGeneration",
        config={
            "text_config": text("molmo2_text", additional_vocab_size=4),
            "vision_config": {
                **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
                **{"num_key_value_heads": 2, "head_dim": 16, "image_size": [24, 24], "patch_size": 4},
                "num_position_embeddings": 36,
            },
            "adapter_config": {
                **{"vision_feature_layer": [-1, -2], "hidden_size": 32, "num_attention_heads": 2},
                **{"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "text_hidden_size": 32},
            },
            "image_patch_id": IMAGE,
            "tie_word_embeddings": False,
        },
        image=pooled_crops(4, 6),
        video=pooled_frames(4, 6),
        mixes_video=False,
        collate=offset_pools,
        types=TokenTypes("mm_token_type_ids", text=0, image=1, video=1, answer=0),
        images_later=False,  # all images of a prompt see each other, those of its cache no later one
    ),
    Family(
        name="paligemma",
        model_class="PaliGemmaForConditionalGeneration",
        config=config(text("gemma"), {**SIGLIP, "projection_dim": 32}, projection_dim=32, hidden_size=32),
        image=fixed(28, 16),
        types=PREFIX_TYPES,
    ),
    Family(
        name="mistral3",
        model_class="Mistral3ForConditionalGeneration",
        config=config(text("mistral", sliding_window=None), PIXTRAL_TOWER, spatial_merge_size=2),
        image=pixtral(8, breaks=True),
    ),
    Family(
        name="mistral3-ministral3",
        model_class="Mistral3ForConditionalGeneration",
        config=config(text("ministral3", rope_parameters=SCALED_ROPE), PIXTRAL_TOWER, spatial_merge_size=2),
        image=pixtral(8, breaks=True),
        absolute=True,
    ),
    Family(
        name="mistral3-mistral4",
        model_class="Mistral3ForConditionalGeneration",
        config=config(
            text("mistral4", rope_parameters=SCALED_ROPE, **{**LATENT, "qk_nope_head_dim": 4}),
            PIXTRAL_TOWER,
            spatial_merge_size=2,
        ),
        image=pixtral(8, breaks=True),
        absolute=True,
    ),
    Family(
        name="aya-vision",
        model_class="AyaVisionForConditionalGeneration",
        config=config(COHERE2_TEXT, {**SIGLIP, "image_size": 42}, downsample_factor=2),
        image=tiles(42, 9, mark=True),
        refuses=WINDOWS,
    ),
    Family(
        name="glm4v",
        model_class="Glm4vForConditionalGeneration",
        config=config(mrope("glm4v_text"), GLM_TOWER, **GLM_MARKS),
        image=patches(4),
        video=patch_video(4, token=IMAGE, stamps=True),
        mixes_video=False,
        types=MM_TYPES,
        attn=NO_FLEX,
        beams=ONE_IMAGE_EACH,
    ),
    Family(
        name="glm4v-moe",
        model_class="Glm4vMoeForConditionalGeneration",
        config=config(
            mrope("glm4v_moe_text", head_dim=16, rope={"partial_rotary_factor": 0.5}, **GLM_EXPERTS),
            GLM_TOWER,
            **GLM_MARKS,
        ),
        image=patches(4),
        video=patch_video(4, token=IMAGE, stamps=True),
        mixes_video=False,
        types=MM_TYPES,
        beams=ONE_IMAGE_EACH,
    ),
    # families that the issue of the suite does not name
    Family(
        name="llava-pixtral",
        model_class="LlavaForConditionalGeneration",
        config=config(
            text("mistral", sliding_window=None),
            PIXTRAL_TOWER,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        image=pixtral(4, breaks=True),
    ),
    Family(
        name="llava-next-video",
        model_class="LlavaNextVideoForConditionalGeneration",
        config=config(text("llama"), {**CLIP, "patch_size": 14}, **PINPOINTS, **VIDEO_ID),
        image=any_resolution(28, base=4, grid=2),
        video=frames(28, 12, [12]),
    ),
    Family(
        name="video-llava",
        model_class="VideoLlavaForConditionalGeneration",
        config=config(text("llama"), CLIP, **VIDEO_ID),
        image=fixed(28, 16, name="pixel_values_images"),
        video=frames(28, 2, [17, 17]),
        attn=NO_FLEX,
    ),
    Family(
        name="idefics2",
        model_class="Idefics2ForConditionalGeneration",
        config=config(
            text("mistral", sliding_window=None),
            {**IDEFICS_TOWER, "model_type": "idefics2_vision"},
            perceiver_config=PERCEIVER,
        ),
        image=marked_rows(42, 12),
        collate=per_row,
    ),
    Family(
        name="paligemma2",
        model_class="PaliGemmaForConditionalGeneration",
        config=config(
            text("gemma2", sliding_window=10, query_pre_attn_scalar=8),
            {**SIGLIP, "projection_dim": 32},
            projection_dim=32,
            hidden_size=32,
        ),
        image=fixed(28, 16),
        types=PREFIX_TYPES,
        attn=("eager",),
        static_cache=False,
    ),
    Family(
        name="qwen3-vl-moe",
        model_class="Qwen3VLMoeForConditionalGeneration",
        config=config(
            mrope("qwen3_vl_moe_text", rope={"mrope_interleaved": True}, **QWEN_EXPERTS), QWEN3_TOWER, **MARKS
        ),
        image=patches(4),
        video=patch_video(4, stamps=True),
        types=MM_TYPES,
    ),
    Family(
        name="qwen3.5",
        model_class="Qwen3_5ForConditionalGeneration",
        config=config(mrope("qwen3_5_text", rope=QWEN35_ROPE, **GATED_DELTA_NET), QWEN35_VISION_TOWER, **MARKS),
        image=patches(4),
        video=patch_video(4, stamps=True),
        types=MM_TYPES,
        attn=NO_FLEX,
        core=True,
    ),
    Family(
        name="qwen3.5-moe",
        model_class="Qwen3_5MoeForConditionalGeneration",
        config=config(
            mrope(
                "qwen3_5_moe_text",
                rope=QWEN35_ROPE,
                **GATED_DELTA_NET,
                **QWEN_EXPERTS,
                shared_expert_intermediate_size=48,
            ),
            QWEN35_VISION_TOWER,
            **MARKS,
        ),
        image=patches(4),
        video=patch_video(4, stamps=True),
        types=MM_TYPES,
        attn=NO_FLEX,
    ),
    *(
        Family(
            name=name,
            model_class=model_class,
            config=config(
                mrope("qwen3_5_text", rope=QWEN35_ROPE, **GATED_DELTA_NET), MINICPM_TOWER, insert_layer_id=1, **VIDEO_ID
            ),
            image=strips(4, side),
            video=strips(4, side, video=True),
            collate=side_by_side,
            attn=NO_FLEX,
        )
        for name, model_class, side in (
            ("minicpm-v-4.6", "MiniCPMV4_6ForConditionalGeneration", 4),
            ("minicpm-ocr", "MiniCPMOcrForConditionalGeneration", 2),  # windows of patches are not merged
        )
    ),
    Family(
        name="minicpm-v-4.7",
        model_class="MiniCPMV4_7ForConditionalGeneration",
        config=config(
            mrope("qwen3_5_text", rope=QWEN35_ROPE, **GATED_DELTA_NET),
            MINICPM_TOWER,
            **{"insert_layer_id": 1, "image_start_id": START, "image_end_id": END},
            **{"slice_start_id": TILE, "slice_end_id": BREAK, "newline_id": UNK},
            **VIDEO_ID,
        ),
        image=strips(4, 4),
        video=strips(4, 4, video=True),
        collate=side_by_side,
        types=MM_TYPES,
        attn=NO_FLEX,
        places_later_images=False,
        ends_in_images=False,
    ),
    Family(
        name="lfm2-vl",
        model_class="Lfm2VlForConditionalGeneration",
        config=config(
            text("lfm2", layer_types=["full_attention", "conv", "conv", "full_attention"]),
            tower("siglip2_vision_model", 28, 4, num_patches=16, vision_use_head=False),
            projector_hidden_size=40,
        ),
        image=padded_patches(4),
        attn=NO_FLEX,
    ),
    Family(
        name="lfm3-vl",
        model_class="Lfm3VlForConditionalGeneration",
        config=config(
            text(
                "lfm3",
                layer_types=["full_attention", "conv", "sliding_attention", "conv"],
                sliding_window=10,
                conv_L_cache=4,
            ),
            LFM3_TOWER,
            projector_hidden_size=40,
            **MARKS,
        ),
        image=patches(4),
        video=patch_video(4, stamps=True),
        refuses=WINDOWS,
    ),
    Family(
        name="glm4.6v",
        model_class="Glm46VForConditionalGeneration",
        config=config(mrope("glm4v_text"), {**GLM_TOWER, "model_type": "glm4v_vision"}, **GLM_MARKS),
        image=patches(4),
        video=patch_video(4, token=IMAGE, stamps=True),
        mixes_video=False,
        types=MM_TYPES,
        attn=NO_FLEX,
        beams=ONE_IMAGE_EACH,
    ),
    Family(
        name="cohere2-vision",
        model_class="Cohere2VisionForConditionalGeneration",
        config=config(COHERE2_TEXT, {**SIGLIP, "image_size": 42}, downsample_factor=2, alignment_intermediate_size=64),
        image=tiles(42, 9, mark=False),
        refuses=WINDOWS,
    ),
    Family(
        name="lighton-ocr",
        model_class="LightOnOcrForConditionalGeneration",
        config=config(text("qwen3"), PIXTRAL_TOWER, spatial_merge_size=2),
        image=pixtral(8, breaks=False),
    ),
    Family(
        name="deepseek-vl",
        model_class="DeepseekVLForConditionalGeneration",
        config=config(text("llama"), SIGLIP),
        image=fixed(28, 16),
        attn=NO_FLEX,
    ),
    Family(
        name="ovis2",
        model_class="Ovis2ForConditionalGeneration",
        config=config(
            text("qwen2"),
            tower("ovis2_vision", 28, 7, vocab_size=40, num_visual_indicator_tokens=2),
            visual_indicator_token_ids=[START, END],
            vocab_size=VOCABULARY,
            hidden_size=32,
        ),
        image=fixed(28, 16, marks=True),
    ),
    Family(
        name="glmga",
        model_class="Glm46VForConditionalGeneration",
        config_class="GlmgaConfig",
        config=config(mrope("glm4v_text"), {**GLM_TOWER, "model_type": "glm4v_vision"}, **GLM_MARKS),
        image=patches(4),
        video=patch_video(4, token=IMAGE, stamps=True),
        mixes_video=False,
        types=MM_TYPES,
        attn=NO_FLEX,
        beams=ONE_IMAGE_EACH,
    ),
    Family(
        name="shieldgemma2",
        model_class="Gemma3ForConditionalGeneration",
        config_class="ShieldGemma2Config",
        config=config(GEMMA3_TEXT, {**SIGLIP, "image_size": 56}, mm_tokens_per_image=16),
        image=fixed(56, 16, marks=True),
        types=TokenTypes("token_type_ids", text=0, image=1, video=1, answer=0),
        refuses=WINDOWS,
    ),
    Family(
        name="glm-ocr",
        model_class="GlmOcrForConditionalGeneration",
        config=config(mrope("glm_ocr_text"), GLM_TOWER, **GLM_MARKS),
        image=patches(4),
        video=patch_video(4, token=IMAGE, stamps=True),
        mixes_video=False,
        types=MM_TYPES,
        attn=NO_FLEX,
        beams=ONE_IMAGE_EACH,
    ),
    Family(
        name="paddleocr-vl",
        model_class="PaddleOCRVLForConditionalGeneration",
        config=config(mrope("paddleocr_vl_text"), {**FLAT_TOWER, "model_type": "paddleocr_vl_vision"}, **MARKS),
        image=patches(4, frames=1, flat=False),
        types=MM_TYPES,
    ),
    Family(
        name="got-ocr2",
        model_class="GotOcr2ForConditionalGeneration",
        config=config(text("qwen2"), SAM_TOWER, image_seq_length=16),
        image=fixed(64, 16, marks=True),
        attn=("eager",),
    ),
    Family(
        name="pp-chart2table",
        model_class="GotOcr2ForConditionalGeneration",
        config_class="PPChart2TableConfig",
        config=config(text("qwen2"), {**SAM_TOWER, "model_type": "pp_chart2table_vision"}, image_seq_length=16),
        image=fixed(64, 16, marks=True),
        attn=("eager",),
    ),
    Family(
        name="qianfan-ocr",
        model_class="QianfanOCRForConditionalGeneration",
        config=config(
            text("qwen3"),
            {**INTERNVL_TOWER, "model_type": "qianfan_ocr_vision", "image_size": [42, 42], "patch_size": [7, 7]}
            | {"drop_path_rate": 0.0},  # in training it would draw, each time anew
            image_seq_length=9,
        ),
        image=tiles(42, 9, mark=False),
    ),
    Family(
        name="video-llama-3",
        model_class="VideoLlama3ForConditionalGeneration",
        config=config(text("qwen2"), {**FLAT_TOWER, "model_type": "video_llama_3_vision"}, **VIDEO_ID),
        image=patches(4, 1, frames=1, sizes=True),
        video=patch_video(4, stamps=True, depth=1, sizes=True),
        attn=NO_FLEX,
    ),
    Family(
        name="deepseek-vl-hybrid",
        model_class="DeepseekVLHybridForConditionalGeneration",
        config=config(
            text("llama"),
            SIGLIP,
            high_res_vision_config={**SAM_TOWER, "model_type": "sam_vision_model", "num_pos_feats": 16},
        ),
        image=two_sizes(28, 64, 16),
        attn=NO_FLEX,
    ),
    Family(
        name="janus",
        model_class="JanusForConditionalGeneration",
        config=config(
            text("llama"),
            tower("janus_vision_model", 28, 7, mlp_ratio=1.5, projection_dim=32, num_image_tokens=16),
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
        ),
        image=fixed(28, 16),
        attn=NO_FLEX,
        takes_processors=False,
    ),
    Family(
        name="exaone4.5",
        model_class="Exaone4_5_ForConditionalGeneration",
        config=config(text("exaone4", **WINDOWED_LAYERS), {**WINDOWED_TOWER, "num_key_value_heads": 2}, **VIDEO_ID),
        image=patches(4),
        video=patch_video(4, stamps=False),
        refuses=WINDOWS,
    ),
    Family(
        name="ernie4.5-vl",
        model_class="Ernie4_5_VLMoeForConditionalGeneration",
        config=config(
            mrope(
                "ernie4_5_vl_moe_text",
                moe_num_experts=4,
                moe_k=2,
                moe_num_shared_experts=1,
                moe_intermediate_size=[32, 24],
                mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
                rope={"mrope_section": [1, 1, 2]},
            ),
            PATCH_TOWER,
            **{"image_start_token_id": START, "image_end_token_id": END, **VIDEO_ID},
        ),
        image=patches(4, frames=1),
        video=patch_video(4, stamps=False, depth=1, halved=True),
        types=MM_TYPES._replace(also="moe_mm_token_type_ids"),
        attn=NO_FLEX,
        assisted=False,  # transformers 5.23 does not lengthen its second token types by what is proposed
    ),
    Family(
        name="granite4-vision",
        model_class="Granite4VisionForConditionalGeneration",
        config=config(
            text("granite4_vision_text", embedding_multiplier=2.0, attention_multiplier=0.4, logits_scaling=0.5),
            {**SIGLIP, "hidden_size": 64},
            **PINPOINTS,
            downsample_rate="1/2",
            deepstack_layer_map=[[-2, 2], [-1, 0]],
            spatial_target_layers=[1, 3],
            vision_feature_select_strategy="full",
            projector_dropout=0.0,  # in training it would draw, each time anew
            qformer_config={
                **{"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48},
                **{"cross_attention_frequency": 1, "use_qformer_text_input": False},
                **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            },
        ),
        image=any_resolution(28, base=4, grid=2),
        beams=ONE_IMAGE_EACH,
        stacked=True,
    ),
    Family(
        name="perception-lm",
        model_class="PerceptionLMForConditionalGeneration",
        config=config(
            text("llama"),
            {**TIMM_TOWER, "architecture": "vit", "model_args": {"patch_size": 7, "embed_dim": 24}},
            projector_pooling_ratio=2,
            **VIDEO_ID,
        ),
        image=stacked_tiles(42, 2, 9),
        video=frames(42, 2, [9, 9]),
    ),
    Family(
        name="fast-vlm",
        model_class="FastVlmForConditionalGeneration",
        config=config(text("qwen2"), TIMM_TOWER),
        image=fixed(28, 16),
    ),
    Family(
        name="gemma3n",
        model_class="Gemma3nForConditionalGeneration",
        config=config(
            text(
                "gemma3n_text",
                intermediate_size=[48, 48, 64, 64],
                sliding_window=40,
                layer_types=["sliding_attention", "full_attention"] * 2,
                num_kv_shared_layers=1,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=VOCABULARY,
                altup_num_inputs=3,
                laurel_rank=4,
                activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
            ),
            {
                "model_type": "gemma3n_vision",
                "hidden_size": 24,
                "vocab_size": 4,
                "vocab_offset": VOCABULARY,
                "model_args": {"patch_size": 7},
            },
            audio_config={
                "hidden_size": 32,
                "vocab_size": 4,
                "vocab_offset": VOCABULARY + 4,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
            },
            vision_soft_tokens_per_image=16,
            audio_token_id=UNK,
        ),
        image=fixed(28, 16, marks=True),
        refuses=WINDOWS,
    ),
    Family(
        name="aria",
        model_class="AriaForConditionalGeneration",
        config=config(
            text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            IDEFICS_TOWER,
            projector_patch_to_query_dict={36: 12},
        ),
        image=fixed(42, 12, marks=True),
        attn=NO_FLEX,
    ),
    Family(
        name="kimi-k2.5",
        model_class="Kimi_K25ForConditionalGeneration",
        config=config(
            text("deepseek_v3", **LATENT),
            {**FLAT_TOWER, "model_type": "kimi_k25_vision", "pos_emb_height": 8, "pos_emb_width": 8},
            projection_hidden_size=32,
            **MARKS,
        ),
        image=patches(4, frames=1, flat=False),
        attn=NO_FLEX,
    ),
    Family(
        name="hyperclovax-vision-v2",
        model_class="HyperCLOVAXVisionV2ForConditionalGeneration",
        config=config(text("hyperclovax"), {**QWEN25_TOWER, "model_type": "qwen2_5_vl_vision"}, **VIDEO_ID),
        image=patches(4),
        video=patch_video(4, stamps=False),
        attn=NO_FLEX,
    ),
    Family(
        name="cosmos3-edge",
        model_class="Cosmos3EdgeForConditionalGeneration",
        config=config(
            mrope("cosmos3_edge_text"),
            {**FLAT_TOWER, "model_type": "cosmos3_edge_vision", "num_patches": 16},
            projector_hidden_size=48,
            **MARKS,
        ),
        image=patches(4, frames=1),
        video=patch_video(4, stamps=True, depth=1),
        types=MM_TYPES,
        attn=NO_FLEX,
        places_later_images=False,
    ),
    Family(
        name="muse-glimmer",
        model_class="MuseGlimmerForConditionalGeneration",
        config=config(
            text("muse_glimmer_text", output_multiplier=1.0, **WINDOWED_LAYERS),
            {**FLAT_TOWER, "model_type": "muse_glimmer_vision", "pos_emb_height": 4, "pos_emb_width": 4},
            out_hidden_size=128,
            projector_hidden_size=48,
            **VIDEO_ID,
        ),
        image=patches(4),
        video=patch_video(4, stamps=True),
        refuses=WINDOWS,
    ),
    Family(
        name="minimax-m3-vl",
        model_class="MiniMaxM3SparseForConditionalGeneration",
        config=config(
            text(
                "minimax_m3_vl_text",
                num_local_experts=4,
                num_experts_per_tok=2,
                dense_intermediate_size=48,
                shared_intermediate_size=40,
                mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
                rotary_dim=4,
            ),
            {**FLAT_TOWER, "model_type": "minimax_m3_vl_vision"},
            projector_hidden_size=48,
            **VIDEO_ID,
        ),
        image=patches(4),
        video=patch_video(4, stamps=True),
        attn=NO_FLEX,
    ),
    Family(
        name="granite-docling",
        model_class="GraniteDoclingForConditionalGeneration",
        config=config(
            text("granite_docling_text", **GRANITE),
            tower(
                *("granite_docling_vision", 42, 7), out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0, 1]
            ),
            density_router_hidden_size=8,
        ),
        image=masked_tiles(42, 9),
        collate=per_row,
        in_space=True,
    ),
    Family(
        name="deepseek-ocr2",
        model_class="DeepseekOcr2ForConditionalGeneration",
        config=config(
            text(
                "deepseek_ocr2_text",
                n_routed_experts=4,
                moe_intermediate_size=32,
                num_experts_per_tok=2,
                n_shared_experts=1,
                mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            ),
            {
                "sam_config": {
                    **SAM_TOWER,
                    "model_type": "deepseek_ocr2_sam_vision_model",
                    "downsample_channels": [16, 32],
                },
                "encoder_config": text("deepseek_ocr2_encoder", intermediate_size=48, num_hidden_layers=2),
                "queries": 9,
            },
        ),
        image=views(64, 48, 9, 9, 1),
        attn=NO_FLEX,
    ),
    Family(
        name="hunyuan-vl",
        model_class="HunYuanVLForConditionalGeneration",
        config=config(
            text(
                "hunyuan_vl_text",
                # the last axis, which is an image's number, has no share: transformers 5.23 numbers the images of a
                # batch on from row to row, so that a row has other positions than alone
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1, 0]},
            ),
            {**FLAT_TOWER, "model_type": "hunyuan_vl_vision", "max_image_size": 32},
            im_start_id=START,
            im_end_id=END,
            im_newline_id=BREAK,
        ),
        image=patch_lines(4),
        types=MM_TYPES,
        places_later_images=False,
    ),
    Family(
        name="step3.7",
        model_class="Step3p7ForConditionalGeneration",
        config=config(
            text(
                "step3p5",
                **{**WINDOWED_LAYERS, "num_sliding_attention_heads": 8},
                **{"n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
                share_expert_dim=40,
                mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            ),
            tower("step3p5_vision", 64, 4, mlp_ratio=1.5),
        ),
        image=views(64, 48, 16, 9, 0),
        refuses=WINDOWS,
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in TABLE if family.available}
