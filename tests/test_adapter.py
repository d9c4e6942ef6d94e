from collections.abc import Callable
from typing import Any

import pytest
import torch

from orpo_lab import config

Load = Callable[..., config.Config]


@pytest.mark.parametrize("optimizer", ["qlora", "lora"])
def test_adapters_sit_on_every_projection_and_nothing_else_is_trained(
    load: Load, build_model: Any, optimizer: str
) -> None:
    network = build_model(load(f"optimizer={optimizer}"))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * network.config.num_hidden_layers
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}


def test_settings_reach_the_adapter(load: Load, build_model: Any) -> None:
    network = build_model(load("optimizer.r=4", "optimizer.alpha=2", "optimizer.dropout=0.3"))
    settings = network.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (4, 2, 0.3)


def test_adapters_depend_on_the_seed_alone(load: Load, build_model: Any) -> None:
    def first(seed: int) -> torch.Tensor:
        network = build_model(load(f"seed={seed}"))
        return next(p for name, p in network.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
