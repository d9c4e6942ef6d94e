"""A run's model without its weights, and the bytes that its forward pass keeps for the backward.

The model is built by the code that builds it for a run, but on torch's meta device, where a tensor
has a shape and no numbers. What the forward pass keeps is counted on two of its decoder layers: all
layers after the first are alike. There the real modules and the real engine compute, on fake
tensors of a CPU.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from orpo_lab.config import Config
from orpo_lab.config.optimizer import Lora
from orpo_lab.config.quantization import Int8, Nf4, Quantization
from orpo_lab.engine import attention
from orpo_lab.engine.packing import Collator
from orpo_lab.engine.shared_prefix import prepare, reading_rows
from orpo_lab.model.adapter import put_on, widen
from orpo_lab.model.layers import fused, fusible
from orpo_lab.model.precision import weight_dtype
from orpo_lab.model.projections import projections
from orpo_lab.model.weights import switch_off_dropout
from orpo_lab.training.devices import OneDevice

# A pair of a row: the numbers of tokens of its prompt, chosen and rejected completion
Sizes = tuple[int, int, int]

# Weights in a block of nf4, and blocks in a block of its doubly quantized constants
NF4_BLOCK, NF4_DOUBLE_BLOCK = 64, 256
# Bytes of fp32 code books that each 4-bit layer holds: of 16 weights, and of 256 constants
NF4_CODES, NF4_DOUBLE_CODES = 16 * 4, 256 * 4


def skeleton(
    config: Config, own: PretrainedConfig, dtype: torch.dtype, num_layers: int | None = None
) -> Any:
    """Return the base model as training begins with it, on the meta device, without adapters.

    Nothing is quantized. Weights that are not trained need no gradient.

    Args:
        config: the run's configuration.
        own: the model's own configuration; stays as it is.
        dtype: precision of the arithmetic.
        num_layers: number of decoder layers; None: all.
    """
    own = copy.deepcopy(own)
    switch_off_dropout(own)
    text = own.get_text_config()
    text.use_cache = False
    if num_layers is not None:
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_layers]
        text.num_hidden_layers = num_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            own,
            dtype=weight_dtype(config.optimizer, dtype),
            trust_remote_code=config.model.trust_remote_code,
        )
    if isinstance(config.optimizer, Lora):
        widen(model)
        model.requires_grad_(False)
    return model


def adapted(config: Config, model: Any) -> Any:
    """Return a model with the adapters of a run, if it has any, on the meta device."""
    if not isinstance(config.optimizer, Lora):
        return model
    with torch.device("meta"):
        return put_on(model, config.optimizer)


def trained(config: Config, model: Any) -> list[Tensor]:
    """Return the weights that are trained: those of the model, or of adapters on it.

    Args:
        config: the run's configuration.
        model: what `skeleton` returns.
    """
    if not isinstance(config.optimizer, Lora):
        return list(model.parameters())
    shapes = (layer.weight.shape for layer in projections(model).values())
    r = config.optimizer.r
    return [torch.empty(r, width, device="meta") for shape in shapes for width in shape]


def frozen_bytes(model: Any, quantization: Quantization) -> int:
    """Return the bytes of the weights that are not trained, and of the buffers, as stored.

    Args:
        model: what `skeleton` returns.
        quantization: of all linear layers but the output head.
    """
    linear = {
        id(layer.weight) for layer in projections(model).values() if isinstance(layer, nn.Linear)
    }
    total = sum(buffer.nbytes for buffer in model.buffers())
    for weight in model.parameters():
        if not weight.requires_grad:
            is_linear = id(weight) in linear
            total += quantized_bytes(weight, quantization) if is_linear else weight.nbytes
    return total


def quantized_bytes(weight: Tensor, quantization: Quantization) -> int:
    """Return the bytes of a linear layer's weight, [out, in], in a quantization."""
    match quantization:
        case Nf4(double_quantization=double):
            blocks = -(-weight.numel() // NF4_BLOCK)
            codes = -(-weight.numel() // 2) + NF4_CODES
            if not double:
                return codes + 4 * blocks
            # One byte a block, and of all constants the mean
            return codes + blocks + 4 * -(-blocks // NF4_DOUBLE_BLOCK) + NF4_DOUBLE_CODES + 4
        case Int8():
            return weight.numel() + 4 * len(weight)
    return weight.nbytes


@dataclass(frozen=True)
class Saved:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, without the head.

    Weights are not among them. A tensor that several operations keep counts once.
    """

    layers: int
    """What the decoder layers keep, without gradient checkpointing."""
    largest: int
    """What one decoder layer keeps."""
    shared: int
    """What all decoder layers keep together: the rotary embedding's tables."""
    inputs: int
    """The inputs of all decoder layers: what they keep with gradient checkpointing."""
    rest: int
    """What is kept outside of the decoder layers."""

    def kept(self, *, checkpointing: bool) -> int:
        """Return the bytes at the end of the forward pass."""
        return self.rest + (self.inputs if checkpointing else self.layers + self.shared)


def saved(
    config: Config,
    own: PretrainedConfig,
    dtype: torch.dtype,
    sizes: Sequence[Sizes],
    implementation: str,
) -> Saved:
    """Return what the forward pass of a micro-batch keeps, by `engine=shared_prefix`.

    Args:
        config: the run's configuration.
        own: the model's own configuration.
        dtype: precision of the arithmetic.
        sizes: of the pairs of the micro-batch.
        implementation: the attention for rows, `attention.VARLEN` or `attention.BY_PAIR`.
    """
    text = own.get_text_config()
    total = text.num_hidden_layers
    are_alike = len(set(getattr(text, "layer_types", None) or ())) < 2
    num = min(2, total) if are_alike else total
    base, mode = skeleton(config, own, dtype, num), FakeTensorMode(allow_non_fake_inputs=True)
    network = adapted(config, base)
    _fake(network, mode)
    network.train()
    prepare(base)
    row = Collator(1, 1, prompt_is_scored=True, pad_token_id=0).lay_out(
        [
            {"prompt_ids": [0] * p, "chosen_ids": [0] * c, "rejected_ids": [0] * r}
            for p, c, r in sizes
        ]
    )
    told = attention.inputs(implementation, row, base.config)
    inputs = {name: mode.from_tensor(row[name]) for name in ("input_ids", "position_ids")}
    counter = _Counter(network, _decoder_layers(base, num))
    with (
        counter.counting(),
        reading_rows(base, implementation),
        fused(fusible(network), dtype),
        OneDevice(torch.device("cpu"), dtype).precision(),
    ):
        base.base_model(use_cache=False, **inputs, **told)
    of_layers = [sum(kept.values()) for kept in counter.by_layer]
    more = total - num
    return Saved(
        layers=sum(of_layers) + more * of_layers[-1],
        largest=max(of_layers),
        shared=sum(counter.shared.values()),
        inputs=sum(counter.inputs) + more * counter.inputs[-1],
        rest=sum(counter.rest.values()),
    )


def _decoder_layers(base: Any, num: int) -> nn.ModuleList:
    """Return the decoder layers of a model that has `num` of them."""
    lists = (module for module in base.modules() if isinstance(module, nn.ModuleList))
    return next(layers for layers in lists if len(layers) == num)


def _fake(network: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors of a CPU in the place of a network's meta tensors."""
    made: dict[int, Tensor] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                table[name] = made[id(tensor)]  # type: ignore[assignment]


class _Counter:
    """Counts the storages that are saved for the backward pass, by the place that saves them.

    Args:
        network: its weights are not counted.
        layers: the decoder layers.
    """

    def __init__(self, network: nn.Module, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self.by_layer: list[dict[int, int]] = []
        self.inputs: list[int] = []
        self.shared: dict[int, int] = {}
        self.rest: dict[int, int] = {}
        self._given: set[int] = set()
        self._place = self.rest
        self._known = {weight.untyped_storage()._cdata for weight in network.parameters()}
        # A storage that is freed would leave its number to another one
        self._kept: list[Tensor] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside this context, count what a forward pass saves."""
        handles = [
            handle
            for layer in self._layers
            for handle in (
                layer.register_forward_pre_hook(self._enter, with_kwargs=True),
                layer.register_forward_hook(self._leave),
            )
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = given[0] if given else named["hidden_states"]
        self.inputs.append(states.untyped_storage().nbytes())
        self.by_layer.append({})
        self._place = self.by_layer[-1]
        self._given = {t.untyped_storage()._cdata for t in _tensors(named) if t is not states}

    def _leave(self, layer: nn.Module, given: object, output: object) -> None:
        self._place, self._given = self.rest, set()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(tensor)
            place = self.shared if storage._cdata in self._given else self._place
            place[storage._cdata] = storage.nbytes()
        return tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
