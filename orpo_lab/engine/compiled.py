"""Decoder layers compiled one by one, so that all of them share one graph."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lab.model.causal import CausalModel, without_adapters

# Where the compiler keeps its results, unless the user's environment names another folder: a second
# run compiles in a fraction of the time. The compiler's own default is in /tmp
CACHE = "~/.cache/orpo_lab/torchinductor"


class CompiledLayers:
    """The decoder layers of a model, compiled when they are first called inside `active`.

    The norms, the rotary embedding and the activation function of a layer become a kernel each. The
    number of tokens is dynamic: a row of another length needs no new compilation.

    Args:
        model: on its device, with adapters if it has any.
    """

    def __init__(self, model: CausalModel) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser(CACHE))
        base = without_adapters(model)
        self._base, self._embedding = base, base.get_input_embeddings()

    @functools.cached_property
    def _calls(self) -> dict[nn.Module, Any]:
        """The compiled call of each layer. An engine that only evaluates never needs these."""
        return {
            layer: torch.compile(layer._call_impl, dynamic=True)
            for layer in self._base.modules()
            if isinstance(layer, GradientCheckpointingLayer)
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside this context, let the model call the compiled layers."""
        # The input of the first layer needs a gradient as those of all others do, or the first
        # layer would need a graph of its own
        hook = self._embedding.register_forward_hook(_require_grad)
        for layer, call in self._calls.items():
            layer._compiled_call_impl = call  # as nn.Module.compile does
        try:
            yield
        finally:
            hook.remove()
            for layer in self._calls:
                layer._compiled_call_impl = None


def _require_grad(module: nn.Module, inputs: object, output: Tensor) -> None:
    output.requires_grad_(torch.is_grad_enabled())
