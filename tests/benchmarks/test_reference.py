from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import conv_mflop_per_voxel_step
from benchmarks.peers import monai_step, monai_vqvae, why_no_monai
from benchmarks.reference import (
    ReferenceCodebook,
    ReferenceVQGAN,
    ReplicateConv,
    ReplicateUp,
    fused_adam,
    reference_step,
    replicate_pad,
)

PREDECESSOR_MFLOP_PER_VOXEL = 20.6
PREDECESSOR_PARAMETERS = 22.2e6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small volumes on a busy machine: threads that wait for each other cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def full_model() -> ReferenceVQGAN:
    torch.manual_seed(0)
    return ReferenceVQGAN()


@pytest.fixture
def small_model() -> ReferenceVQGAN:
    torch.manual_seed(0)
    return ReferenceVQGAN(width=32, codes=16, code_dim=8)


@pytest.fixture
def batch() -> Tensor:
    return torch.rand(1, 1, 8, 12, 16, generator=torch.Generator().manual_seed(1))


def test_work_per_voxel_is_the_predecessors(full_model: ReferenceVQGAN) -> None:
    with torch.autocast("cpu", torch.bfloat16):  # counts the same, sooner
        counted = conv_mflop_per_voxel_step(full_model, 32)
    assert counted == pytest.approx(PREDECESSOR_MFLOP_PER_VOXEL, rel=0.05)


def test_parameters_are_the_predecessors(full_model: ReferenceVQGAN) -> None:
    count = sum(parameter.numel() for parameter in full_model.parameters())
    assert count == pytest.approx(PREDECESSOR_PARAMETERS, rel=0.01)
    assert full_model.codebook.embedding.shape == (512, 64)


def test_reconstruction_has_the_inputs_shape_and_the_latent_a_quarter(
    full_model: ReferenceVQGAN, batch: Tensor
) -> None:
    with torch.no_grad():
        reconstruction, vq_loss = full_model.eval()(batch)
        assert full_model.encoder(batch).shape == (1, 64, 2, 3, 4)
    assert reconstruction.shape == batch.shape
    assert vq_loss.shape == ()


def test_gradient_reaches_every_parameter(small_model: ReferenceVQGAN, batch: Tensor) -> None:
    reconstruction, vq_loss = small_model(batch)
    (F.l1_loss(reconstruction, batch) + vq_loss).backward()
    dead = [name for name, p in small_model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_lower_the_loss_and_move_the_codes(
    small_model: ReferenceVQGAN, batch: Tensor, dtype: torch.dtype
) -> None:
    optimizer = fused_adam(small_model)
    codes = small_model.codebook.embedding.clone()
    losses = [reference_step(small_model, optimizer, batch, dtype).item() for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(codes, small_model.codebook.embedding)


def test_padding_and_convolutions_keep_bfloat16_under_autocast() -> None:
    x = torch.rand(1, 4, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert replicate_pad(x, 1).dtype == torch.bfloat16
        assert ReplicateConv(4, 4, 3)(x).dtype == torch.bfloat16
    assert replicate_pad(x, 1).dtype == torch.float32


def test_convolution_is_torchs_own_replicate_padding() -> None:
    ours, theirs = ReplicateConv(2, 3, 3), torch.nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 2, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_up_sampling_keeps_a_constant_constant_up_to_the_border() -> None:
    up = ReplicateUp(1, 1)
    with torch.no_grad():
        up.weight.fill_(1 / 8)  # 2³ taps meet in each output voxel
        up.bias.zero_()  # type: ignore[union-attr]
    torch.testing.assert_close(up(torch.full((1, 1, 2, 3, 4), 5.0)), torch.full((1, 1, 4, 6, 8), 5.0))


def test_chunked_lookup_is_the_exact_nearest_code() -> None:
    torch.manual_seed(2)
    codebook = ReferenceCodebook(codes=64, dim=8, chunk=7)
    vectors = torch.randn(50, 8)
    exact = torch.cdist(vectors.double(), codebook.embedding.double()).argmin(1)
    assert torch.equal(codebook.nearest(vectors), exact)


def test_codebook_is_straight_through_and_fixed_in_evaluation() -> None:
    torch.manual_seed(3)
    codebook = ReferenceCodebook(codes=8, dim=4).eval()
    codes = codebook.embedding.clone()
    z = torch.randn(2, 4, 3, 3, 3, requires_grad=True)
    quantised, loss = codebook(z)
    vectors, replaced = (volume.detach().movedim(1, -1).reshape(-1, 4) for volume in (z, quantised))
    torch.testing.assert_close(replaced, codes[codebook.nearest(vectors)])
    (gradient,) = torch.autograd.grad(quantised.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    assert loss.item() == pytest.approx(0.25 * F.mse_loss(z, quantised).item(), rel=1e-4)
    assert torch.equal(codes, codebook.embedding)


def test_moving_averages_settle_on_the_mean_of_their_vectors() -> None:
    codebook = ReferenceCodebook(codes=2, dim=2, decay=0.5)
    codebook.embedding.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
    for _ in range(40):
        codebook.update(vectors, codebook.nearest(vectors))
    torch.testing.assert_close(codebook.embedding, torch.tensor([[2.0, 0.0], [9.0, 9.0]]), atol=1e-3, rtol=0)


def test_codes_start_at_the_data_and_dead_ones_come_back() -> None:
    torch.manual_seed(4)
    codebook = ReferenceCodebook(codes=16, dim=4, decay=0.5)
    far = torch.randn(1, 4, 8, 8, 8) / 10 + 7  # nearest to one and the same of codes around 0
    _, loss = codebook(far)
    assert loss.item() < 0.25 * 0.01
    assert len(codebook.nearest(far.movedim(1, -1).reshape(-1, 4)).unique()) > 8
    for _ in range(12):
        codebook(-far)
    vectors = -far.movedim(1, -1).reshape(-1, 4)
    assert (torch.cdist(codebook.embedding, vectors).amin(1) < 0.2).all()
    assert len(codebook.nearest(vectors).unique()) > 8


def test_missing_monai_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    peers._monai_networks.cache_clear()
    try:
        assert peers.monai_vqvae() is None
        assert "monai" in str(peers.why_no_monai())
    finally:
        peers._monai_networks.cache_clear()


@pytest.mark.slow
def test_monai_has_the_size_and_the_work_it_is_said_to_have() -> None:
    if reason := why_no_monai():
        pytest.skip(reason)
    model = monai_vqvae()
    assert model is not None
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.8e6, rel=0.01)
    assert conv_mflop_per_voxel_step(model, 16) == pytest.approx(4.5, rel=0.02)
    optimizer = fused_adam(model)
    for dtype in (torch.float32, torch.bfloat16):
        assert monai_step(model, optimizer, torch.rand(1, 1, 16, 16, 16), dtype).isfinite()
