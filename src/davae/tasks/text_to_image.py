"""Small Stable Diffusion 3: text encoders and transformer, trained by flow matching."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from davae.backbones.null_tokens import draw_count, repeat_last_token
from davae.data.latent_cache.read import CachedLatents, collate_latents
from davae.latent import LatentStatistics
from davae.pretrained.placement import send
from davae.recipes.base import TextArchitecture
from davae.recipes.sections import FlowOptim
from davae.tasks.noising import drop_conditions, flow_matching, noise_batch
from davae.train.random import SampleRandom
from davae.train.task import Task, Trainable


def build_tokenizer(captions: Iterable[str], vocabulary: int, tokens: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair merges are learnt from captions.

    Args:
        captions: of the training set.
        vocabulary: size of the vocabulary.
        tokens: longest prompt.
    """
    tokenizer = CLIPTokenizer()
    # as in CLIP, every byte also with the end-of-word mark; left to the trainer, their order differs in every process
    ends = [f"{byte}</w>" for byte in sorted(pre_tokenizers.ByteLevel.alphabet())]
    specials = [tokenizer.bos_token, tokenizer.eos_token, *ends]
    backend = tokenizer.backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    learnt: Any = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=tokens)


def build_text_encoder(architecture: TextArchitecture, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    a = architecture
    special: Any = tokenizer  # the ids are single numbers, typed more widely
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=a.text_width,
            intermediate_size=4 * a.text_width,
            projection_dim=a.text_width,
            num_hidden_layers=a.text_layers,
            num_attention_heads=max(1, a.text_width // 32),
            max_position_embeddings=a.text_tokens,
            bos_token_id=special.bos_token_id,
            eos_token_id=special.eos_token_id,
            pad_token_id=special.pad_token_id,
        )
    )


def build_silent_t5(architecture: TextArchitecture) -> T5EncoderModel:
    """Return a T5 of a few thousand parameters whose output is zero for every prompt.

    The pipeline uses zero embeddings where it has no T5, but then loads its folder only with an argument that names the
    missing part. This one makes the argument unnecessary.
    """
    config = T5Config(vocab_size=4, d_model=2 * architecture.text_width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder.eval()


def build_silent_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that only pads, whatever the prompt, for the silent T5."""
    backend = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_transformer(a: TextArchitecture, channels: int, latent_side: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=latent_side,
        patch_size=a.patch_size,
        in_channels=channels,
        out_channels=channels,
        num_layers=a.layers,
        attention_head_dim=a.head_width,
        num_attention_heads=a.heads,
        joint_attention_dim=2 * a.text_width,
        caption_projection_dim=a.heads * a.head_width,
        pooled_projection_dim=2 * a.text_width,
        pos_embed_max_size=a.max_grid,
        qk_norm="rms_norm",
    )


class TextToImage(nn.Module):
    """Text encoders and transformer, connected as in StableDiffusion3Pipeline with a silent T5."""

    def __init__(self, encoders: list[CLIPTextModelWithProjection], transformer: SD3Transformer2DModel):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.transformer = transformer

    def forward(self, latents: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """Return the velocity (B,C,h,w) at latents (B,C,h,w), time (B,) in 0..1000, tokens (B,L)."""
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        embeds = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)  # (B,L,2w)
        pooled = torch.cat([out.text_embeds for out in outputs], dim=-1)  # (B,2w)
        empty = embeds.new_zeros(embeds.shape[0], 1, embeds.shape[2])  # the silent T5's tokens
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=torch.cat([embeds, empty], dim=1),
            pooled_projections=pooled,
            timestep=timestep,
            return_dict=False,
        )[0]


class BaseFlowTask(Task[FlowOptim]):
    """Flow matching on cached base latents, text encoders included."""

    name = "dit"

    def __init__(
        self,
        settings: FlowOptim,
        model: TextToImage,
        tokenizer: CLIPTokenizer,
        cache: CachedLatents,
        statistics: LatentStatistics,
        device: torch.device,
    ):
        self.settings, self.dataset, self.collate, self.device = settings, cache, collate_latents, device
        self.objective = flow_matching(settings)
        self.tokenizer = tokenizer
        self.statistics = statistics.to(device, torch.float32)
        self.processor = repeat_last_token(model.transformer)
        decay = [p for p in model.parameters() if p.ndim >= 2]
        plain = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
        self.trainables = {"dit": Trainable(model, groups, lr=settings.lr)}
        self.modules: dict[str, nn.Module] = {"dit": model}

    def loss(self, name: str, batch: Any, step: int, draws: SampleRandom) -> tuple[Tensor, dict[str, Any]]:
        s = self.settings
        z = self.statistics.normalise(send(batch["latents"], self.device))  # (B,C,h,w)
        prompts = drop_conditions(batch["conditions"], "", s.caption_dropout, draws)
        noised = noise_batch(self.objective, z, draws)
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        self.processor.count = draw_count(draws.batch)
        velocity = self.modules["dit"](noised.x_t, noised.t * 1000, tokens)
        loss = (velocity - noised.target).square().mean()
        return loss, {"loss": loss.detach()}
