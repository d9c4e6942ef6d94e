"""The part of a causal language model's interface that this package uses."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig


class CausalModel(Protocol):
    """A causal language model of transformers, or adapters of PEFT around such a model.

    The engine and the evaluation need only these members. A stand-in for a model (in a test, for
    example) needs no others.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig
    training: bool

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""

    @property
    def base_model(self) -> Any:
        """The layers below the output head: ids [B, T] -> `last_hidden_state` [B, T, D]."""

    def get_output_embeddings(self) -> Any:
        """Return the output head: `weight` [V, D], and a `bias` [V] where the head has a bias."""

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return `logits` [B, T, V] of `input_ids` [B, T]."""

    def generate(self, **settings: Any) -> torch.Tensor:
        """Return the ids of prompts and generated answers, [B, T]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all weights."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, in which dropout acts, or to evaluation mode."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""


def without_adapters(model: CausalModel) -> Any:
    """Return the model inside the adapters; without adapters, return the model itself."""
    wrapped = getattr(model, "get_base_model", None)
    return model if wrapped is None else wrapped()
