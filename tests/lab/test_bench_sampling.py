"""What multiplies with the token saving: helpers that change nothing where they must not, and go away again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from davae.errors import ModelError
from davae.lab.bench.block_cache import first_block_cached
from davae.lab.bench.clock import Spread
from davae.lab.bench.helpers import check_helpers, helped, multiplies


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_stores_a_quarter_and_comes_back_exactly(dtype: torch.dtype) -> None:
    model = transformer().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, text, pooled = (torch.randn(*size).to(dtype) for size in ((1, 4, 8, 8), (1, 5, 16), (1, 8)))

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(x, text, pooled, timestep=torch.tensor([900.0]).to(dtype), return_dict=False)[0].float()

    exact = run()
    with helped(model, "fp8"):
        stored = [p.dtype for p in model.transformer_blocks.parameters() if p.ndim == 2]
        assert set(stored) == {torch.float8_e4m3fn}
        assert model.proj_out.weight.dtype == dtype, "the head stays"
        rounded = run()
        assert {p.dtype for p in model.transformer_blocks.parameters() if p.ndim == 2} == {torch.float8_e4m3fn}
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.1
    assert torch.equal(run(), exact)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


def test_compiled_blocks_are_compiled_and_plain_again() -> None:
    model = transformer()
    with helped(model, "compiled"):
        assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_faster_cache_takes_every_second_late_pass_s_attention_from_earlier_ones() -> None:
    model = transformer()
    computed: list[int] = []
    for number, block in enumerate(model.transformer_blocks):
        block.attn.to_q.register_forward_hook(lambda *_, number=number: computed.append(number))
    x, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 8)

    def run(t: float) -> torch.Tensor:
        computed.clear()
        with torch.no_grad():
            return model(
                hidden_states=x,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=torch.tensor([t]),
                return_dict=False,
            )[0]

    times = (900.0, 700.0, 600.0, 500.0, 400.0)
    whole = [run(t) for t in times]
    with helped(model, "faster-cache"):
        for _ in range(2):  # two pictures alike: the second one starts with nothing
            found, blocks = [], []
            for t in times:
                found.append(run(t))
                blocks.append(len(computed))
            assert blocks == [3, 3, 3, 0, 3]
            for late in (0, 1, 2):
                torch.testing.assert_close(found[late], whole[late], rtol=0, atol=0)
            torch.testing.assert_close(found[3], whole[3], rtol=0, atol=0.05)
            assert not torch.equal(found[3], whole[3])
    torch.testing.assert_close(run(500.0), whole[3], rtol=0, atol=0)
    assert computed == [0, 1, 2]


def test_faster_cache_says_where_it_reaches_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="Sequential has no attention"), helped(model, "faster-cache"):
        pass


@pytest.mark.slow
def test_a_pass_compiled_whole_is_the_same_and_goes_away_again() -> None:
    """A minute of compiling."""
    model = transformer()
    x, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 8)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x, text, pooled, timestep=torch.tensor([500.0]), return_dict=False)[0]

    whole = run()
    with helped(model, "cuda-graphs"):
        torch.testing.assert_close(run(), whole)
    assert model._compiled_call_impl is None
    assert torch.equal(run(), whole)


@pytest.mark.slow
def test_int8_blocks_are_near_and_go_away_again() -> None:
    """`make slow` installs torchao, whose import is noisy beside this PyTorch."""
    model = transformer()
    x, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 8)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x, text, pooled, timestep=torch.tensor([500.0]), return_dict=False)[0]

    weights = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    whole = run()
    with helped(model, "int8"):
        assert type(model.transformer_blocks[0].attn.to_q.weight.data) is not torch.Tensor
        assert type(model.proj_out.weight.data) is torch.Tensor
        error = (run() - whole).norm() / whole.norm()
        assert 0 < error < 0.05
    for name, weight in model.named_parameters():
        assert id(weight) == weights[name][0]
        assert torch.equal(weight, weights[name][1])
    torch.testing.assert_close(run(), whole, rtol=0, atol=0)


def test_helpers_that_cannot_be_measured_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_helpers(["compiled", "first-block-cache+compiled"])
    with pytest.raises(ModelError, match="helper 'turbo' is unknown"):
        check_helpers(["compiled+turbo"])
    with pytest.raises(ModelError, match="'faster-cache' reuses earlier passes"):
        check_helpers(["faster-cache"], passes=1)
    monkeypatch.setattr("davae.lab.bench.helpers.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs torchao: pip install 'davae\[int8\]'"):
        check_helpers(["int8+compiled"])


def test_a_helper_multiplies_where_it_gains_as_much_on_both() -> None:
    alone = {"native": Spread.of([8.0]), "upgraded": Spread.of([2.0])}
    assert multiplies(alone, {"native": Spread.of([4.0]), "upgraded": Spread.of([1.0])}) == 1.0
    assert multiplies(alone, {"native": Spread.of([4.0]), "upgraded": Spread.of([2.0])}) == 0.5


def test_throughput_counts_images_of_whole_batches(tiny_base: Path):
    from davae.lab.bench.throughput import bench_throughput
    from davae.pretrained.open import load_pipeline

    pipeline = load_pipeline(str(tiny_base), torch.bfloat16)
    found = bench_throughput(pipeline, "a red square", resolution=16, batch=3, steps=1, guidance=2.0, repeats=2)
    assert found["images_per_second"] == pytest.approx(3 / found["batch_seconds"]["median"])
    assert (found["batch"], found["dtype"], found["batch_seconds"]["repeats"]) == (3, "bfloat16", 2)
    assert found["tokens"] == 16
