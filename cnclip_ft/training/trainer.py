"""The weights of a stage while it trains, with all that moves them: optimizer, loss scaling, average, gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from cnclip_ft.data.augment import augment
from cnclip_ft.data.batching import StageSampler, make_loader
from cnclip_ft.data.device_decoding import OnDevice, for_device
from cnclip_ft.data.pairs import PairDataset, fixed_lengths
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.training.averaging import MovingAverage
from cnclip_ft.training.compiling import compile_towers
from cnclip_ft.training.context import Context
from cnclip_ft.training.distilling import DistillStep
from cnclip_ft.training.fit import micro_batch_size, out_of_memory
from cnclip_ft.training.fp8 import EightBits
from cnclip_ft.training.grounding import GroundStep, as_it_was, give_heads, heads_of_state
from cnclip_ft.training.large_batch import TEXT_FEATURES, GradientStep
from cnclip_ft.training.lora import add_lora, merged, remove_lora
from cnclip_ft.training.loss import LossOutput
from cnclip_ft.training.memory import trunk_waits
from cnclip_ft.training.norms import Norms
from cnclip_ft.training.optimizer import Entry, apply_entries, build_optimizer, give_bias
from cnclip_ft.training.outcome import Outcome, UnderWay
from cnclip_ft.training.prepared import prepare
from cnclip_ft.training.run_state import seed_step
from cnclip_ft.training.sizing import Sizing
from cnclip_ft.training.stage_plan import MOST_STEPS, StagePlan, trunk_trains
from cnclip_ft.training.stop import StopRequest
from cnclip_ft.training.teaching import TeachStep
from data_tools.errors import UserError


class Trainer:
    """Takes the steps of a stage. Reads straight down: what trains → frozen features → placing → optimizer → gradient.

    Args:
        whole: the run's model, with the weights the stage begins with. It is what is judged and kept (`judged`); `model`
            is the one that trains: the same, or spread over the devices.
        state: of a run that goes on in this stage.
        stop: asked while frozen features are computed.

    Raises:
        Stopped: so asked; what is computed stays.

    `step` counts the steps done, `skipped` those that were left out; `plan` is without the images that cannot be read.

    The CPU does not wait for the device: what came of a step is read when the next one is under way (`settle`). A step whose loss
    or gradient is no number is left out by the device itself.
    """

    def __init__(
        self,
        context: Context,
        plan: StagePlan,
        whole: DualEncoder,
        state: dict[str, Any] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.context, self.plan, self.whole, setting = context, plan, whole, plan.setting
        self.step: int = state["step"] if state is not None else 0
        self.skipped: int = state["skipped"] if state is not None else 0
        self.settled: list[Outcome] = []
        self._looked_at_kept = False  # whether what is read from the disk was asked for NaN
        self._on_device: OnDevice | None = None
        self._under_way: UnderWay | None = None
        # What is drawn for new layers depends on nothing that came before, and is the same on every device.
        seed_step(context.recipe.seed, plan.number, MOST_STEPS + 1, 0)
        if state is None:
            give_bias(whole, plan.objective)
        elif "logit_bias" in state["model"]:
            whole.logit_bias = nn.Parameter(state["model"]["logit_bias"].to(context.device))
        if state is not None and whole.heads is None:
            whole.heads = heads_of_state(state["model"])
        give_heads(context, plan.number, plan.grounding, whole)
        whole.to(context.device)
        self.before = as_it_was(context, plan.number, plan.grounding, whole, state)
        entries = _bound(add_lora(whole, list(plan.entries)), whole)
        whole.to(context.device)
        if state is not None:
            whole.load_state_dict(state["model"])  # before the cache, which is keyed by the tower's weights
        apply_entries(whole, entries)
        whole.set_gradient_checkpointing(**plan.checkpointing)
        if shares_statistics(context, plan):
            whole.image_tower = nn.SyncBatchNorm.convert_sync_batchnorm(whole.image_tower)
        self._set_mode(entries)
        self.prepared = prepare(context, plan, whole, stop)
        self._pass_over(self.prepared.damaged)
        if trunk_waits(context, plan):
            whole.place_trunk(
                "cpu"
            )  # until the stage is over, or pictures have to be judged whose features are not kept
        self.model = context.sharding.place(whole)
        self.fp8 = EightBits(self.model) if context.recipe.fp8 else None
        if context.recipe.compile:
            compile_towers(self.model, context.recipe.compile)
        self.entries = _bound(entries, self.model)
        self.optimizer = build_optimizer(self.entries, setting, context.device)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=context.precision == "fp16")
        self.average = MovingAverage(self.entries, setting.ema) if setting.ema else None
        self.gradient = self._gradient_step()
        self.norms = Norms(self.entries, self.optimizer, context.sharding)
        if state is not None:
            self._restore(state)

    def _pass_over(self, damaged: set[int]) -> None:
        if damaged:
            self.context.journal.say(f"{len(damaged)} images cannot be decoded; their pairs are passed over")
            self.plan = self.plan.without_images(self.context, damaged)

    def _gradient_step(self) -> GradientStep:
        context, plan, setting, scaler = self.context, self.plan, self.plan.setting, self.scaler
        preprocessing = self.whole.image_tower.preprocessing
        kind: Callable[..., GradientStep] = GradientStep if plan.teaching is None else TeachStep
        if plan.grounding is not None:
            kind = partial(GroundStep, before=self.before, stay=plan.grounding.stay)
        if self.prepared.taught is not None and setting.distill is not None:
            kind = partial(DistillStep, taught=self.prepared.taught, setting=setting.distill)
        return kind(
            self.model,
            plan.objective,
            micro_batch_size=micro_batch_size(context, plan, self.model, self._without_moments()),
            autocast=context.autocast,
            backward=lambda loss: scaler.scale(loss).backward(),
            augment=lambda pixels: augment(pixels, setting.augment, preprocessing=preprocessing),
            sharding=context.sharding,
            lengths=self._lengths(),
            negatives=0.0 if setting.negatives is None else setting.negatives.weight,
        )

    def _set_mode(self, entries: list[Entry]) -> None:
        self.whole.train()
        for name, tower in (("image", self.whole.image_tower), ("text", self.whole.text_tower)):
            if not trunk_trains(entries, name):
                tower.eval()  # no dropout, and batch-norm statistics stay
            elif self.plan.setting.batch_norm == "frozen":
                for module in tower.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()

    def _without_moments(self) -> list[nn.Parameter]:
        """Parameters whose moments AdamW has yet to make."""
        return [entry.parameter for entry in self.entries if entry.rate and not self.optimizer.state]

    def _lengths(self) -> tuple[int, ...]:
        """What texts are padded to: few lengths where each is compiled for itself, else their own longest."""
        return fixed_lengths(self.context.tokenizer.context_length) if self.context.recipe.compile else ()

    @property
    def _without_pictures(self) -> bool:
        """Whether steps decode none: features are cached, or sentences are all there is."""
        return self.plan.cached or self.plan.teaching is not None

    # ---- a step -----------------------------------------------------------------------------------------------

    def batches(self, workers: int | None = None) -> Generator[dict[str, Any]]:
        """This device's shares of the batches from the next step on, decoded by `workers` processes (None: the run's)."""
        context, cached = self.context, self._without_pictures
        preprocessing = None if cached else self.model.image_tower.preprocessing
        decoder = None if cached else context.decoder
        dataset = PairDataset(
            context.train_store if self.plan.grounding is None else self.plan.grounding.store,
            context.pairs if self.plan.apart is None else self.plan.apart,
            preprocessing,
            context.recipe.data.reduced_jpegs,
            as_file=None if decoder is None else for_device,
        )
        self._on_device = None
        if decoder is not None and isinstance(preprocessing, SquarePicture):
            self._on_device = OnDevice(decoder, preprocessing, context.device, partial(dataset.sample, decoded=True))
        sampler = StageSampler(self.plan.order, self.step, self.plan.total, context.rank, context.world)
        # Without pictures to decode, worker processes would cost more than they bring.
        count = 0 if cached else context.workers if workers is None else workers
        pin = context.device.type == "cuda"
        loader = make_loader(
            dataset, sampler, context.tokenizer, count, pin=pin, lengths=self._lengths(), on_device=self._on_device
        )
        return iter(loader)

    def waited_for_decoding(self) -> float:
        """Seconds that the device stood still for pictures it decodes itself, of steps that it has done since this was asked."""
        return 0.0 if self._on_device is None else self._on_device.waited()

    def sizing(self) -> Sizing | None:
        """Measures how many workers the stage needs; None where that is given, or nothing is decoded by workers."""
        context = self.context
        if context.recipe.data.workers != "auto" or not context.workers or self._without_pictures:
            return None
        return Sizing(context.workers, context.most_workers, self.plan.share)

    def take(self, batch: dict[str, Any]) -> LossOutput:
        """One step. What came of the one before is in `settled` afterwards.

        Raises:
            UserError: memory ran out, or the loss or gradient of the step before is no number.
        """
        try:
            out = self._take(batch)
        except (MemoryError, RuntimeError) as error:
            self.settle()
            raise (self._out_of_memory(error) or error) from None
        self.step += 1
        return out

    def _take(self, batch: dict[str, Any]) -> LossOutput:
        context, plan, scaler = self.context, self.plan, self.scaler
        seed_step(context.recipe.seed, plan.number, self.step, context.rank)
        self._set_patch_dropout()
        plan.curve.set(self.optimizer, self.step)
        epoch, prepared = self.step // plan.order.steps_per_epoch, self.prepared
        if prepared.cache is not None:
            batch["trunk"] = prepared.cache.rows(batch["image_keys"], epoch)
        if prepared.teacher is not None:
            batch["teacher"] = prepared.teacher.rows(batch["image_keys"])
        if prepared.taught is not None:
            batch |= prepared.taught.rows(batch["pairs"], batch["image_keys"], epoch)
        if plan.further is not None or plan.negatives is not None or plan.texts_kept:
            batch |= self._texts(batch["pairs"].numpy())
        if plan.grounding is not None:
            drawn = plan.grounding.drawn(plan.order.seed, self.step)
            texts = plan.grounding.table.texts(drawn.numpy(), context.tokenizer, self._lengths())
            batch |= {"drawn": drawn, "drawn_ids": texts[0], "drawn_mask": texts[1]}
        buffers = self._statistics()
        out = self.gradient(batch)
        self.settle()
        scaler.unscale_(self.optimizer)
        told = plan.logged(self.step + 1, context.recipe.log_every)
        gradients = self.norms.gradients() if told else {}
        trained = [entry.parameter for entry in self.entries if entry.rate]
        norm = context.sharding.clip(trained, plan.setting.gradient_clip or float("inf"))
        usable = torch.isfinite(out.loss)
        if scaler.is_enabled():  # an overflow is expected now and then; the scaler leaves such steps out itself
            scaler.step(self.optimizer)
            scaler.update()
        else:
            usable = usable & torch.isfinite(norm)
            self._step_where(usable)
        for buffer, before in buffers:
            buffer.copy_(torch.where(usable, buffer, before))
        updates = self.norms.relative_updates() if told else {}
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_logit_scale_()
        numbers = {"loss": out.loss, "accuracy": out.accuracy, "norm": norm, "usable": usable}
        numbers |= {name: p for name, p in self.model.named_parameters(recurse=False)}  # temperature and bias
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self._under_way = UnderWay(
            self.step, rate, numbers, parts=self.gradient.parts, gradient_norms=gradients, relative_updates=updates
        )
        return out

    def _texts(self, pairs: np.ndarray) -> dict[str, Any]:
        """What takes the place of a batch's texts where a pair has several (captions of its picture, hard negatives), or their features
        are known."""
        plan, lengths, table = self.plan, self._lengths(), self.context.pairs
        captions = pairs[:, None] if plan.further is None else plan.further.draw(pairs, self.step)
        if self.prepared.texts is not None:
            keys = torch.from_numpy(table.text_keys[captions])
            return {TEXT_FEATURES: self.prepared.texts.rows(captions), "text_keys": keys}
        found = {}
        if plan.further is not None:
            found = table.batch_of_several(captions, self.context.tokenizer, lengths)
        if plan.negatives is not None:
            found |= plan.negatives.batch(captions, self.step, lengths)
        return found

    def _step_where(self, usable: torch.Tensor) -> None:
        """The optimizer's step, left out where `usable` is false: by the device itself, where the step is fused."""
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = (~usable).float()  # type: ignore[attr-defined] # as GradScaler says it
            self.optimizer.step()
        elif bool(usable):
            self.optimizer.step()

    def settle(self) -> None:
        """Wait for the step that is under way, and put what came of it into `settled`.

        Raises:
            UserError: its loss or gradient is no number, and no more such steps may be left out.
        """
        if self._under_way is None:
            return
        done, self._under_way = self._under_way(), None
        self.settled.append(done)
        if not done.usable:
            what = "gradient" if math.isfinite(done.loss) else "loss"
            self._leave_out(done.step, what, done.norm if what == "gradient" else done.loss)
        elif self.average is not None:
            self.average.update()

    def _set_patch_dropout(self) -> None:
        tower, setting = self.model.image_tower, self.plan.setting
        if tower.patch_dropout is not None:
            dropping = self.step < self.plan.total - setting.unmasked_steps
            tower.patch_dropout = setting.patch_dropout if dropping else 0.0

    def _out_of_memory(self, error: BaseException) -> UserError | None:
        return out_of_memory(
            self.context,
            self.plan,
            self.model,
            error,
            step=self.step + 1,
            at_once=self.gradient.micro_batch_size or self.plan.share,
            to_come=self._without_moments(),
        )

    def _statistics(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batch-norm statistics and copies of them, where a bad step may be skipped: its forward has moved them."""
        if not self.plan.setting.skip_bad_steps:
            return []
        return [(buffer, buffer.clone()) for buffer in self.model.buffers() if buffer.is_floating_point()]

    def _leave_out(self, step: int, what: str, value: float) -> None:
        """Count a step that the device left out; raises when no more may be, or features that it reads are damaged."""
        name, total, setting = self.plan.name, self.plan.total, self.plan.setting
        if not self._looked_at_kept:  # it is a whole read, of files that nobody changes
            self._looked_at_kept = True
            try:
                self.prepared.refuse_damage()
            except UserError as error:
                raise UserError(f"stage {name}, step {step}: the {what} is {value}. {error}") from None
        self.skipped += 1
        if self.skipped <= setting.skip_bad_steps:
            self.context.journal.write(
                "skipped",
                f"{name} {step}/{total} | the {what} is {value}: step skipped "
                f"({self.skipped} of at most {setting.skip_bad_steps})",
                stage=name,
                step=step,
            )
            return
        raise UserError(
            f"stage {name}, step {step}: the {what} is {value}. Training stopped before it reached the "
            f"weights. stages.{name}.skip_bad_steps={setting.skip_bad_steps + 3}, also with --continue, leaves out single steps (now "
            f"{setting.skip_bad_steps}). Otherwise start a new run, from the checkpoints in {self.context.folder} or as before, with a "
            f"lower rate, stages.{name}.learning_rate={setting.learning_rate / 4:.2g}, a longer warm-up, "
            f"stages.{name}.warmup_steps={max(2 * self.plan.curve.warmup, 1)}, stages.{name}.gradient_clip=1.0, or precision=fp32"
        )

    # ---- what leaves the stage --------------------------------------------------------------------------------

    @contextmanager
    def judged(self) -> Iterator[DualEncoder]:
        """The whole model with the weights that are judged and kept: averaged where there is an average, low-rank updates
        merged. All devices take part."""
        self.settle()
        weights = self.average.average if self.average is not None else {}
        plain = self.fp8.left() if self.fp8 is not None else nullcontext()
        with plain, self.context.sharding.gathered(self.model, self.whole, weights), merged(self.whole):
            yield self.whole

    def release(self) -> None:
        """After the last step: the whole model is plain again, on this device."""
        if self.fp8 is not None:
            self.fp8.leave()
        remove_lora(self.model)
        self.whole.to(self.context.device)

    def state_dict(self) -> dict[str, Any]:
        """What `state` takes, whole on the device that writes. All devices take part."""
        self.settle()
        tensors = self.context.sharding.full(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
            }
        )
        if self.before is not None:
            tensors["before"] = self.before.state_dict()
        return tensors | {"stage": self.plan.number, "step": self.step, "skipped": self.skipped}

    def _restore(self, state: dict[str, Any]) -> None:
        share = self.context.sharding.share
        placed = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        self.optimizer.load_state_dict(share(state["optimizer"], {"state": placed}))
        for (
            parameter,
            moments,
        ) in self.optimizer.state.items():  # fused kernels want them to lie in memory as the weights do
            for name, moment in moments.items():
                if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                    moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
        if self.scaler.is_enabled() and state["scaler"]:  # on another kind of device the precision may be another
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(share(state["average"], self.average.state_dict()))


def shares_statistics(context: Context, plan: StagePlan) -> bool:
    """Whether batch-norm statistics have to be exchanged to be those of the whole batch, as one device would have them."""
    return context.world > 1 and context.device.type == "cuda" and not plan.image_frozen


def _bound(entries: list[Entry], model: DualEncoder) -> list[Entry]:
    """The entries over the parameters of `model`, which may be another than was planned with."""
    placed = dict(model.named_parameters())
    return [replace(entry, parameter=placed.get(entry.name, entry.parameter)) for entry in entries]
