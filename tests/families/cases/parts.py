"""Text encoders and tokenizers of a few thousand parameters, shared by the builders."""

from __future__ import annotations

from typing import Any

import torch
from conftest import tiny_recipe
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

from davae.tasks.text_to_image import build_text_encoder, build_tokenizer

PROMPTS = ["a red square", "a blue square"]
# contents are strings, or lists of typed parts
CHAT = (
    "{% for message in messages %}{{ message.role }} : {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }} {% endfor %}{% endif %} {% endfor %}"
)


def clip_tokenizer(tokens: int = 8) -> Any:
    return build_tokenizer(PROMPTS, 600, tokens)


def clip_encoder() -> Any:
    """A CLIPTextModel without projection."""
    return CLIPTextModel(build_text_encoder(tiny_recipe().architecture, clip_tokenizer()).config)


def word_tokenizer(padding_side: str = "right", model_max_length: int = 512) -> Any:
    """A tokenizer of whole words: the prompts' and some others, all else unknown."""
    words = ["<pad>", "</s>", "<unk>", "<bos>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<bos>",
        padding_side=padding_side,
        model_max_length=model_max_length,
    )


def chat_tokenizer() -> Any:
    """One token a word, the same for all words that the tests do not use; with a chat template."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "square", "of", "another", "length", "user", "system"]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def t5_tokenizer() -> Any:
    """The same words, ended as T5 ends them."""
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def t5_encoder() -> Any:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)).eval()


TEXT = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def lively(model: Any) -> Any:
    """Weights so large that prompts differ in every layer."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def qwen3(kind: Any, layers: int) -> Any:
    """A Qwen 3 language model of width 8."""
    return lively(kind(Qwen3Config(**TEXT, num_hidden_layers=layers)))


def mistral3(layers: int) -> Any:
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"model_type": "mistral", **TEXT, "num_hidden_layers": layers}
    return lively(Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)))


def qwen2_vl() -> Any:
    text = {
        **TEXT,
        "num_hidden_layers": 1,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8}
    return lively(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)))


def qwen3_vl(layers: int = 1) -> Any:
    text = {
        **TEXT,
        "num_hidden_layers": layers,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": 8,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [],
    }
    return lively(Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)))


def shifting() -> FlowMatchEulerDiscreteScheduler:
    """Timesteps shifted by the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def packed_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 3.0)
    return vae.eval()


VIDEO: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}


def vision_processor() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]}
    )
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )
