"""The device and the processes of a run. No other module asks torch how many processes train.

A run has one process, or several that torchrun has started, each with a device of its own
(`Processes`). Every process holds the whole model and all pairs. The pairs of a step are dealt to
the processes, and the gradients are averaged before the update. So all processes make the same
update, and their weights stay equal bit for bit. The first process writes the run's files.
"""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from orpo_lab import environment
from orpo_lab.errors import UserError, one_line

T = TypeVar("T")

# The key of a micro-batch that a process reads once more, since another process has more of them.
# Neither its loss nor its metrics count
REPEATED = "repeated"

# How long a process waits for the others: the first process may judge the model for hours. torchrun
# itself ends the processes of which one is lost
PATIENCE = timedelta(days=7)
# Words in errors of torch's collectives after another process has ended
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error")


def num_processes() -> int:
    """Return how many processes train together, by torch.distributed; 1 without it."""
    return distributed.get_world_size() if _have_met() else 1


def is_first() -> bool:
    """Return whether this is the process that writes the run's files."""
    return not _have_met() or distributed.get_rank() == 0


def _have_met() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside this context, the processes that torchrun has started work together.

    With one process nothing is done.

    Raises:
        UserError: another process has ended.
    """
    if environment.process().num == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    environment.forget_processes()
    try:
        yield
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in LOST):
            raise
        raise UserError(
            "another process of this run has ended, and says why itself "
            f"({one_line(error)[:100]}); the checkpoints are intact: go on with resume="
        ) from error
    finally:
        distributed.destroy_process_group()


def from_first(value: T) -> T:
    """Return the first process's value in every process; with one process, the value itself."""
    values = [value]
    if _have_met():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: T) -> list[T]:
    """Return every process's value, in the order of the processes."""
    values = [value] * num_processes()
    if _have_met():
        distributed.all_gather_object(values, value)
    return values


def check_same(what: str, value: Any) -> None:
    """Check that a value is the same in all processes.

    Raises:
        UserError: the value differs; the text says `what` differs, and in which process.
    """
    first, *others = gathered(value)
    for number, other in enumerate(others, 2):
        if other != first:
            raise UserError(
                f"process {number} of this run has other {what} than the first ({other}, not "
                f"{first}); all processes must see the same files and the same kind of device"
            )


def of(device: torch.device, dtype: torch.dtype) -> "OneDevice":
    """Return the devices of this run: one, or those of all processes that have met."""
    return Processes(device, dtype) if _have_met() else OneDevice(device, dtype)


class OneDevice:
    """One process on one device.

    Args:
        device: the device that the model is on.
        dtype: precision of the arithmetic. In fp16 the loss is scaled, so that small gradients do
            not vanish. If scaled gradients overflow, the step is skipped and the scale lowered.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        is_scaled = dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type) if is_scaled else None

    @property
    def takes_turns(self) -> bool:
        """Whether the processes wait for each other in every pass of the model."""
        return False

    @property
    def readers(self) -> "OneDevice":
        """The devices that deal pairs which are only read, for example held-out pairs."""
        return self

    def deal(self, sizes: Sequence[int]) -> list[int]:
        """Return the indices of the pairs that this process takes, in order.

        Args:
            sizes: number of tokens of each pair.
        """
        return list(range(len(sizes)))

    def even(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the micro-batches, as many as the model must read in this process."""
        return micro_batches

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor of any shape."""
        return tensor

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes of a tensor of any shape."""
        return tensor

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of any shapes by their means over all processes, in place."""

    def average_gradients(self, weights: Sequence[Tensor]) -> None:
        """Replace the gradients of weights by their means over all processes, in place.

        A process without a gradient counts as one with zeros. A weight that has a gradient in no
        process gets none.
        """

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        return flag

    def vary(self, seed: int, step: int) -> None:
        """Give every process but the first its own random numbers, for the dropout of a step.

        They depend on seed, step and process alone. So no checkpoint need hold them.
        """

    def check_equal(self, weights: Sequence[Tensor], step: int) -> None:
        """Check that weights are equal in all processes, bit for bit.

        Args:
            weights: of any shapes.
            step: the number of the last step; the error names it.

        Raises:
            UserError: a weight differs.
        """

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with its tensors on the device.

        The copy to a GPU can run while the GPU still computes the step before.
        """
        return {
            name: self._moved(value) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def precision(self) -> torch.autocast:
        """Return a context manager, inside which a model computes in the run's precision."""
        is_narrow = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(
            self.device.type, self.dtype if is_narrow else None, enabled=is_narrow
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to the gradients of the weights.

        In fp16 the added gradients are multiplied by the loss scale.
        """
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def gradients(self, loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of a scalar loss, one for each weight; `weight.grad` is not touched.

        In fp16 the gradients are computed at the loss scale, as in `backward`, and then divided by
        it. None: the loss does not depend on the weight.
        """
        if self.scaler is None:
            return [*torch.autograd.grad(loss, weights, allow_unused=True)]
        scale = self.scaler.get_scale()
        found = torch.autograd.grad(loss * scale, weights, allow_unused=True)
        return [None if gradient is None else gradient / scale for gradient in found]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of a step by the loss scale, in place; called before they are read.

        Without a loss scale nothing is done.
        """
        if self.scaler:
            self.scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let an optimizer take its step; return False if loss scaling skipped the step."""
        if self.scaler is None:
            optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def skip_update(self) -> None:
        """Leave out the optimizer's step; only the loss scale is updated."""
        if self.scaler:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the state of the loss scale; empty without a scale."""
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.scaler and state:
            self.scaler.load_state_dict(state)


class Processes(OneDevice):
    """Several processes, each on a device of its own; the arguments are those of `OneDevice`.

    All processes must call the methods that communicate, and in the same order: `total`, `average`,
    `average_`, `average_gradients`, `any` and `check_equal`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.num, self.index = distributed.get_world_size(), distributed.get_rank()

    def deal(self, sizes: Sequence[int]) -> list[int]:
        """Return the indices of this process's pairs; see `OneDevice.deal` and `dealt`."""
        return dealt(sizes, self.num)[self.index]

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor of any shape."""
        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes of a tensor of any shape."""
        return self.total(tensor) / self.num

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of any shapes by their means over all processes, in place."""
        for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        for tensor in tensors:
            tensor /= self.num

    def average_gradients(self, weights: Sequence[Tensor]) -> None:
        """Replace gradients by their means; see `OneDevice.average_gradients`."""
        has_one = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32)
        is_used = self.total(has_one) > 0
        used = [weight for weight, used in zip(weights, is_used.tolist(), strict=True) if used]
        for weight in used:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        self.average_([weight.grad for weight in used if weight.grad is not None])

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        return bool(self.total(torch.tensor(int(flag))))

    def vary(self, seed: int, step: int) -> None:
        """Give every process but the first its own random numbers; see `OneDevice.vary`."""
        if self.index:
            torch.manual_seed(hash((seed, step, self.index)) % 2**63)

    @torch.no_grad()
    def check_equal(self, weights: Sequence[Tensor], step: int) -> None:
        """Check that weights are equal in all processes; see `OneDevice.check_equal`."""
        found = torch.stack([_digest(weight) for weight in weights])
        both = torch.cat([found, -found])
        distributed.all_reduce(both, op=distributed.ReduceOp.MAX)
        largest, smallest = both.chunk(2)
        if not torch.equal(largest, -smallest):
            raise UserError(
                f"step {step}: the weights of the processes are no longer equal; the run stops, "
                "and nothing after its last checkpoint is kept. A device may be faulty"
            )


def dealt(sizes: Sequence[int], num: int) -> list[list[int]]:
    """Deal pairs to processes so that all get about the same number of tokens.

    The longest pair comes first, and goes to the process with the fewest tokens so far (Graham
    1969). So two processes differ by at most the tokens of one pair.

    Args:
        sizes: number of tokens of each pair.
        num: number of processes.

    Returns:
        The indices of each process's pairs, in order.
    """
    hands: list[list[int]] = [[] for _ in range(num)]
    tokens = [(0, 0)] * num
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        process = tokens.index(min(tokens))
        so_far, num_pairs = tokens[process]
        tokens[process] = so_far + sizes[i], num_pairs + 1
        hands[process].append(i)
    return [sorted(hand) for hand in hands]


def _digest(weight: Tensor) -> Tensor:
    """Return a number that depends on all bits of a tensor, an int64 scalar."""
    bits = weight.detach().reshape(-1).view(_INTEGERS[weight.element_size()])
    places = torch.arange(bits.numel(), device=bits.device) % 8191 + 1
    return (bits * places).sum()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
