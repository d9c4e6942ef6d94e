"""Fully sharded training: every process holds a part of each weight (`train.sharding=full`).

torch's `fully_shard` (FSDP2) does the work. The weights of a decoder layer are gathered before the
layer computes, and dropped after that. Embeddings, last norm and output head are gathered together.
In the backward pass the gradients are averaged over the processes, and each process keeps its part.
So weights, gradients and moments take a process's share of the memory.

Adapters are small, and stay whole. Their frozen base is sharded, and the adapters are trained as
`devices.Processes` says.

The processes wait for each other in every pass of the model. So all must take as many passes.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lab.config import Config
from orpo_lab.config.optimizer import Lora
from orpo_lab.config.quantization import Unquantized
from orpo_lab.errors import UserError, one_line
from orpo_lab.model.causal import CausalModel, without_adapters
from orpo_lab.training.devices import (
    REPEATED,
    OneDevice,
    Processes,
    gathered,
    is_first,
    num_processes,
)
from orpo_lab.training.devices import of as unsharded
from orpo_lab.training.parts import is_sharded, local, whole

log = logging.getLogger(__name__)

# The folder of a checkpoint with the parts of weights and moments: a safetensors file for each
# process. The format that torch.distributed.checkpoint writes otherwise holds a pickle
PARTS = "parts"
# What names of tensors in these files begin with; the name of a weight follows
WEIGHT, MOMENT = "weight:", "moment:"


def is_asked(config: Config, processes: int | None = None) -> bool:
    """Return whether a run shares the weights among its processes; with one process it does not.

    Args:
        config: the run's configuration.
        processes: number of processes; None: of those that have met.
    """
    return config.train.sharding == "full" and (processes or num_processes()) > 1


def check(config: Config, dtype: torch.dtype, *, is_merged: bool) -> None:
    """Refuse what several processes cannot do with shared weights; `Config` refuses the rest.

    Args:
        config: the run's configuration.
        dtype: precision of the arithmetic.
        is_merged: whether an earlier run's adapter is merged into the base.

    Raises:
        UserError: the text says what to change.
    """
    if config.train.sharding == "full" and num_processes() == 1:
        log.info("train.sharding=full: one process has nobody to share the weights with")
    if not is_asked(config):
        return
    has_adapters = isinstance(config.optimizer, Lora)
    if dtype == torch.float16 and not has_adapters:
        raise UserError(
            "train.sharding=full with optimizer=adamw needs model.dtype=bf16 or fp32: fp16's loss "
            "scaling has to see all gradients at once"
        )
    if is_merged and has_adapters:
        raise UserError(
            f"train.sharding=full: the adapter of start_from={config.start_from} is merged into a "
            "base that would have to be saved whole; use train.sharding=none, or optimizer=adamw"
        )


def load_device(config: Config, device: torch.device) -> torch.device:
    """Return where to load a run's model: the CPU if the device alone could not hold the model.

    A quantized base is small, and is loaded by bitsandbytes on the device.
    """
    is_small = not isinstance(config.quantization, Unquantized)
    return torch.device("cpu") if is_asked(config) and not is_small else device


def devices_of(model: CausalModel, dtype: torch.dtype) -> OneDevice:
    """Return the devices of this run, as `devices.of` does, for a model that may be sharded."""
    return Sharded(model.device, dtype) if is_sharded(model) else unsharded(model.device, dtype)


class Sharded(Processes):
    """Several processes that share the weights; the arguments are those of `OneDevice`."""

    @property
    def takes_turns(self) -> bool:
        """Whether the processes wait for each other in every pass of the model: they do."""
        return True

    @property
    def readers(self) -> OneDevice:
        """The devices that deal pairs which are only read: every process reads all pairs."""
        return OneDevice(self.device, self.dtype)

    def even(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return as many micro-batches in every process; the last one is repeated, see REPEATED."""
        num = max(gathered(len(micro_batches))) - len(micro_batches)
        return micro_batches + [micro_batches[-1] | {REPEATED: True}] * num

    def average_gradients(self, weights: Sequence[Tensor]) -> None:
        """Average the gradients of weights that are not sharded; `fully_shard` does the others."""
        super().average_gradients(_kept_whole(weights))

    def check_equal(self, weights: Sequence[Tensor], step: int) -> None:
        """Check that weights that are not sharded are equal in all processes."""
        if kept := _kept_whole(weights):
            super().check_equal(kept, step)


def _kept_whole(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight for weight in weights if not isinstance(weight, DTensor)]


def shard(network: Any, device: torch.device) -> None:
    """Let the processes share the weights of a model, in place; adapters stay whole.

    Args:
        network: equal in all processes, on the CPU or on the device, with adapters if it has any.
        device: where this process computes.
    """
    base: Any = without_adapters(network)
    trained = {weight for weight in network.parameters() if weight.requires_grad}
    adapters = trained if base is not network else set()
    for weight in adapters:
        weight.data = weight.data.to(device)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # The weight itself becomes an ordinary tensor. bitsandbytes' layer then looks here, too
            module.quant_state = module.weight.quant_state
    mesh = init_device_mesh(device.type, (num_processes(),))
    layers = [each for each in base.modules() if isinstance(each, GradientCheckpointingLayer)]
    for module in (*layers, base):
        # Without `reshard_after_forward` the embeddings and the head would stay gathered after an
        # evaluation, which has no backward pass
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    weights: list[Tensor] = list(network.parameters())
    log.info(
        "fully sharded: %.1f of %.1f MB of parameters on this process",
        sum(local(weight).nbytes for weight in weights) / 1e6,
        sum(weight.nbytes for weight in weights) / 1e6,
    )


@torch.no_grad()
def whole_model(network: Any) -> Any:
    """Return a sharded model as an ordinary one on the CPU, for saving; adapters as they are.

    All processes must call this function. All but the first get None.
    """
    if not has_parts(network):
        return network if is_first() else None
    found: dict[int, Tensor] = {}  # a tied weight has several names
    weights = {}
    for name, weight in network.state_dict(keep_vars=True).items():
        if id(weight) not in found:
            found[id(weight)] = _on_host(whole(weight))
        weights[name] = found[id(weight)]
    if not is_first():
        return None
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            network.config, dtype=network.dtype
        )
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = network.generation_config
    return model


def _on_host(weight: Tensor) -> Tensor:
    """Return a weight on the CPU in the first process, and nothing of it in the others."""
    return weight.detach().cpu() if is_first() else weight.new_empty(0)


def has_parts(model: Any) -> bool:
    """Return whether trained weights of a model are sharded."""
    return any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the trained weights and their moments to a new folder, each process its own parts.

    All processes must call this function.

    Raises:
        UserError: a process cannot write its parts.
    """
    distributed.barrier()  # until the first process has made room for the folder
    tensors = {f"{WEIGHT}{name}": weight for name, weight in _trained(model)}
    for name, weight in _trained(model):
        for key, value in optimizer.state[weight].items():
            tensors[f"{MOMENT}{name}:{key}"] = value
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        state_dict_saver.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        raise UserError(_told(f"{folder} cannot be written", error)) from error


def load(model: nn.Module, folder: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read what `save` wrote, on any number of processes, into a model that is sharded or not.

    Args:
        model: gets its trained weights.
        folder: the folder that `save` wrote.
        optimizer: of these weights, gets its moments; None: none are read.

    Raises:
        UserError: the folder holds weights of another model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, weight in _trained(model):
        tensors[f"{WEIGHT}{name}"] = weight.detach()
        of_weight = f"{MOMENT}{name}:"
        for key in stored if optimizer else ():
            if optimizer and key.startswith(of_weight):
                # A count of steps has no shape; a moment has that of its weight
                is_count = getattr(stored[key], "size", None) == torch.Size([])
                moment = torch.zeros(()) if is_count else torch.zeros_like(weight.detach())
                optimizer.state[weight][key.removeprefix(of_weight)] = tensors[key] = moment
    is_alone = num_processes() == 1
    try:
        with warnings.catch_warnings():
            # torch warns that one process reads alone, which is asked for
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=is_alone)
    except CheckpointException as error:
        raise UserError(_told(f"{folder} is not of this model", error)) from error


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _told(what: str, error: CheckpointException) -> str:
    cause, _ = next(iter(error.failures.values()))
    return f"{what} ({one_line(cause)[:150]})"


def part_like(value: Any, weight: Tensor) -> Any:
    """Return this process's part of a whole tensor, for a weight of the same shape.

    All else is returned as it is, and so is a tensor for a weight that is not sharded.
    """
    if not isinstance(weight, DTensor) or getattr(value, "shape", None) != weight.shape:
        return value
    # Every process has the whole tensor already, so none is sent
    return distribute_tensor(
        value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
    )
