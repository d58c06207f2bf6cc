"""Collectives the objectives need, written so that gloo and nccl give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_tools.errors import UserError

Item = TypeVar("Item")

_BUCKET_BYTES = 25 * 2**20
_LOOK = 0.2  # seconds after which devices that wait for the first one ask again


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in rank order; backward sums what every rank says about each row and keeps the own ones."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(rows)
        return gather_rows_detached(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        if dist.get_backend() == "gloo":  # gloo has no reduce-scatter
            dist.all_reduce(grad)
            return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]
        own = torch.empty((ctx.rows, *grad.shape[1:]), dtype=grad.dtype, device=grad.device)
        dist.reduce_scatter_tensor(own, grad)
        return own


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """``[n, …]`` on each of W ranks → ``[W·n, …]`` on all, with gradient. Every rank must bring the same n."""
    return rows if world_size() == 1 else _GatherRows.apply(rows)


def gather_rows_detached(rows: torch.Tensor) -> torch.Tensor:
    """As `gather_rows`, without gradient (ids, features for statistics)."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """In-place sum over ranks (a no-op in one process)."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def sum_numbers(value: float, device: torch.device) -> float:
    """Sum of a plain number over ranks, in double precision."""
    if world_size() == 1:
        return value
    return sum_over_ranks(torch.tensor(value, dtype=torch.float64, device=device)).item()


@contextmanager
def mean_gradients(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Average gradients over ranks; those of a backward in this context travel while it goes on.

    Buckets of gradients leave in the reverse order of the parameters, about the order in which a backward finishes
    them, each when it and all before it are complete. So every rank sends the same whatever order its autograd
    engine picks. The rest leaves at the end: gradients that were there before, and the buckets behind a parameter
    without one, frozen or unused, which must be the same on all ranks. Gradients are views of their bucket afterwards.

    Raises:
        RuntimeError: inside, a second gradient is added to a parameter whose first is on its way.
    """
    if world_size() == 1:
        yield
        return
    exchange = _Exchange([parameter for parameter in parameters if parameter.requires_grad])
    hooks = [p.register_post_accumulate_grad_hook(exchange.ready) for bucket in exchange.buckets for p in bucket]
    try:
        yield
    finally:  # a backward that fails leaves what is under way to itself: to wait for other ranks could be for ever
        for hook in hooks:
            hook.remove()
    exchange.finish()


class _Exchange:
    """One exchange of gradients: which buckets there are, which of their members are missing, what is under way."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.buckets = _buckets(parameters[::-1])
        self.place: dict[torch.Tensor, int] = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[set[torch.Tensor]] = [set(bucket) for bucket in self.buckets]
        self.next = 0
        self.sent: list[tuple[torch.Tensor, dist.Work]] = []

    def ready(self, parameter: torch.Tensor) -> None:
        number = self.place[parameter]
        if number < self.next:
            raise RuntimeError(
                "a backward reached a parameter twice: its gradient was already sent to the other devices"
            )
        self.missing[number].discard(parameter)
        while self.next < len(self.buckets) and not self.missing[self.next]:
            self._send()

    def _send(self) -> None:
        members = {p: p.grad for p in self.buckets[self.next] if p.grad is not None}
        self.next += 1
        if not members:
            return
        grads = list(members.values())
        flat = grads[0].new_empty(sum(grad.numel() for grad in grads))
        # In the layout of each gradient: fused AdamW takes it for that of the parameter.
        parts = flat.split([grad.numel() for grad in grads])
        views = [part.as_strided(grad.shape, grad.stride()) for part, grad in zip(parts, grads, strict=True)]
        torch._foreach_copy_(views, grads)
        for parameter, view in zip(members, views, strict=True):
            parameter.grad = view
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        while self.next < len(self.buckets):
            self._send()
        for flat, work in self.sent:
            work.wait()
            flat /= world_size()


def _buckets(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Runs of parameters of one type, of about `_BUCKET_BYTES` each."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not buckets or size > _BUCKET_BYTES or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets


def log_sum_exp_over_ranks(maximum: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Combine running (maximum, sum of exp(z − maximum)) of every rank into one log-sum-exp per entry."""
    if world_size() > 1:
        common = maximum.clone()
        dist.all_reduce(common, op=dist.ReduceOp.MAX)
        total = total * torch.exp(maximum - common)
        dist.all_reduce(total)
        maximum = common
    return maximum + total.log()


# ---- work that is shared ------------------------------------------------------------------------------------------


class FailedElsewhere(UserError):
    """Another device met an error; the message is its own."""


def meet(device: torch.device, error: Exception | None = None, number: int = 0) -> int:
    """All devices meet here, and learn the largest `number`.

    Raises:
        Exception: `error` itself on the device that brings one.
        FailedElsewhere: on the others.
    """
    if world_size() > 1:
        told = torch.tensor([error is not None, number], dtype=torch.int64, device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        failed, number = told.tolist()
        if failed:
            said = None if error is None else str(error) if isinstance(error, UserError) else repr(error)
            messages: list[str | None] = [None] * world_size()
            dist.all_gather_object(messages, said)
            if error is None:
                raise FailedElsewhere(next(message for message in messages if message is not None))
    if error is not None:
        raise error
    return number


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """A block that all devices walk through: an error on one raises on all, at their next `meet` or at the end."""
    try:
        yield
    except FailedElsewhere:
        raise
    except Exception as error:  # noqa: BLE001 - the others are told, and `meet` raises it again
        meet(device, error)
    else:
        meet(device)


def on_first(do: Callable[[], object], device: torch.device) -> None:
    """The first device does what may take long, as writing files; the others wait for it until it is done.

    It works in a thread meanwhile, and all ask each other how far it is: no device stands in a collective for as long as the work
    takes, which nccl would take for a device that has gone.

    Raises:
        Exception: of the work, on the first device.
        FailedElsewhere: on the others.
    """
    if world_size() == 1:
        do()
        return
    if rank():
        while not meet(device):
            pass
        return
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(do)
        while not wait([work], timeout=_LOOK).done:
            meet(device)
        error = work.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        meet(device, error, number=1)


def of_first(value: Item) -> Item:
    """What the first device has, on all; anything that can be pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def in_rounds(own: Sequence[Item], device: torch.device, stop: Callable[[], bool]) -> Iterator[Item]:
    """This device's pieces of work, one for each round of all devices: none waits longer than another's piece takes.

    Ends with the round in which a device finds that it is to `stop`.
    """
    for number in range(meet(device, number=len(own))):
        if number < len(own):
            yield own[number]
        if meet(device, number=int(stop())):
            return


def in_turns(sizes: Sequence[int], own: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Pieces of a whole, float32 ``[size, width]`` on the CPU, in their order; device r of W computes every W-th from r on.

    They are exchanged as they come: no device runs ahead of the others, and none waits longer than for a piece.

    Args:
        sizes: rows of every piece.
        own: this device's pieces.
    """
    if world_size() == 1:
        yield from own
        return
    for first in range(0, len(sizes), world_size()):
        piece = next(own) if first + rank() < len(sizes) else None
        width = meet(device, number=0 if piece is None else piece.shape[1])
        sent = torch.zeros(max(sizes), width, device=device)
        if piece is not None:
            sent[: len(piece)] = piece
        everyone = gather_rows_detached(sent).cpu().split(len(sent))
        for part, size in zip(everyone, sizes[first : first + world_size()], strict=False):
            yield part[:size]


@contextmanager
def statistics_of_first(module: torch.nn.Module) -> Iterator[None]:
    """Inside, float buffers (statistics of batches) are the first device's: each may have gathered its own.

    Those of a frozen part that waits elsewhere are equal everywhere, and cannot be sent.
    """
    device = next(
        iter(module.parameters(recurse=False)), torch.empty(0)
    ).device  # the temperature's, where training goes on
    buffers = [b for b in module.buffers() if b.is_floating_point() and b.device == device] if world_size() > 1 else []
    before = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        dist.broadcast(buffer, 0)
    try:
        yield
    finally:
        for buffer, own in zip(buffers, before, strict=True):
            buffer.copy_(own)
