"""Modules that define davae's public names.

None of them is imported here.
"""

from __future__ import annotations

HOMES = {
    "LatentLayout": "davae.latent",
    "DetailVAE": "davae.vae.detail_vae",
    "DetailErnieImagePipeline": "davae.backbones.pipelines",
    "DetailKrea2Pipeline": "davae.backbones.pipelines",
    "DetailLongCatImagePipeline": "davae.backbones.pipelines",
    "DetailQwenImage21Pipeline": "davae.backbones.pipelines",
    "DetailZImagePipeline": "davae.backbones.pipelines",
    "LightningDiT": "davae.backbones.lightning_dit",
    "PooledAutoencoderTiny": "davae.vae.pooled_tiny",
    "ClassConditionalPipeline": "davae.sample.class_conditional",
    "DetailAuraFlowPipeline": "davae.backbones.pipelines",
    "DetailLuminaPipeline": "davae.backbones.pipelines",
    "DetailLumina2Pipeline": "davae.backbones.pipelines",
    "DetailHunyuanDiTPipeline": "davae.backbones.pipelines",
    "DetailPixArtAlphaPipeline": "davae.backbones.pipelines",
    "DetailPixArtSigmaPipeline": "davae.backbones.pipelines",
    "expand_transformer": "davae.backbones.expand",
    "widen_lora": "davae.backbones.lora",
    "upgrade": "davae.runs.upgrade_run",
    "load": "davae.runs.upgrade_run",
    "UpgradeRun": "davae.runs.upgrade_run",
    "Progress": "davae.train.loop",
    "group_mean": "davae.losses.alignment",
    "alignment_loss": "davae.losses.alignment",
    "detail_weight": "davae.losses.velocity",
    "velocity_loss": "davae.losses.velocity",
    "preview": "davae.sample.preview",
    "upscale": "davae.sample.upscale",
}
