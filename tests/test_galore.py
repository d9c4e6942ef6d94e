"""The GaLore optimizer against galore-torch, torch's AdamW and bitsandbytes'."""

import copy
import gc
import io
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo_lab.optimizer import galore
from orpo_lab.optimizer.galore import GaLore

SHAPES = {"tall": (48, 32), "wide": (32, 80), "square": (40, 40)}
BETAS = (0.8, 0.95)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(*s).to(dtype)) for name, s in SHAPES.items()}


def set_gradients(parameters: Any, seed: int, *, separated: bool = False) -> None:
    """Give every weight a gradient; with a separated spectrum its singular vectors are distinct."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if separated:
            u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
            gradient = u @ torch.diag(0.8 ** torch.arange(len(s), dtype=s.dtype)) @ vh
        p.grad = gradient.to(p.dtype)


def relative(tensor: Tensor, other: Tensor) -> float:
    tensor, other = tensor.detach(), other.detach()
    return float((tensor - other).abs().max() / other.abs().max())


def reference(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(
        [{"params": list(parameters), **settings}],
        lr=1e-2,
        betas=BETAS,
        eps=1e-30,  # galore-torch adds it before the bias correction, we after; too small to tell
        no_deprecation_warning=True,
    )


PROJECTED: Any = {"rank": 8, "update_proj_gap": 10, "scale": 0.5}


@pytest.mark.parametrize("proj_type", galore.PROJ_TYPES)
def test_thirty_updates_with_three_refreshes_are_galore_torchs(proj_type: str) -> None:
    ours = weights()
    theirs = copy.deepcopy(ours)
    settings = {**PROJECTED, "proj_type": proj_type}
    optimizer = GaLore(
        ours.values(),
        lr=1e-2,
        betas=BETAS,
        eps=1e-30,
        refresh="exact",
        stagger_refresh=False,
        **settings,
    )
    other = reference(theirs.values(), **settings)
    for step in range(30):
        for parameters in (ours, theirs):
            set_gradients(parameters.values(), step, separated=True)
            for p in parameters.values():
                p.data.zero_()  # so that what is compared is the update, in full precision
        optimizer.step()
        other.step()
        for name in SHAPES:
            assert relative(ours[name], theirs[name]) < 1e-5, (step, name)


@pytest.mark.parametrize("proj_type", galore.PROJ_TYPES)
def test_one_update_is_galore_torchs_given_its_basis_and_moments(proj_type: str) -> None:
    ours = weights()
    theirs = copy.deepcopy(ours)
    settings = {**PROJECTED, "proj_type": proj_type}
    optimizer = GaLore(ours.values(), lr=1e-2, betas=BETAS, eps=1e-30, refresh="exact", **settings)
    other = reference(theirs.values(), **settings)
    pairs = list(zip(ours.values(), theirs.values(), strict=True))
    for step in range(12):
        adopt(optimizer, other, pairs)
        for parameters in (ours, theirs):
            set_gradients(parameters.values(), step)
            for p in parameters.values():
                p.data.zero_()
        other.step()
        # The basis too, if it was a step that took one
        adopt(optimizer, other, pairs, bases=True)
        for slot in optimizer._slots:
            slot.refreshed = True
        optimizer.step()
        for name in SHAPES:
            assert relative(ours[name], theirs[name]) < 1e-6, (step, name)


def adopt(
    optimizer: GaLore, other: torch.optim.Optimizer, pairs: list[Any], *, bases: bool = False
) -> None:
    """Give our optimizer the bases, or the moments, of galore-torch's."""
    for slot, (mine, its) in zip(optimizer._slots, pairs, strict=True):
        state = other.state[its]
        if not state:
            continue
        if bases:
            basis = state["projector"].ortho_matrix
            optimizer.state[mine]["basis"].copy_(basis.mT if slot.side == "right" else basis)
            continue
        inner = optimizer.inner.state[slot.flat]
        for name in ("exp_avg", "exp_avg_sq"):
            slot.view(inner[name]).copy_(state[name])


def test_at_full_rank_it_is_torchs_adamw_with_every_setting() -> None:
    ours = weights()
    theirs = copy.deepcopy(ours)
    settings: Any = {"lr": 1e-2, "betas": BETAS, "eps": 1e-3, "weight_decay": 0.1}
    groups = [{"params": [p], "rank": min(p.shape), "scale": 1.0} for p in ours.values()]
    optimizer = GaLore(groups, **settings)
    other = torch.optim.AdamW(theirs.values(), **settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step))
        for each in (optimizer, other)
    ]
    for step in range(20):
        for parameters in (ours, theirs):
            set_gradients(parameters.values(), step)
        for slot in optimizer._slots:
            slot.refreshed = True  # keeps the basis it begins with: the identity
        optimizer.step()
        other.step()
        for schedule in schedules:
            schedule.step()
    for name in SHAPES:
        assert relative(ours[name], theirs[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, None])
def test_a_weight_decays_by_lr_times_decay_whatever_its_scale(
    dtype: torch.dtype, rank: int | None
) -> None:
    weight = nn.Parameter(torch.randn(128, 64).to(dtype))
    start = weight.detach().double().clone()
    optimizer = GaLore([weight], lr=1.0, weight_decay=0.5, rank=rank, scale=0.25)
    optimizer.param_groups[0]["lr"] = 0.5  # as a scheduler sets it
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert relative(weight.detach().double(), 0.75 * start) < torch.finfo(dtype).eps


def test_weights_that_are_not_projected_are_torchs_adamw_bit_for_bit() -> None:
    ours = weights()
    theirs = copy.deepcopy(ours)
    names = list(SHAPES)
    groups: list[Any] = [{"params": [ours[names[0]]], "rank": 4}]
    groups += [{"params": [ours[name] for name in names[1:]]}]
    optimizer = GaLore(groups, lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(5):
        for parameters in (ours, theirs):
            set_gradients(parameters.values(), step)
        optimizer.step()
        other.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in names[1:])
    assert not torch.equal(ours[names[0]], theirs[names[0]])


def test_8_bits_are_bitsandbytes_adamw_on_the_projected_problem() -> None:
    import bitsandbytes as bnb

    weight = nn.Parameter(torch.randn(512, 64))
    start = weight.detach().clone()
    optimizer = GaLore([weight], lr=1e-2, rank=16, scale=1.0, bits=8, update_proj_gap=100)
    low = nn.Parameter(torch.zeros(512, 16))
    other = bnb.optim.AdamW8bit([low], lr=1e-2)
    total = torch.zeros(512, 16)
    for step in range(10):
        set_gradients([weight], step)
        gradient = weight.grad
        optimizer.step()
        basis = optimizer.state[weight]["basis"]
        low.data.zero_()
        low.grad = gradient @ basis
        other.step()
        total += low.data
    assert optimizer.inner.state[optimizer._slots[0].flat]["state1"].dtype == torch.uint8
    assert relative(weight.detach() - start, total @ basis.mT) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "num_calls"),
    # In fp32 embedding and norm are updated where they lie: a copy of each would cost memory
    [(torch.bfloat16, 2), (torch.float32, 4)],
)
def test_8_bits_take_one_call_for_the_flat_parameter_of_a_group(
    dtype: torch.dtype, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(dtype)
    optimizer = GaLore(network.groups(), bits=8)
    inner: Any = optimizer.inner
    update_step, sizes = inner.update_step, []

    def count(group: Any, p: Tensor, *place: int) -> None:
        sizes.append(p.numel())
        update_step(group, p, *place)

    monkeypatch.setattr(inner, "update_step", count)
    loss(network, torch.randint(11, (2, 7))).backward()
    optimizer.step()
    assert len(sizes) == num_calls
    flat = optimizer._slots[0].flat
    assert sizes[0] == flat.numel() >= sum(math.prod(slot.shape) for slot in optimizer._slots[:2])


@pytest.mark.parametrize("refresh", galore.REFRESHES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_basis_is_orthonormal_and_captures_what_exact_svd_does(refresh: str, side: str) -> None:
    weight = nn.Parameter(torch.zeros(96, 64))
    optimizer = GaLore([weight], rank=8, proj_type=side, refresh=refresh, update_proj_gap=1)
    given = torch.linalg.qr(torch.randn(96, 64)).Q @ torch.diag(0.9 ** torch.arange(64))
    for _ in range(3):
        given = given + 0.01 * torch.randn(96, 64)
        weight.grad = given
        exact = torch.linalg.svdvals(given)[:8].norm()
        optimizer.step()
        basis = optimizer.state[weight]["basis"]
        assert relative(basis.mT @ basis, torch.eye(8)) < 1e-5
        captured = (given @ basis if side == "right" else basis.mT @ given).norm()
        assert captured / exact > (0.99999 if refresh == "exact" else 0.995)


def captured(optimizer: GaLore, weight: nn.Parameter, gradient: Tensor) -> float:
    """Take a step, and return the share of the gradient that the right basis holds."""
    weight.grad = gradient.clone()
    optimizer.step()
    return float((gradient @ optimizer.state[weight]["basis"]).norm() / gradient.norm())


def test_a_warm_basis_goes_on_from_the_last_one_and_still_finds_what_is_new() -> None:
    bases = torch.linalg.qr(torch.randn(2, 128, 96)).Q, torch.linalg.qr(torch.randn(2, 64, 64)).Q
    settings: Any = {"rank": 8, "proj_type": "right", "update_proj_gap": 1}
    # Where directions are nearly as strong as each other a look from random ones misses some
    flat = bases[0][0, :, :64] @ torch.diag(0.99 ** torch.arange(64)) @ bases[1][0].mT
    best = float(torch.linalg.svdvals(flat)[:8].norm() / flat.norm())
    shares = {}
    for refresh in ("warm", "randomized"):
        weight = nn.Parameter(torch.zeros(128, 64))
        optimizer = GaLore([weight], refresh=refresh, **settings)
        shares[refresh] = [captured(optimizer, weight, flat) / best for _ in range(30)]
    assert shares["warm"][-1] > 0.998
    assert max(shares["randomized"]) < 0.98
    # A gradient that has turned has nothing in common with the basis before
    first, second = (bases[0][0, :, i : i + 8] @ bases[1][0, i : i + 8] for i in (0, 8))
    weight = nn.Parameter(torch.zeros(128, 64))
    optimizer = GaLore([weight], refresh="warm", **settings)
    assert captured(optimizer, weight, first) > 0.9999
    assert captured(optimizer, weight, second) > 0.9999
    # Directions that are kept but weak by now hold no place against new ones
    weight = nn.Parameter(torch.zeros(128, 64))
    optimizer = GaLore([weight], refresh="warm", **settings)
    captured(optimizer, weight, first)
    best = float(second.norm() / (0.1 * first + second).norm())
    assert captured(optimizer, weight, 0.1 * first + second) > 0.9999 * best


def test_refreshes_are_spread_over_a_period_and_counted_from_the_first_step() -> None:
    def refreshes(**settings: Any) -> list[list[int]]:
        parameters = weights()
        optimizer = GaLore(parameters.values(), lr=0.0, rank=4, update_proj_gap=6, **settings)
        found: list[list[int]] = []
        for step in range(13):
            bases = [optimizer.state[p]["basis"].clone() for p in parameters.values()]
            set_gradients(parameters.values(), step)
            optimizer.step()
            found.append(
                [
                    i
                    for i, p in enumerate(parameters.values())
                    if not torch.equal(bases[i], optimizer.state[p]["basis"])
                ]
            )
        return found

    every = [0, 1, 2]
    assert refreshes(stagger_refresh=False) == [every, *[[]] * 5, every, *[[]] * 5, every]
    period = [[0], [], [1], [], [2], []]
    assert refreshes() == [every, *period[1:], *period, [0]]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rotated_moments_are_the_same_moments_in_the_new_basis(bits: int, side: str) -> None:
    # Neither fills its last block
    parameters = [nn.Parameter(torch.randn(50, 50)) for _ in range(2)]
    settings: Any = {"update_proj_gap": 5, "rotate_moments": True, "stagger_refresh": False}
    optimizer = GaLore(parameters, rank=50, proj_type=side, bits=bits, **settings)
    for step in range(6):
        set_gradients(parameters, step)
        if step == 5:
            before = [full_moment(optimizer, slot) for slot in optimizer._slots]
            seconds = [second_moment(optimizer, slot).clone() for slot in optimizer._slots]
            for i, slot in enumerate(optimizer._slots):
                assert slot.weight.grad is not None
                optimizer._refresh_if_due(slot, slot.weight.grad)
                for any_slot, other in zip(optimizer._slots, before, strict=True):
                    limit = 1e-5 if bits == 32 else 0.05
                    assert relative(full_moment(optimizer, any_slot), other) < limit
                assert (second_moment(optimizer, slot) >= 0).all()
                # Those of its neighbour stay as they are until it takes a basis itself
                last = second_moment(optimizer, optimizer._slots[1])
                assert torch.equal(last, seconds[1]) == (i == 0)
        optimizer.step()


def second_moment(optimizer: GaLore, slot: Any) -> Tensor:
    return galore._read_moment(optimizer.inner.state[slot.flat], galore._SECOND, slot)


def full_moment(optimizer: GaLore, slot: Any) -> Tensor:
    """The first moment projected back, which at full rank does not depend on the basis."""
    moment = galore._read_moment(optimizer.inner.state[slot.flat], galore._FIRST, slot)
    basis = optimizer.state[slot.weight]["basis"]
    return moment @ basis.mT if slot.side == "right" else basis @ moment


class Network(nn.Module):
    """Two projected layers between an embedding and a norm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 96, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(96, 96, bias=False, dtype=dtype) for _ in range(2))
        self.norm = nn.LayerNorm(96, dtype=dtype)
        self.low = list(self.layers.parameters())

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.norm(hidden)

    def groups(self) -> list[dict[str, Any]]:
        others = [self.embedding.weight, *self.norm.parameters()]
        return [{"params": self.low, "rank": 4, "update_proj_gap": 3}, {"params": others}]


def loss(network: Network, ids: Tensor, num_micro: int = 1) -> Tensor:
    return (network(ids) - ids[..., None]).square().mean() / num_micro


def train(network: Network, optimizer: GaLore, steps: range, *, micro: int = 4) -> None:
    for step in steps:
        ids = torch.randint(11, (micro, 2, 7), generator=torch.Generator().manual_seed(step))
        for part in ids:
            loss(network, part, micro).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("refresh", galore.REFRESHES)
@pytest.mark.parametrize(
    ("dtype", "eps", "limit"),
    # In fp32 Adam would divide the rounding of a gradient near 0 by itself, were epsilon not larger
    [(torch.float64, 1e-8, 1e-9), (torch.float32, 1e-3, 1e-6)],
)
def test_layerwise_with_accumulation_is_the_ordinary_mode(
    refresh: str, dtype: torch.dtype, eps: float, limit: float
) -> None:
    ordinary, layerwise = Network(dtype), Network(dtype)
    layerwise.load_state_dict(ordinary.state_dict())
    for network, mode in ((ordinary, False), (layerwise, True)):
        optimizer = GaLore(network.groups(), lr=1e-3, eps=eps, refresh=refresh, layerwise=mode)
        train(network, optimizer, range(8))
    for weight, other in zip(layerwise.parameters(), ordinary.parameters(), strict=True):
        assert relative(weight, other) < limit


def test_layerwise_clips_the_norm_of_the_projected_gradients() -> None:
    network = Network()
    network.embedding.weight.data.mul_(5)
    optimizer = GaLore(network.groups(), lr=1e-3, layerwise=True, max_grad_norm=0.01)
    for part in torch.randint(11, (3, 2, 7)):
        loss(network, part).backward()
    expected = torch.stack([gradient.norm() for gradient in optimizer.gradients()]).norm()
    assert all(weight.grad is None for weight in network.low)
    seen = []

    def look(*_: Any) -> None:
        seen.append(torch.stack([gradient.norm() for gradient in optimizer.gradients()]).norm())

    optimizer.inner.register_step_pre_hook(look)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 0.1
    assert seen == [pytest.approx(0.01, rel=1e-3)] * 2  # once for each group


def test_a_projected_gradient_that_is_not_finite_is_among_the_gradients() -> None:
    network = Network()
    optimizer = GaLore(network.groups(), lr=1e-3, layerwise=True)
    for scale in (1.0, math.inf):
        (network.low[0].sum() * scale).backward()
        finite = [bool(gradient.isfinite().all()) for gradient in optimizer.gradients()]
        assert all(finite) == math.isfinite(scale)


def test_no_full_gradient_of_a_projected_weight_outlives_its_hook() -> None:
    network = Network()
    optimizer = GaLore(network.groups(), layerwise=True)
    alive = []

    def look(weight: Tensor) -> None:
        alive.append(sum(weight.grad is not None for weight in network.low))

    for weight in network.low:
        weight.register_post_accumulate_grad_hook(look)
    train(network, optimizer, range(4), micro=2)
    assert len(alive) == 4 * 2 * 2
    assert set(alive) == {0}


def test_an_optimizer_and_its_weights_are_freed_with_the_last_reference() -> None:
    network = Network()
    optimizer = GaLore(network.groups(), layerwise=True)
    train(network, optimizer, range(2))
    alive = [weakref.ref(item) for item in (optimizer, network, *network.parameters())]
    del network, optimizer
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_step_taken_again_keeps_its_basis_and_nothing_else(layerwise: bool) -> None:
    ends = []
    for num_false_starts in (0, 1):
        torch.manual_seed(0)
        network = Network()
        optimizer = GaLore(network.groups(), lr=1e-2, layerwise=layerwise, rotate_moments=True)
        for step in range(5):
            ids = torch.arange(12).view(4, 3) % 7 + step
            for _ in range(num_false_starts):
                loss(network, ids).backward()
                optimizer.drop_gradients()
            loss(network, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([weight.detach().clone() for weight in network.parameters()])
    assert all(torch.equal(weight, other) for weight, other in zip(*ends, strict=True))


@pytest.mark.parametrize("layerwise", [True, False])
def test_gradients_that_are_dropped_leave_nothing_to_the_next_step(layerwise: bool) -> None:
    ends = []
    for ids in ([], [torch.arange(6).view(2, 3)]):
        torch.manual_seed(0)
        network = Network()
        optimizer = GaLore(network.groups(), lr=1e-2, layerwise=layerwise)
        for dropped in ids:
            loss(network, dropped).backward()
            optimizer.zero_grad()
        loss(network, torch.arange(3, 9).view(2, 3)).backward()
        optimizer.step()
        ends.append([weight.detach().clone() for weight in network.parameters()])
    assert all(torch.equal(weight, other) for weight, other in zip(*ends, strict=True))


def test_where_gradients_are_scaled_a_basis_waits_for_the_step() -> None:
    network = Network()
    optimizer = GaLore(network.groups(), refresh_in_backward=False)
    before = [optimizer.state[weight]["basis"].clone() for weight in network.low]

    def are_new() -> list[bool]:
        found = [optimizer.state[weight]["basis"] for weight in network.low]
        return [not torch.equal(basis, old) for basis, old in zip(found, before, strict=True)]

    loss(network, torch.randint(11, (2, 7))).backward()
    assert are_new() == [False, False]
    optimizer.step()
    assert are_new() == [True, True]


def test_another_optimizer_may_take_the_model_once_this_one_is_gone() -> None:
    network = Network()
    GaLore(network.groups(), layerwise=True)
    loss(network, torch.randint(11, (2, 7))).backward()
    assert all(weight.grad is not None for weight in network.low)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_interrupted_in_mid_period_it_goes_on_bit_for_bit(
    layerwise: bool, dtype: torch.dtype, bits: int
) -> None:
    def make(network: Network) -> GaLore:
        return GaLore(
            network.groups(), lr=1e-3, bits=bits, layerwise=layerwise, rotate_moments=True
        )

    whole = Network(dtype)
    half = copy.deepcopy(whole)
    train(whole, make(whole), range(9))
    first = make(half)
    train(half, first, range(5))
    saved = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": first.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed = Network(dtype)
    resumed.load_state_dict(loaded["model"])
    second = make(resumed)
    second.load_state_dict(loaded["optimizer"])
    torch.manual_seed(7)  # no state in torch's own generator
    train(resumed, second, range(5, 9))
    for weight, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, other)
    basis = second.state[resumed.low[0]]["basis"]
    assert basis.dtype == dtype
    moments = [v for s in second.inner.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert all(m.dtype in (torch.float32, torch.uint8) for m in moments)


def test_the_state_of_another_rank_is_refused() -> None:
    network = Network()
    state = GaLore(network.groups()).state_dict()
    other = Network()
    with pytest.raises(ValueError, match="the state is of rank=4, not 8"):
        GaLore([{**other.groups()[0], "rank": 8}, other.groups()[1]]).load_state_dict(state)


def test_tiny_updates_move_bf16_weights_by_what_they_should() -> None:
    num = 4096
    weight = nn.Parameter(torch.full((num,), 0.02, dtype=torch.bfloat16))
    start = weight.detach().double().mean()
    optimizer = GaLore([weight], lr=2.5e-6)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Each of Adam's updates is the learning rate; half a unit in the last place is 6.1e-5
    moved = float(start - weight.detach().double().mean())
    unit = 2.0**-13
    standard_error = math.sqrt(1000 * 2.5e-6 * unit / num)
    assert abs(moved - 1000 * 2.5e-6) < 4 * standard_error
    assert abs(moved - 1000 * 2.5e-6) < 0.05 * 1000 * 2.5e-6
    plain = torch.full((num,), 0.02, dtype=torch.bfloat16)
    assert torch.equal(plain - 2.5e-6, plain)


def test_every_weight_step_and_seed_is_rounded_by_numbers_of_its_own() -> None:
    def rounded(seed: int) -> list[Tensor]:
        """Two equal weights, after each of two equal updates from where they began."""
        parameters = [nn.Parameter(torch.full((512,), 0.02).bfloat16()) for _ in range(2)]
        optimizer = GaLore(parameters, lr=2e-5, betas=(0.0, 0.0), seed=seed)
        found = []
        for _ in range(2):
            for weight in parameters:
                weight.data.fill_(0.02)
                weight.grad = torch.ones_like(weight)
            optimizer.step()
            found += [weight.detach().clone() for weight in parameters]
        return found

    assert all(torch.equal(*pair) for pair in zip(rounded(1), rounded(1), strict=True))
    drawn = [*rounded(1), *rounded(2)]
    assert len({tuple(weight.tolist()) for weight in drawn}) == len(drawn) == 8


def test_projected_bf16_weights_follow_their_fp32_twins_in_the_mean() -> None:
    wide = nn.Parameter(torch.full((256, 64), 0.02, dtype=torch.bfloat16).float())
    narrow = nn.Parameter(wide.detach().bfloat16())
    start = wide.detach().double().clone()
    gradient = torch.linspace(1, 2, 256)[:, None] @ torch.linspace(-1, 2, 64)[None]
    optimizers = [GaLore([p], lr=1e-5, rank=1, scale=1.0) for p in (wide, narrow)]
    for _ in range(400):
        for p, optimizer in zip((wide, narrow), optimizers, strict=True):
            p.grad = gradient.to(p.dtype)
            optimizer.step()
    should, did = ((p.detach().double() - start).mean(0) for p in (wide, narrow))
    assert should.abs().max() > 1e-4
    assert relative(did, should) < 0.1


def test_a_non_finite_gradient_leaves_the_basis_alone() -> None:
    for refresh in galore.REFRESHES:
        network = Network()
        optimizer = GaLore(network.groups(), refresh=refresh, layerwise=True)
        basis = optimizer.state[network.low[0]]["basis"]
        before = basis.clone()
        optimizer._refresh_if_due(optimizer._slots[0], torch.full((96, 96), math.nan))
        assert torch.equal(basis, before)


def test_a_basis_that_is_not_finite_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU torch's SVD returns NaN; on a CPU it raises, so here NaN is put in its place
    monkeypatch.setattr(
        galore, "iterated_basis", lambda matrix, rank, *_: matrix[:, :rank] * math.nan
    )
    network = Network()
    optimizer = GaLore(network.groups())
    basis = optimizer.state[network.low[0]]["basis"]
    before = basis.clone()
    optimizer._refresh_if_due(optimizer._slots[0], torch.ones(96, 96))
    assert torch.equal(basis, before)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_account_is_what_is_allocated(
    layerwise: bool, bits: int, dtype: torch.dtype
) -> None:
    network = Network(dtype)
    optimizer = GaLore(network.groups(), bits=bits, layerwise=layerwise)
    account = optimizer.memory()
    part = torch.randint(11, (2, 7))
    loss(network, part).backward()
    allocated = dict.fromkeys(galore.KINDS, 0)
    allocated["weights"] = nbytes(network.parameters())
    held = [p.grad for p in network.parameters() if p.grad is not None]
    held += [slot.flat.grad for slot in optimizer._slots if slot.flat.grad is not None]
    allocated["gradients"] = nbytes(held)
    updates: list[int] = []

    def look(*_: Any) -> None:
        updates.append(nbytes(slot.flat for slot in optimizer._slots))

    look()
    optimizer.inner.register_step_pre_hook(look)
    optimizer.step()
    look()
    before, *during, after = updates
    assert before == after == 0
    allocated["updates"] = sum(during)
    allocated["bases"] = nbytes(state["basis"] for state in optimizer.state.values() if state)
    allocated["moments"] = nbytes(
        value
        for state in optimizer.inner.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    total = {kind: sum(row[kind] for row in account.values()) for kind in galore.KINDS}
    if layerwise:  # the largest of a group, which was in flight, is gone by now
        for i in range(2):
            total["gradients"] -= max(
                (slot.weight.nbytes for slot in optimizer._slots if slot.group == i), default=0
            )
    assert total == allocated


def nbytes(tensors: Any) -> int:
    """Bytes of distinct storages."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"refresh": "svd"}, "refresh='svd' is not one of exact, randomized, warm"),
        ({"bits": 4}, "bits=4 is neither 8 nor 32"),
        ({"rank": 33}, r"rank=33 does not fit a weight of \(48, 32\)"),
        ({"proj_type": "up", "rank": 4}, "proj_type='up'"),
        ({"max_grad_norm": 1.0}, "max_grad_norm is for layerwise=True"),
        ({"layerwise": True, "refresh_in_backward": False}, "needs refresh_in_backward"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GaLore(weights().values(), **settings)


def test_unknown_settings_and_unfit_weights_are_refused() -> None:
    tall = weights()["tall"]
    with pytest.raises(ValueError, match="unknown setting of a parameter group: update_gap"):
        GaLore([{"params": [tall], "rank": 4, "update_gap": 3}])
    with pytest.raises(ValueError, match="only matrices can be projected"):
        GaLore([{"params": [nn.Parameter(torch.ones(4))], "rank": 1}])
    with pytest.raises(ValueError, match="fp16 weights"):
        GaLore([nn.Parameter(torch.ones(4, 4).half())])
    with pytest.raises(ValueError, match="when it is made"):
        GaLore([tall]).add_param_group({"params": [nn.Parameter(torch.ones(4))]})


PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from orpo_lab.optimizer.galore import GaLore
from orpo_lab.training import devices
from tests.test_galore import Network
folder, num = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
if num > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if num > 1 else 0
processes = devices.of(torch.device("cpu"), torch.float64) if num > 1 else None
for kind in ("full", "projected", "layerwise"):
    torch.manual_seed(3)
    network = Network(torch.float64)  # sums in another order stay below Adam's epsilon
    if num > 1:
        try:
            GaLore(network.groups(), layerwise=True)
        except ValueError as refused:
            print(refused)
        else:
            sys.exit("layerwise was not refused")
    model = DistributedDataParallel(network) if num > 1 and kind == "full" else network
    # Another state of torch's own generator on every process, as dropout would leave it
    torch.manual_seed(rank)
    options = {"layerwise": kind == "layerwise", "refresh_in_backward": kind == "layerwise"}
    if kind != "full":
        options["processes"] = processes
    if kind == "layerwise":
        options["max_grad_norm"] = 0.5
    optimizer = GaLore(network.groups(), lr=1e-3, **options)
    for step in range(7):
        ids = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(step))
        part = ids.chunk(num)[rank]
        (model(part) - part[..., None]).square().mean().backward()
        optimizer.average()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(network.state_dict(), f"{folder}/{kind}-{num}-{rank}.pt")
if num > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_get_what_one_gets(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PROCESSES)
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command, num in (([sys.executable], 1), (torchrun, 2)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path), str(num)],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert "layerwise=True frees each gradient in the backward pass" in done.stdout
    for kind in ("full", "projected", "layerwise"):
        alone, first, second = (
            torch.load(tmp_path / f"{kind}-{name}.pt", weights_only=True)
            for name in ("1-0", "2-0", "2-1")
        )
        for name, value in alone.items():
            assert torch.equal(first[name], second[name]), (kind, name)
            assert relative(first[name], value) < 1e-9, (kind, name)
