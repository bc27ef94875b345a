"""What multiplies with the token saving: helpers that change nothing where they must not, and go away again."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel

from davae.bench.block_cache import first_block_cached
from davae.bench.sampling import HELPERS
from davae.models.pipeline import ModelError


def transformer(layers: int = 3) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def test_the_first_block_cache_skips_what_barely_moves() -> None:
    model = transformer()
    computed: list[int] = []
    for number, block in enumerate(model.transformer_blocks):
        block.attn.register_forward_hook(lambda *_, number=number: computed.append(number))
    x, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 8)

    def run(x: torch.Tensor, t: float) -> torch.Tensor:
        computed.clear()
        with torch.no_grad():
            return model(x, text, pooled, timestep=torch.tensor([t]), return_dict=False)[0]

    whole, near = run(x, 900.0), run(x * 1.001, 899.0)
    with first_block_cached(model, 0.1):
        torch.testing.assert_close(run(x, 900.0), whole, rtol=0, atol=0)
        assert computed == [0, 1, 2]
        skipped = run(x * 1.001, 899.0)
        assert computed == [0]
        torch.testing.assert_close(skipped, near, rtol=0, atol=0.05)
        assert not torch.equal(skipped, near)
        run(torch.randn_like(x), 800.0)
        assert computed == [0, 1, 2], "another input is computed"
        torch.testing.assert_close(run(x, 900.0), whole, rtol=0, atol=0)
        assert computed == [0, 1, 2], "a new picture begins with nothing"
    torch.testing.assert_close(run(x, 900.0), whole, rtol=0, atol=0)
    assert computed == [0, 1, 2]


def test_other_transformers_are_told() -> None:
    with (
        pytest.raises(ModelError, match="SD3Transformer2DModel with 1 blocks"),
        first_block_cached(transformer(1), 0.1),
    ):
        pass


def test_compiled_blocks_are_compiled_and_plain_again() -> None:
    model = transformer()
    with HELPERS["compiled"](model):
        assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    assert all(module._compiled_call_impl is None for module in model.modules())
