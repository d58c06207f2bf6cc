"""The exchange of gradients while the backward runs, beside one after it: two processes (gloo), steps in turns.

    python benchmarks/exchange.py [--hidden 512 --layers 6 --batch 8 --bucket 25 64 --repeats 15]

Every process has one thread. Given are medians of forward, loss, backward and exchange, and their ratio to the exchange
after the backward; "none" is the step without an exchange. With as many processes as cores nothing is idle while
gradients travel, so a CPU shows the least there is to win.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from cnclip_ft import collectives  # noqa: E402
from cnclip_ft.models.start import build_start  # noqa: E402
from cnclip_ft.training.large_batch import GradientStep  # noqa: E402
from cnclip_ft.training.loss import ContrastiveObjective  # noqa: E402
from cnclip_ft.training.sharding import Whole  # noqa: E402


class Nothing(Whole):
    @contextmanager
    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        yield


class After(Whole):
    """One bucket after another, when the backward is done."""

    @contextmanager
    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        yield
        for bucket in collectives._buckets(list(parameters)):
            grads = [p.grad for p in bucket if p.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def work(given: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    hidden = given.hidden
    model, _ = build_start(
        {
            "image": {
                "kind": "vit",
                "hidden": hidden,
                "layers": given.layers,
                "heads": hidden // 64,
                "patch": 16,
                "image_size": 224,
            },
            "text": {
                "hidden": hidden,
                "layers": given.layers,
                "heads": hidden // 64,
                "vocabulary": 21128,
                "dropout": 0.0,
            },
            "projection": 512,
        },
        seed=0,
    )
    model.train()
    size = given.batch
    batch = {
        "pixels": torch.randn(size, 3, 224, 224),
        "input_ids": torch.randint(1000, 20000, (size, 32)),
        "attention_mask": torch.ones(size, 32, dtype=torch.int64),
        "image_keys": torch.arange(size) + dist.get_rank() * size,
        "text_keys": torch.arange(size) + dist.get_rank() * size,
    }
    ways: list[tuple[str, Whole, int]] = [("none", Nothing(), 25), ("after, buckets of 64 MiB", After(), 64)]
    ways += [(f"meanwhile, buckets of {mib} MiB", Whole(), mib) for mib in given.bucket]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for turn in range(given.repeats + 1):
        for name, sharding, mib in ways if turn % 2 else ways[::-1]:
            collectives._BUCKET_BYTES = mib * 2**20
            step = GradientStep(
                model,
                ContrastiveObjective(),
                micro_batch_size=None,
                autocast=nullcontext,
                backward=lambda loss: loss.backward(),
                sharding=sharding,
            )
            dist.barrier()
            began = time.perf_counter()
            step(batch)
            took = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if turn:  # the first does not count
                seconds[name].append(took.item())
            model.zero_grad(set_to_none=True)
    if dist.get_rank() == 0:
        mib_sent = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        print(
            f"exchange of {mib_sent:.0f} MiB of gradients, {dist.get_world_size()} processes, batch {size} each, "
            f"median of {given.repeats}"
        )
        base = statistics.median(seconds[ways[1][0]])
        for name, times in seconds.items():
            print(
                f"  {name:<30} {statistics.median(times):7.3f} s  {statistics.median(times) / base:5.2f}×  "
                f"(ratio of each turn {statistics.median(a / b for a, b in zip(times, seconds[ways[1][0]], strict=True)):.2f}×)"
            )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bucket", type=int, nargs="+", default=[25, 64], help="MiB")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        work(given)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(given.processes)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    sys.exit(subprocess.run([*command, __file__, *sys.argv[1:]], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
