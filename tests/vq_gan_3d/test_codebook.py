"""Quantizers against brute force, against their published equations, and on a problem that they must learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import peak_rss_of
from errors import ConfigurationError
from vq_gan_3d.codebook import EMACodebook, SimVQ, build_quantizer, even_codes, pick_vectors
from vq_gan_3d.fsq import FSQ
from vq_gan_3d.quantizer import flatten_channels, nearest_codes, unflatten_channels


def as_grid(vectors):
    """(N, C) -> (1, C, N, 1, 1)."""
    return vectors.T[None, :, :, None, None].clone()


def unsquash(values):
    """Inverse of the quantizers' bound."""
    return torch.atanh(values) / 0.8


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("channels", [1, 4, 8])
def test_nearest_codes_equals_brute_force(n, channels):
    torch.manual_seed(n)
    vectors, codebook = torch.randn(n, channels), torch.randn(37, channels)
    distances = (vectors.double()[:, None] - codebook.double()).square().sum(2)
    found = nearest_codes(vectors, codebook, chunk=64)
    best = distances.min(1).values
    torch.testing.assert_close(distances.gather(1, found[:, None])[:, 0], best, rtol=1e-5, atol=1e-6)
    assert (found == distances.argmin(1)).float().mean() > 0.99


def test_ties_go_to_the_lowest_index_and_codes_find_themselves():
    codebook = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest_codes(torch.zeros(3, 2), codebook).tolist() == [0, 0, 0]
    codes = even_codes(512, 8)
    assert torch.equal(nearest_codes(codes, codes, chunk=100), torch.arange(512))
    assert torch.equal(even_codes(512, 8), codes)  # always the same


def million_lookups():
    vectors, codebook = torch.randn(1_048_576, 8), torch.randn(512, 8)
    nearest_codes(vectors[:10_000], codebook)  # libraries take what they need
    return lambda: nearest_codes(vectors, codebook)


@pytest.mark.slow
def test_a_million_vectors_need_no_distance_matrix():
    assert peak_rss_of(million_lookups) < 100 * 2**20  # the whole matrix would be 2 GiB


def test_flatten_round_trip():
    z = torch.randn(2, 3, 4, 5, 6)
    vectors = flatten_channels(z)
    assert torch.equal(vectors[1 * 120 + 2 * 30 + 3 * 6 + 4], z[1, :, 2, 3, 4])
    assert torch.equal(unflatten_channels(vectors, z), z)


def test_ema_update_is_the_equation():
    book = EMACodebook(2, 1, commitment_weight=0.25, decay=0.5, restart_below=0.0)
    book.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    book.sums.copy_(book.codebook)
    book.counts.fill_(1.0)
    vectors = torch.tensor([-0.5, -0.25, 0.125, 0.5, 0.75])  # after squashing
    out = book(as_grid(unsquash(vectors)[:, None]))
    assert out.indices.flatten().tolist() == [0, 0, 1, 1, 1]
    assert out.codes.flatten().tolist() == [-1, -1, 1, 1, 1]  # looked up before the move
    squares = 0.5**2 + 0.75**2 + 0.875**2 + 0.5**2 + 0.25**2
    assert float(out.loss) == pytest.approx(0.25 * squares / 5)
    # N <- N/2 + n/2, m <- m/2 + sum/2, e = m/N (van den Oord et al., equations 6-8)
    assert book.counts.tolist() == [0.5 * 1 + 0.5 * 2, 0.5 * 1 + 0.5 * 3]
    assert book.sums.flatten().tolist() == pytest.approx([-0.5 - 0.375, 0.5 + 0.6875])
    assert book.codebook.flatten().tolist() == pytest.approx([-0.875 / 1.5, 1.1875 / 2.0])


def test_ema_does_not_move_in_use():
    book = EMACodebook(8, 2).eval()
    before = {key: value.clone() for key, value in book.state_dict().items()}
    book(torch.randn(1, 2, 4, 4, 4))
    for key, value in book.state_dict().items():
        assert torch.equal(value, before[key])


def test_ema_state_holds_the_whole_memory():
    book = EMACodebook(8, 2)
    book(torch.randn(1, 2, 4, 4, 4))
    assert set(book.state_dict()) == {"codebook", "counts", "sums"}
    assert list(book.parameters()) == []
    other = EMACodebook(8, 2)
    other.load_state_dict(book.state_dict())
    z = torch.randn(1, 2, 4, 4, 4)
    torch.manual_seed(0)
    a = book(z)
    torch.manual_seed(0)
    b = other(z)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(book.codebook, other.codebook)


def test_dead_codes_restart_on_vectors_of_the_batch():
    torch.manual_seed(0)
    book = EMACodebook(6, 2, decay=0.0, restart_below=0.1)
    book.codebook.copy_(torch.tensor([[0.0, 0.0], [9, 9], [9, -9], [-9, 9], [-9, -9], [9, 0]]))
    vectors = torch.rand(50, 2) - 0.5  # all next to code 0
    book(as_grid(unsquash(vectors)))
    torch.testing.assert_close(book.codebook[0], vectors.mean(0))
    distance = torch.cdist(book.codebook[1:], vectors).min(1).values
    assert distance.max() < 1e-5
    assert len(book.codebook.unique(dim=0)) > 3
    assert len(book(as_grid(unsquash(vectors))).indices.unique()) > 3


def test_restarts_go_where_the_error_is():
    torch.manual_seed(0)
    vectors = torch.arange(4.0)[:, None]
    picks = pick_vectors(vectors, torch.tensor([1.0, 0.0, 3.0, 0.0]), 4000)[:, 0]
    assert set(picks.tolist()) == {0.0, 2.0}
    assert 0.72 < float((picks == 2).double().mean()) < 0.78
    # every error 0: any vector will do, but a vector of the batch it is
    assert set(pick_vectors(vectors + 1, torch.zeros(4), 100)[:, 0].tolist()) == {1.0, 2.0, 3.0, 4.0}


def test_ema_reaches_all_of_a_batch_that_is_mostly_air():
    """Nine of ten vectors are one point, as air outside the body is: restarts drawn evenly would pile up there."""
    torch.manual_seed(0)
    book = EMACodebook(64, 4, decay=0.9)
    for _ in range(150):
        vectors = torch.cat([torch.full((3600, 4), -0.3), torch.randn(400, 4) + 1])
        indices = book(as_grid(vectors)).indices
    assert len(indices.unique()) >= 60


def test_a_restarted_code_is_light():
    book = EMACodebook(4, 1, decay=0.5, restart_below=0.1)
    book.codebook.copy_(torch.tensor([[0.0], [50.0], [60.0], [70.0]]))
    book.counts.copy_(torch.tensor([8.0, 0.01, 0.01, 0.01]))
    book(as_grid(torch.randn(8, 1)))
    mean = (8.0 + 3 * 0.005) / 4
    torch.testing.assert_close(book.counts[1:], torch.full((3,), 2 * 0.1 * mean))
    assert float(book.codebook.abs().max()) < 10


@pytest.mark.parametrize("name", ["ema", "simvq", "fsq"])
def test_many_vectors_under_autocast_stay_finite(name):
    torch.manual_seed(0)
    quantizer = build_quantizer(name, 512, 4, (8, 4, 4, 4), 0.25, 0.99, 0.03, 0.02)
    z = torch.randn(1, 4, 32, 64, 64, requires_grad=True)  # 131 072 vectors
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z.bfloat16())
    assert out.codes.dtype == torch.float32
    assert out.codes.isfinite().all()
    (out.codes.square().mean() + out.loss).backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() > 0
    for value in quantizer.state_dict().values():
        assert value.isfinite().all()
    assert len(out.indices.unique()) > 350  # on whitened input, from the first step on


def test_straight_through_stops_at_the_lookup_not_at_the_bound():
    for quantizer in (EMACodebook(16, 2, 0.0), SimVQ(16, 2, 0.0)):
        z = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
        weight = torch.randn_like(z)
        (quantizer(z).codes * weight).sum().backward()
        torch.testing.assert_close(z.grad, weight * 0.8 * (1 - torch.tanh(0.8 * z.detach()).square()))


def test_simvq_trains_its_map_alone():
    quantizer = SimVQ(32, 3)
    assert {name for name, _ in quantizer.named_parameters()} == {"map.weight", "map.bias"}
    frozen, everything = quantizer.frozen_codes.clone(), torch.arange(32)
    assert torch.equal(quantizer.lookup(everything), frozen)  # starts as the identity
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    out = quantizer(torch.randn(1, 3, 4, 4, 4) + 1)
    out.loss.backward()
    optimizer.step()
    assert torch.equal(quantizer.frozen_codes, frozen)
    assert (quantizer.lookup(everything) != frozen).all(1).all()  # all codes move together, used or not


def test_codes_are_what_lookup_gives():
    for quantizer in (EMACodebook(16, 4).eval(), SimVQ(16, 4), FSQ((8, 4, 4, 4))):
        out = quantizer(torch.randn(2, 4, 3, 4, 5))
        torch.testing.assert_close(quantizer.lookup(out.indices).permute(0, 4, 1, 2, 3), out.codes, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "n_codes", "levels"), [("fsq", 500, (8, 4, 4, 4)), ("vq", 512, (8, 4, 4, 4))])
def test_refusals(name, n_codes, levels):
    with pytest.raises(ConfigurationError) as caught:
        build_quantizer(name, n_codes, 4, levels, 0.25, 0.99, 0.03, 0.02)
    assert "model." in str(caught.value)
    with pytest.raises(ConfigurationError):
        FSQ((4, 1))


@pytest.mark.parametrize("name", ["ema", "simvq", "fsq"])
def test_each_quantizer_learns_a_small_problem(name):
    """An autoencoder of points on a curve: one linear layer to the code, two back."""
    from vq_gan_3d.code_norm import CodeNorm

    torch.manual_seed(0)
    angle = torch.rand(512) * 6.283
    points = torch.stack([angle.cos(), angle.sin(), (2 * angle).sin()], 1)
    quantizer = build_quantizer(name, 64, 2, (8, 8), 0.02, 0.9, 0.03, 0.02)
    encoder, norm = torch.nn.Linear(3, 2), CodeNorm(2)
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    modules = torch.nn.ModuleList([encoder, norm, quantizer, decoder])
    optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
    losses = []
    for _ in range(120):
        out = quantizer(norm(as_grid(encoder(points))))
        error = F.mse_loss(decoder(flatten_channels(out.codes)), points)
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        losses.append(float(error.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert len(out.indices.unique()) > 10
