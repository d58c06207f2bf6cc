"""One stage: freeze what the table says, then step, log, judge and keep the best."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cnclip_ft.collectives import sum_numbers
from cnclip_ft.data.augment import augment
from cnclip_ft.data.batching import StageSampler, make_loader
from cnclip_ft.data.pairs import PairDataset
from cnclip_ft.features.frozen_trunk import FeatureCache
from cnclip_ft.training.averaging import MovingAverage
from cnclip_ft.training.fit import micro_batch_size, out_of_memory
from cnclip_ft.training.journal import Meter, duration
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.lora import add_lora, remove_lora
from cnclip_ft.training.optimizer import apply_table, build_optimizer, give_bias
from cnclip_ft.training.run_state import seed_step
from cnclip_ft.training.selection import Selection
from cnclip_ft.training.stage_plan import MOST_STEPS, StagePlan, make_objective
from cnclip_ft.training.stop import Stopped
from data_tools.errors import UserError

if TYPE_CHECKING:
    from cnclip_ft.training.run import Run


class StageRun:
    """A stage of a run: made (and its settings checked) when it begins, then `train` until its last step.

    Reads straight down: what trains → objective, optimizer, rate curve → data → the loop.
    """

    def __init__(self, run: Run, plan: StagePlan) -> None:
        self.run, self.plan, self.number, self.name, self.stage = run, plan, plan.number, plan.name, plan.setting
        self.model = run.model
        self.total, self.validate_every = plan.total, plan.validate_every
        self.step, self.skipped, self.average = 0, 0, None
        self.unjudged = False  # a validation is due for the weights as they are: it failed
        self.saved: int | None = None  # step of the newest state
        self.selection = Selection(self)

    # ---- before the first step -------------------------------------------------------------------------------

    def prepare(self, state: dict[str, Any] | None = None) -> None:
        """Freeze, build the optimizer and the cache; with `state`, continue where it was written."""
        run, stage, device = self.run, self.stage, self.run.device
        self.objective = make_objective(stage)
        if state is None:
            give_bias(self.model, self.objective)
            self.selection.keep_start()
        else:
            self.step = state["step"]
            if "logit_bias" in state["model"]:
                self.model.logit_bias = nn.Parameter(state["model"]["logit_bias"].to(device))
        # What is drawn for new layers depends on nothing that came before, and is the same on every device.
        seed_step(run.recipe.seed, self.number, MOST_STEPS + 1, 0)
        self.table = add_lora(self.model, list(self.plan.table))
        self._find_parameters()
        self.model.to(device)
        if state is not None:
            self.model.load_state_dict(state["model"])  # before the cache, which is keyed by the tower's weights
        apply_table(self.model, self.table)
        self.model.set_gradient_checkpointing(**self.plan.checkpointing)
        self._share_statistics()
        self._set_mode()
        self.cache = self._build_cache() if self.plan.cached else None
        self._place()
        self.optimizer = build_optimizer(self.table, stage, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.average = MovingAverage(self.table, stage.ema) if stage.ema else None
        self.gradient = GradientStep(
            self.model, self.objective,
            micro_batch_size=micro_batch_size(run.context, self.plan, self.model, self._trained()), autocast=run.context.autocast,
            backward=lambda loss: self.scaler.scale(loss).backward(),
            augment=lambda pixels: augment(pixels, stage.augment), sharding=run.sharding,
        )  # fmt: skip
        if state is not None:
            self._restore(state)

    def _place(self) -> None:
        """From here on `self.model` is the one that trains; the run's own is what is judged and kept."""
        run = self.run
        self.model = run.sharding.place(run.model)
        if self.model is not run.model:
            run.context.compile(self.model)
            self._find_parameters()

    def _find_parameters(self) -> None:
        """The table's parameters are those of the model that trains, which may be another than was planned with."""
        placed = dict(self.model.named_parameters())
        self.table = [replace(e, parameter=placed.get(e.name, e.parameter)) for e in self.table]

    def _set_mode(self) -> None:
        self.model.train()
        for name, tower in (("image", self.model.image_tower), ("text", self.model.text_tower)):
            if not any(e.rate for e in self.table if e.tower == name and "_projection" not in e.name):
                tower.eval()  # no dropout, and batch-norm statistics stay
            elif self.stage.batch_norm == "frozen":
                for module in tower.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()

    def _set_patch_dropout(self) -> None:
        tower = self.model.image_tower
        wanted = self.stage.patch_dropout if self.step < self.total - self.stage.unmasked_steps else 0.0
        if hasattr(tower, "patch_dropout"):
            tower.patch_dropout = wanted

    def _share_statistics(self) -> None:
        """Batch-norm statistics over all devices, as one device with the whole batch would have (CUDA only)."""
        run = self.run
        if run.accelerator.num_processes > 1 and run.device.type == "cuda" and not self.plan.image_frozen:
            self.model.image_tower = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.image_tower)

    def _trained(self) -> list[nn.Parameter]:
        """Parameters whose moments AdamW has yet to make."""
        return [entry.parameter for entry in self.table if entry.rate and not self.optimizer.state]

    def _build_cache(self) -> FeatureCache:
        run = self.run
        cache = FeatureCache(
            run.cache_folder, self.model, run.train_store, views=self.stage.views, augment=self.stage.augment,
            precision=run.precision, seed=run.recipe.seed, reduced=run.recipe.data.reduced_jpegs,
        )  # fmt: skip
        run.journal.say(
            f"Image features of the frozen tower: {'read from' if cache.complete else 'computed once into'} {cache.folder}"
        )
        cache.build(
            run.accelerator, run.context.autocast, workers=run.workers, max_damaged=run.recipe.data.max_damaged_images
        )
        if cache.damaged:
            run.journal.say(f"{len(cache.damaged)} images cannot be decoded; their pairs are passed over")
            self.plan = self.plan.without_images(run.context, cache.damaged)
        return cache

    # ---- the loop ---------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.step >= self.total or self.selection.ended is not None

    def train(self) -> None:
        """Steps until the stage is over; raises `Stopped` when asked to stop."""
        run, meter = self.run, Meter(self.run.device)
        if self.unjudged:
            self._judge()
        batches = iter(self._loader()) if not self.finished else None
        foretold = False
        with run.journal.bar(self.name, self.step, self.total) as advance:
            while not self.finished:
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                    self._count_faults(batch)
                except Exception:
                    self._save_what_was_done()
                    raise
                waited = time.perf_counter() - asked
                out = self._one_step(batch)
                self.step += 1
                advance()
                if out is not None:
                    meter.add(out.loss, out.accuracy, self.stage.batch_size, waited)
                if meter.steps and (self.step % run.recipe.log_every == 0 or self.step == self.total):
                    self._log(meter)
                    if not foretold and self.step < self.total:
                        foretold = self._foretell()
                began = time.perf_counter()
                judged = self.step % self.validate_every == 0 or self.step == self.total
                if judged:
                    self._judge()
                elif run.recipe.save_every and self.step % run.recipe.save_every == 0:
                    self.save()
                meter.pause(time.perf_counter() - began)
                if run.stop.asked(run.device) and not self.finished:
                    if self.saved != self.step:
                        self.save()
                    raise Stopped
        if self.selection.ended and self.step < self.total:
            run.journal.write(
                "ended", f"{self.name} ends at step {self.step} of {self.total}: {self.selection.ended}",
                stage=self.name, step=self.step, reason=self.selection.ended,
            )  # fmt: skip
        remove_lora(self.model)
        self.model = run.model
        self.selection.finish()

    def _judge(self) -> None:
        """Validate, and write the state; where validating fails, first the state of what was trained."""
        failure = self.selection.judge()
        self.unjudged = bool(sum_numbers(float(failure is not None), self.run.device))
        if self.unjudged:
            self._save_what_was_done(all_devices=True)
            raise failure or UserError("the validation failed on the first device, which says why")
        self.save()

    def _save_what_was_done(self, all_devices: bool = False) -> None:
        """Before a fault that comes between two steps ends the run. Other devices must be at the same place."""
        if self.saved == self.step or (self.run.accelerator.num_processes > 1 and not all_devices):
            return
        try:
            self.save()
            self.run.states.wait()
        except UserError as unsaved:
            self.run.journal.say(str(unsaved))

    def _one_step(self, batch: dict[str, Any]):
        run = self.run
        seed_step(run.recipe.seed, self.number, self.step, run.accelerator.process_index)
        self._set_patch_dropout()
        self.plan.curve.set(self.optimizer, self.step)
        if self.cache is not None:
            batch["trunk"] = self.cache.rows(batch["image_keys"], self.step // self.plan.order.steps_per_epoch)
        buffers = self._statistics()
        try:
            out = self.gradient(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise (self._out_of_memory(error) or error) from None
        if not self._is_number(out.loss, "loss", buffers):
            return None
        self.scaler.unscale_(self.optimizer)
        trained = [e.parameter for e in self.table if e.rate]
        norm = run.sharding.clip(trained, self.stage.gradient_clip or float("inf"))
        if not self.scaler.is_enabled():  # with loss scaling an overflow is expected now and then, and the step skipped
            if not self._is_number(norm, "gradient", buffers):
                return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_logit_scale_()
        if self.average is not None:
            self.average.update()
        return out

    def _out_of_memory(self, error: BaseException) -> UserError | None:
        at_once = self.gradient.micro_batch_size or self.plan.share
        return out_of_memory(
            self.run.context, self.plan, self.model, error, step=self.step + 1, at_once=at_once, to_come=self._trained()
        )

    def _statistics(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batch-norm statistics and copies of them, where a bad step may be skipped: its forward has moved them."""
        if not self.stage.skip_bad_steps:
            return []
        return [(buffer, buffer.clone()) for buffer in self.model.buffers() if buffer.is_floating_point()]

    def _is_number(self, value: torch.Tensor, what: str, buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Whether the step may reach the weights. False skips it; raises when no more may be skipped."""
        if torch.isfinite(value):
            return True
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        self.skipped += 1
        if self.skipped <= self.stage.skip_bad_steps:
            self.run.journal.write(
                "skipped", f"{self.name} {self.step + 1}/{self.total} | the {what} is {value.item()}: step skipped "
                f"({self.skipped} of at most {self.stage.skip_bad_steps})", stage=self.name, step=self.step + 1,
            )  # fmt: skip
            return False
        raise UserError(
            f"stage {self.name}, step {self.step + 1}: the {what} is {value.item()}. Training stopped before it reached the "
            f"weights. stages.{self.name}.skip_bad_steps=N, also with --continue, leaves out single steps (now "
            f"{self.stage.skip_bad_steps}). Otherwise start a new run, from the checkpoints in {self.run.folder} or as before. "
            f"Lower the learning rate (now {self.stage.learning_rate:g}), lengthen the warm-up, set gradient_clip: 1.0, or use "
            "precision: fp32"
        )

    def _loader(self):
        run = self.run
        preprocessing = None if self.cache is not None else self.model.image_tower.preprocessing
        dataset = PairDataset(run.train_store, run.context.pairs, preprocessing, run.recipe.data.reduced_jpegs)
        sampler = StageSampler(
            self.plan.order, self.step, self.total, run.accelerator.process_index, run.accelerator.num_processes
        )
        # Without pictures to decode, worker processes would cost more than they bring.
        workers = 0 if self.cache is not None else run.workers
        return make_loader(dataset, sampler, run.tokenizer, workers, pin=run.device.type == "cuda")

    def _count_faults(self, batch: dict[str, Any]) -> None:
        run = self.run
        for fault in batch["faults"]:
            run.journal.write(
                "damaged", f"damaged image, replaced by another pair: {fault}", stage=self.name, fault=fault
            )
        damaged = run.damaged + len(batch["faults"])
        if damaged > run.recipe.data.max_damaged_images:
            raise UserError(
                f"{damaged} damaged images, more than data.max_damaged_images allows "
                f"({run.recipe.data.max_damaged_images}). Run `cnclip-ft data check {run.train_store.path}`, or raise the limit: "
                f"it may be raised for --continue too, data.max_damaged_images=N"
            )
        run.damaged = damaged

    def _log(self, meter: Meter) -> None:
        summary, run = meter.summary(), self.run
        scale, bias = self.model.logit_scale.exp().item(), self.model.logit_bias
        told = {} if bias is None else {"logit_bias": bias.item()}
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        left = (self.total - self.step) * summary["seconds_per_step"]
        memory = f" | {summary['memory_gib']:.1f} GiB" if "memory_gib" in summary else ""
        run.journal.write(
            "train",
            f"{self.name} {self.step}/{self.total} | loss {summary['loss']:.4f} | in-batch {100 * summary['accuracy']:.1f}% | "
            f"scale {scale:.1f} | {''.join(f'bias {b:.1f} | ' for b in told.values())}rate {rate:.2e} | {summary['pairs_per_second']:.0f} pairs/s | "
            f"data wait {100 * summary['data_wait']:.0f}%{memory} | {duration(left)} left",
            stage=self.name, step=self.step, logit_scale=scale, rate=rate, seconds_left=left, **told, **summary,
        )  # fmt: skip
        self.seconds_left = left
        meter.reset()

    def _foretell(self) -> bool:
        """Say once how long the stage will take, now that its first steps are timed; validations are added."""
        count = -(-self.total // self.validate_every) - self.step // self.validate_every
        each = self.run.judge_seconds or 0.0
        self.run.journal.say(
            f"{self.name}: about {duration(self.seconds_left + count * each)} to go ({duration(self.seconds_left)} of steps, "
            f"{count} validation{'s' * (count != 1)} of {duration(each)})"
        )
        return True

    # ---- state ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state to continue from; training goes on while the file is written."""
        run = self.run
        state = run.sharding.full({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        })  # fmt: skip
        if run.accelerator.is_main_process:
            run.states.save(self.number * (MOST_STEPS + 1) + self.step, run.state() | state | {
                "stage": self.number, "step": self.step, "skipped": self.skipped, "selection": self.selection.state_dict(),
                "unjudged": self.unjudged,
            })  # fmt: skip
        self.saved = self.step
        run.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any]) -> None:
        placed = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        self.optimizer.load_state_dict(self.run.sharding.share(state["optimizer"], {"state": placed}))
        if self.scaler.is_enabled() and state["scaler"]:  # on another kind of device the precision may be another
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(self.run.sharding.share(state["average"], self.average.state_dict()))
        self.selection.load_state_dict(state["selection"])
        self.skipped, self.unjudged, self.saved = state["skipped"], state.get("unjudged", False), self.step
