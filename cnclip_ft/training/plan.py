"""What will happen, said before it does: weights, what trains, steps, rates, duplicates, precision, warnings."""

from __future__ import annotations

import torch

from cnclip_ft.data.mixture import Mixture, stores_of
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.context import Context
from cnclip_ft.training.lora import trained_size
from cnclip_ft.training.memory import estimate
from cnclip_ft.training.stage_plan import StagePlan
from cnclip_ft.training.throughput import Throughput, card
from data_tools.errors import RequestError

BARS = "▁▂▃▄▅▆▇█"
# Peak rates the paper and its repository pair with a global batch for fine-tuning all weights (arXiv 2211.01335,
# appendix; the smallest pair is the maintainers' advice after 2e-5 at batch 96 ended below zero-shot).
PUBLISHED_RATES = ((96, 2e-6), (1024, 5e-5), (4096, 3e-5), (7680, 5e-5), (12800, 5e-5), (20480, 2e-5))


def describe(context: Context, model: DualEncoder, stages: list[StagePlan]) -> str:
    """The whole plan as text, warnings last."""
    lines = ["Plan", f"  run folder   {context.folder}", f"  device       {_device(context)}"]
    known = card(context.device, context.precision)
    if known is not None:
        lines.append(f"  card         {known}")
    lines.append(f"  precision    {context.precision} ({context.precision_reason})")
    lines.append(f"  attention    {attention_kernel(context.device, context.precision)}")
    lines += ["  weights"] + [f"    {line}" for line in context.start.lines()]
    table = context.pairs
    lines.append(
        f"  training     {len(table):,} pairs, {len(set(table.image_keys.tolist())):,} images ({_stores(context)}); "
        f"captions {table.lengths.mean():.1f} tokens on average, {100 * table.cut / len(table):.1f}% reach the context length "
        f"of {context.tokenizer.context_length}"
    )
    lines += _mixture(context, stages)
    for name, evaluator in context.evaluators.items():
        lines.append(f"  validation   {name}: {evaluator.describe()}")
    guard = context.recipe.data.guard
    if guard is not None and context.guard_store is not None:
        lines.append(
            f"  guard        {len(context.guard_store):,} pairs ({context.guard_store.path}); a drop of more than "
            f"{guard.max_drop:g} points " + ("is reported" if guard.action == "report" else "ends the run")
        )
    if context.recipe.best_by != "mean_recall":
        lines.append(f"  best by      {context.recipe.best_by}")
    for stage in stages:
        lines += _stage(context, model, stage)
    lines += [f"  WARNING      {warning}" for warning in warnings(context, model, stages)]
    return "\n".join(lines)


def _stores(context: Context) -> str:
    store = context.train_store
    if isinstance(store, Mixture):
        return f"{len(store.parts)} stores, batches {'of one each' if context.recipe.data.batches == 'by_store' else 'mixed'}"
    return str(store.path)


def _mixture(context: Context, stages: list[StagePlan]) -> list[str]:
    """A line for every store of a mixture, what of an epoch is its, and the languages of the texts."""
    spans, visits = context.pairs.spans, stages[0].order.visits
    shares = [len(span) for span in spans] if visits is None else visits.counts.tolist()
    lines = [
        f"    {span.name}: {len(span):,} pairs, weight {span.weight:g}, {100 * share / sum(shares):.1f}% of an epoch"
        for span, share in zip(spans, shares, strict=True)
    ]
    told = [f"{name or 'not said'} {count:,}" for name, count in context.pairs.languages.most_common()]
    return lines + ([f"    languages: {', '.join(told)}"] if len(told) > 1 else [])


def _device(context: Context) -> str:
    count = context.world
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
    return f"{count} × {name}, weights {context.sharding.name}" if count > 1 else name


def attention_kernel(device: torch.device, precision: str) -> str:
    """Which of PyTorch's attention kernels the towers get, and why that one."""
    if device.type == "cuda":
        enabled = torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(device) >= (8, 0)
        if precision == "fp32":
            return "memory-efficient kernel of PyTorch's sdpa (flash attention computes in 16 bits, this run in fp32)"
        if not enabled:
            return "memory-efficient kernel of PyTorch's sdpa (flash attention needs compute capability 8.0 or more)"
        return (
            f"image tower: flash attention of PyTorch's sdpa ({precision}, no mask); text tower: its memory-efficient kernel "
            "(padded texts need a mask, which flash attention does not take)"
        )
    if device.type == "cpu":
        return "flash kernel for CPUs of PyTorch's sdpa (the only fused one there; takes masks)"
    return f"PyTorch's sdpa on {device.type} (one kernel there)"


def _stage(context: Context, model: DualEncoder, stage: StagePlan) -> list[str]:
    setting, order = stage.setting, stage.order
    lines = [f"  stage {stage.name}"]
    for tower in ("image", "text", "temperature"):
        entries = [entry for entry in stage.table if entry.tower == tower]
        trained = sum(map(trained_size, entries))
        every = sum(entry.parameter.numel() for entry in entries)
        rates = sorted({setting.learning_rate * entry.rate for entry in entries if entry.rate})
        said = (
            "frozen"
            if not rates
            else "rate " + " … ".join(f"{rate:.3g}" for rate in dict.fromkeys((rates[0], rates[-1])))
        )
        if any(entry.lora for entry in entries):
            said += f", as low-rank updates of rank {max(entry.lora.rank for entry in entries if entry.lora)}"
        lines.append(
            f"    {tower:<12} {trained:,} of {every:,} parameters train ({100 * trained / every:.0f}%), {said}"
        )
    lines.append(
        f"    {stage.total} steps = {stage.total / order.steps_per_epoch:.1f} epochs of {order.steps_per_epoch}, "
        f"global batch {setting.batch_size}"
        + (f" in micro-batches of {setting.micro_batch_size}" if setting.micro_batch_size else "")
        + f", validation every {stage.validate_every} steps"
    )
    if setting.until == "plateau":
        lines.append(
            f"    ends earlier when {setting.patience} validations in a row bring less than {setting.min_gain:g} points"
        )
    lines.append(f"    rate {curve(stage)}  warm-up {stage.curve.warmup} steps, then {setting.schedule}")
    lines.append(
        f"    {stage.objective.kind} objective{_whose(model, stage)}; other pairs with the same image or text: {setting.objective.positives} "
        f"({order.expected_repeats():.2f} expected per pair in a random batch, {order.repeats_per_batch():.2f} left per ordered batch)"
    )
    if stage.image_frozen:
        said = (
            f"computed once ({setting.views} view{'s' * (setting.views > 1)})"
            if stage.cached
            else "computed every step"
        )
        lines.append(f"    image tower frozen: its features are {said}")
    lines.append(f"    memory per device {estimate(context, stage, model)}")
    throughput = Throughput.of(context, stage, model)
    if throughput is not None:
        lines.append(f"    throughput   {throughput.foretold(stage.total * setting.batch_size)}")
    return lines


def _whose(model: DualEncoder, stage: StagePlan) -> str:
    """What is to be said of the loss beside its name."""
    if model.logit_bias is None:
        return ""
    if stage.objective.biased:
        own = "the model's own, " if stage.setting.objective.kind is None else ""
        return f" ({own}with its temperature and bias as they are)"
    return " (a softmax does not see the model's logit_bias: it stays as it is, and does not train)"


def curve(stage: StagePlan, width: int = 32) -> str:
    """The rate over the stage as one line of bars."""
    steps = [int(column * (stage.total - 1) / max(width - 1, 1)) for column in range(min(width, stage.total))]
    return "".join(BARS[min(7, int(stage.curve(step) * 7.999))] for step in steps)


def suggested_rate(batch_size: int) -> float:
    """Highest published rate for a batch of this size, interpolated in the logarithm of both below 1,024."""
    smallest, first = PUBLISHED_RATES[0], PUBLISHED_RATES[1]
    if batch_size >= first[0]:
        return max(rate for batch, rate in PUBLISHED_RATES if batch <= batch_size and batch >= first[0])
    share = torch.log(torch.tensor(batch_size / smallest[0])) / torch.log(torch.tensor(first[0] / smallest[0]))
    return smallest[1] * (first[1] / smallest[1]) ** max(share.item(), 0.0)


def warnings(context: Context, model: DualEncoder, stages: list[StagePlan]) -> list[str]:
    """What is likely to go wrong, each with a suggestion."""
    found = []
    for stage in stages:
        setting, name = stage.setting, stage.name
        pretrained_image = not stage.image_frozen and not any(part == "image_tower" for part in context.new_parts)
        advised = suggested_rate(setting.batch_size)
        if pretrained_image and setting.learning_rate > 2 * advised:
            found.append(
                f"{name}: rate {setting.learning_rate:g} is high for a global batch of {setting.batch_size} and may destroy what "
                f"the model knows; published pairs of batch and rate suggest "
                f"about stages.{name}.learning_rate={advised:.1e}"
            )
        if setting.batch_size < 16:
            found.append(
                f"{name}: batch {setting.batch_size} leaves few negatives; give stages.{name}.batch_size=16 or more "
                f"(stages.{name}.micro_batch_size=auto splits it if it does not fit)"
            )
        if stage.total < 50:
            found.append(f"{name}: only {stage.total} steps; {_longer(stage)}")
        if context.device.type == "cpu" and (short := estimate(context, stage, model).shortage(name)):
            found.append(short)
    leak = _leak(context)
    if leak:
        found.append(leak)
    return found


def _longer(stage: StagePlan) -> str:
    """What makes 100 steps of it, to type."""
    setting, key = stage.setting, f"stages.{stage.name}"
    if setting.epochs is None:
        return f"give more, {key}.steps=100"
    return f"give more epochs, {key}.epochs={-(-100 // stage.order.steps_per_epoch)}, or a smaller {key}.batch_size=N"


def _leak(context: Context) -> str | None:
    """Images of the validation split that are in the training split too, by id and by content."""
    for trained in stores_of(context.train_store):
        train = set(trained.image_ids)
        for name, store in context.valid_stores.items():
            if store.path.resolve() == trained.path.resolve():
                return f"{name} is the training split itself: recall will look far better than it is"
            shared = [image_id for image_id in store.image_ids if image_id in train]
            same = [i for i in shared[:500] if store.image(i) == trained.image(i)]
            if same:
                return f"{name} shares images with the training split (e.g. id {same[0]!r}): recall will look better than it is"
    return None


def refuse_warnings(context: Context, model: DualEncoder, stages: list[StagePlan]) -> None:
    """With --strict a warning is an error."""
    found = warnings(context, model, stages)
    if found:
        raise RequestError("--strict: the plan has warnings:\n  " + "\n  ".join(found))
