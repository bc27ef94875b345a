"""Transformers that `expand_transformer` widens but that davae cannot call or train yet."""

from __future__ import annotations

from davae.backbones.family import ATTENTION, CP, FLUX_LAYERS, GATED, MLP, OUT, PC, Family

EXPAND_ONLY = (
    Family(
        "HunyuanImageTransformer2DModel",
        pipeline="HunyuanImagePipeline",
        embedder="x_embedder.proj",
        head="proj_out",
        head_order=CP,
        lora_targets=FLUX_LAYERS,
    ),
    Family(
        "Kandinsky5Transformer3DModel",
        pipeline="Kandinsky5T2IPipeline",
        embedder="visual_embeddings.in_layer",
        head="out_layer.out_layer",
        head_order=CP,
        lora_targets=("to_(query|key|value)", "feed_forward.(in|out)_layer", "(self|cross)_attention.out_layer"),
        embedder_order=PC,
        in_key="in_visual_dim",
        out_key="out_visual_dim",
        attributes=("in_visual_dim",),
    ),
    Family(
        "GlmImageTransformer2DModel",
        pipeline="GlmImagePipeline",
        embedder="image_projector.proj",
        head="proj_out",
        head_order=CP,
        lora_targets=(*ATTENTION, *MLP),
    ),
    Family(
        "BriaFiboTransformer2DModel",
        pipeline="BriaFiboPipeline",
        embedder="x_embedder",
        head="proj_out",
        head_order=CP,
        lora_targets=FLUX_LAYERS,
        attributes=OUT,
    ),
    Family(
        "BriaFibo2Transformer2DModel",
        pipeline="BriaFibo2Pipeline",
        embedder="x_embedder",
        head="final_layer.linear",
        head_order=CP,
        lora_targets=(*ATTENTION, *GATED),
    ),
)
