"""Log-probabilities without logits, against `log_softmax` and against TRL's kernel."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_lab.engine import head
from tests.test_engine_shared_prefix import make_model

CASES: dict[str, dict[str, Any]] = {
    "plain": {"scale": 1.0, "softcap": None},
    "scaled": {"scale": 0.4, "softcap": None},
    "softcapped": {"scale": 1.5, "softcap": 3.0},
}


def make(num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((num, 7), (13, 7), (13,))
    numbers = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    targets = torch.randint(13, (num,), generator=generator)
    states, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in numbers)
    return states, weight, bias, targets


def reference(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: Any
) -> Tensor:
    logits = torch.nn.functional.linear(states, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_kept", [0, 1, 4])
def test_values_and_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, case: str, has_bias: bool, num_kept: int
) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)
    monkeypatch.setattr(head, "NUM_KEPT", num_kept)
    states, weight, bias, targets = make(9, torch.float64)  # the last chunk is of one row
    inputs = (states, weight, bias) if has_bias else (states, weight)
    given = (states, weight, bias if has_bias else None, targets)
    ours = head.token_logps(*given, **CASES[case])
    theirs = reference(*given, **CASES[case])
    assert torch.allclose(ours, theirs, rtol=1e-12)
    slopes = torch.linspace(-1, 2, 9, dtype=torch.float64)
    expected = torch.autograd.grad(theirs, inputs, slopes)
    for _ in range(2):  # what was kept is used up by the first
        gradients = torch.autograd.grad(ours, inputs, slopes, retain_graph=True)
        for gradient, other in zip(gradients, expected, strict=True):
            assert torch.allclose(gradient, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_head_gets_no_gradient_and_gives_the_same(case: str) -> None:
    states, weight, bias, targets = make(300, torch.float64)
    slopes = torch.linspace(-1, 2, 300, dtype=torch.float64)
    theirs = reference(states, weight, bias, targets, **CASES[case])
    (expected,) = torch.autograd.grad(theirs, states, slopes)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    ours = head.token_logps(states, weight, bias, targets, **CASES[case])
    ours.backward(slopes)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert weight.grad is bias.grad is None
    assert states.grad is not None
    assert torch.allclose(states.grad, expected, rtol=1e-10, atol=1e-14)


def test_logits_whose_exponential_is_no_number_any_more_are_no_trouble() -> None:
    states, weight, bias, targets = make(20, torch.float64)
    steep = 1000 * states
    theirs = reference(steep, weight, bias, targets, 1.0, None)
    ours = head.token_logps(steep, weight, bias, targets, scale=1.0, softcap=None)
    assert weight.mul(steep[:, None]).sum(-1).max() > 1000
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for gradient, other in zip(
        torch.autograd.grad(ours.sum(), (states, weight, bias), retain_graph=True),
        torch.autograd.grad(theirs.sum(), (states, weight, bias)),
        strict=True,
    ):
        assert torch.allclose(gradient, other, rtol=1e-10, atol=1e-10)


def test_under_autocast_products_are_in_bf16_and_sums_in_fp32() -> None:
    states, weight, bias, targets = make(300, torch.float32)
    exact = reference(states, weight, bias, targets, 1.0, None)
    (for_exact,) = torch.autograd.grad(exact.sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        ours = head.token_logps(states, weight, bias, targets, scale=1.0, softcap=None)
    ours.sum().backward()
    assert ours.dtype == torch.float32
    assert 1e-6 < (ours - exact).abs().max() < 0.1
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - for_exact).norm() < 0.01 * for_exact.norm()


@pytest.mark.parametrize("case", CASES)
def test_trls_kernel_is_given_what_it_takes(case: str) -> None:
    """On a CPU it runs in torch; on a GPU the same call runs in Triton."""
    states, weight, bias, targets = make(10, torch.float32)
    settings = CASES[case]
    given = (states, weight, bias, targets, settings["scale"], settings["softcap"])
    ours, theirs = head._fused_logps(*given), reference(*given)
    assert torch.allclose(ours, theirs, atol=1e-5)
    inputs = (states, weight, bias)
    for gradient, other in zip(
        torch.autograd.grad(ours.sum(), inputs),
        torch.autograd.grad(theirs.sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(gradient, other, atol=1e-5)


def test_a_large_vocabulary_costs_less_precision_than_torchs_log_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(64, 32, generator=generator)
    weight = torch.randn(49152, 32, generator=generator)
    targets = torch.randint(49152, (64,), generator=generator)
    given = (weight, None, targets, 1.0, None)
    exact = reference(states.double(), weight.double(), *given[1:])
    ours = head.token_logps(states, *given[:3], scale=1.0, softcap=None)
    theirs = reference(states, *given)
    errors = [float((logps - exact).abs().mean()) for logps in (ours, theirs)]
    assert errors[0] < 2e-6
    assert errors[0] < errors[1] / 2


def test_a_head_is_told_by_what_it_does_also_in_16_bits_and_where_nothing_is_finite() -> None:
    network = make_model("llama").eval()
    narrow = copy.deepcopy(network).bfloat16()
    assert head.has_plain_head(narrow)
    ids, places = torch.arange(3, 23).view(2, 10), torch.tensor([2, 5, 11, 18])
    with torch.no_grad():
        logps = head.score_by_logits(narrow, places, ids.flatten()[places + 1], input_ids=ids)
        expected = narrow(input_ids=ids).logits.float().log_softmax(-1).flatten(0, 1)
        network.lm_head.weight[3] = torch.nan
    assert logps.dtype == torch.float32
    assert torch.allclose(logps, expected[places, ids.flatten()[places + 1]], atol=1e-5)
    assert head.has_plain_head(network)


def test_a_head_in_16_bits_may_round_otherwise_than_its_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As kernels of a GPU do; those of a CPU round alike, so the difference is put in by hand
    network = make_model("llama").eval()
    with torch.no_grad():
        network.lm_head.weight.mul_(64)
    score = head.score
    monkeypatch.setattr(head, "score", lambda *args, **named: score(*args, **named) + 0.01)
    assert head.has_plain_head(copy.deepcopy(network).bfloat16())
    assert not head.has_plain_head(network)


def test_without_gradients_a_trained_head_keeps_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)
    made: list[Tensor] = []
    buffer = head._Head.buffer

    def counted(*arguments: Any) -> Tensor:
        made.append(buffer(*arguments))
        return made[-1]

    monkeypatch.setattr(head._Head, "buffer", counted)
    states, weight, bias, targets = make(20, torch.float32)
    with torch.no_grad():
        head.token_logps(states.detach(), weight, bias, targets, scale=1.0, softcap=None)
    assert len(made) == 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_tiles_without_gradients_are_log_softmax(
    monkeypatch: pytest.MonkeyPatch, case: str, has_bias: bool
) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)
    monkeypatch.setattr(head, "CPU_TILE", 5)  # the last tile has 3 of the 13 columns
    states, weight, bias, targets = make(9, torch.float64)
    steep = 100 * states
    given = (steep, weight, bias if has_bias else None, targets)
    with torch.no_grad():
        ours = head.token_logps(*given, **CASES[case])
    assert torch.allclose(ours, reference(*given, **CASES[case]), rtol=1e-12)
    assert ours.max() <= 0


def test_tiles_of_a_large_vocabulary_round_as_chunks_do_and_never_above_0() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 32, generator=generator)
    weight = torch.randn(head.CPU_TILE * 3 + 7, 32, generator=generator)
    targets = (states @ weight.mT).argmax(1)  # some log-probabilities are nearly 0
    exact = reference(states.double(), weight.double(), None, targets, 1.0, None)
    chunks = head.token_logps(states, weight, None, targets, scale=1.0, softcap=None)
    with torch.no_grad():
        tiles = head.token_logps(states, weight, None, targets, scale=1.0, softcap=None)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = head.token_logps(states, weight, None, targets, scale=1.0, softcap=None)
    assert (tiles - exact).abs().mean() < 1.2 * (chunks - exact).abs().mean()
    assert exact.max() > -1e-3
    assert tiles.max() <= 0
    assert narrow.max() <= 0
    assert narrow.dtype == torch.float32
    assert 1e-5 < (narrow - exact).abs().mean() < 0.1
