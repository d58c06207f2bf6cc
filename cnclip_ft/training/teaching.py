"""A stage that teaches: the text tower learns to say of sentences in several languages what a frozen teacher says of one of them.

Parallel text alone, no pictures (Multilingual-CLIP; AltCLIP, arXiv 2211.06679, stage one). For row i in language l, with the student's
unit feature s and the teacher's t: ``meet · mean ‖s_il − t_i‖² + between · InfoNCE(s_i·first, s_il)``, the second over the rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cnclip_ft.collectives import sum_over_ranks, world_size
from cnclip_ft.data.parallel import ParallelTable, build_parallel_table
from cnclip_ft.features.teacher import Teacher
from cnclip_ft.recipe_stage import Teach
from cnclip_ft.runtime import to_device
from cnclip_ft.training.context import Context
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, LossOutput
from data_tools.errors import RequestError
from data_tools.parallel import ParallelTexts, read_parallel
from data_tools.store import open_store
from data_tools.words import Said


@dataclass(frozen=True)
class Teaching:
    """What a teaching stage learns from: rows that have all `languages`, the first of them the one the others are compared with."""

    teacher: Teacher
    texts: ParallelTexts
    languages: tuple[str, ...]
    heard: str  # the language the teacher reads
    table: ParallelTable
    passed_over: int  # rows that lack a language

    def heard_texts(self) -> list[str]:
        return [row[self.heard] for row in self.texts.rows]

    def describe(self, dim: int, setting: Teach) -> list[str]:
        """Lines of the plan."""
        lacking = Said(
            "; {count:,} rows lack one of them and are passed over",
            "；{count:,} 行缺少其中之一，略过",
            count=self.passed_over,
        )
        mapped = Said(
            ", mapped to the student's {dim} without weights of its own",
            "，映射到学生的 {dim} 维，映射没有自己的权重",
            dim=dim,
        )
        return [
            Said(
                "    teaches {languages} from {rows:,} rows of parallel text ({place}){lacking}",
                "    用 {rows:,} 行平行文本（{place}）教 {languages}{lacking}",
                languages=", ".join(self.languages),
                rows=len(self.table),
                place=self.texts.store.path,
                lacking=lacking if self.passed_over else "",
            ),
            Said(
                "    teacher {place} reads {heard}: its {width} numbers a sentence are computed once{mapped}",
                "    老师 {place} 读 {heard}：每句 {width} 个数，只算一次{mapped}",
                place=self.teacher.place,
                heard=self.heard,
                width=self.teacher.width,
                mapped=mapped if self.teacher.width != dim else "",
            ),
            Said(
                "    {meet:g} · squared distance to the teacher + {between:g} · InfoNCE between the languages",
                "    {meet:g} · 与老师的平方距离 + {between:g} · 语言之间的 InfoNCE",
                meet=setting.meet,
                between=setting.between,
            ),
        ]


def plan_teaching(context: Context, name: str, setting: Teach) -> Teaching:
    """Open teacher and text, and see that they can be used.

    Raises:
        RequestError: naming the setting.
    """
    key = f"stages.{name}.teach"
    try:
        found = read_parallel(open_store(setting.texts))
    except RequestError as error:
        raise RequestError(f"{key}.texts: {error}") from None
    known = ", ".join(found.languages)
    for language in dict.fromkeys([setting.language, *(setting.languages or ())]):
        if language not in found.languages:
            raise RequestError(
                f"{key}: no row of {setting.texts} is in {language} (there are {known}). Give {key}.language=… for what the teacher reads, "
                f"{key}.languages=[…] for what is learnt, or import the language too: cnclip-ft data import parallel FILE …"
            )
    languages = tuple(setting.languages or found.languages)
    first = setting.language if setting.language in languages else languages[0]
    languages = (first, *(language for language in languages if language != first))
    if len(languages) < 2 and setting.between:
        raise RequestError(
            f"{key}.between compares languages, and {first} alone is learnt: {key}.between=0, or name another with {key}.languages=[{first}, …]"
        )
    needed = {setting.language, *languages}
    rows = [row for row in found.rows if needed <= row.keys()]
    if not rows:
        raise RequestError(
            f"{key}: no row of {setting.texts} has all of {', '.join(sorted(needed))}. Choose fewer with {key}.languages=[…]"
        )
    texts = ParallelTexts(found.store, rows)
    return Teaching(
        Teacher.look(setting.teacher, f"{key}.teacher", context.recipe.model.source, context.trust_import),
        texts,
        languages,
        setting.language,
        build_parallel_table(texts, languages, context.tokenizer),
        len(found.rows) - len(rows),
    )


@dataclass(frozen=True)
class TeachObjective(ContrastiveObjective):
    """The loss (module docstring). The temperature of the InfoNCE is the model's as it is: it is for pictures, and does not learn here."""

    meet: float = 1.0
    between: float = 0.1

    kind: ClassVar[str] = "teach"
    biased: ClassVar[bool] = False

    def __call__(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        logit_scale: torch.Tensor,
        image_keys: torch.Tensor | None = None,
        text_keys: torch.Tensor | None = None,
        logit_bias: torch.Tensor | None = None,
    ) -> LossOutput:
        """`images`: the student's unit ``[n, languages, dim]``; `texts`: the teacher's unit ``[n, dim]``; keys as for pairs.

        The accuracy is that of finding a row's other languages among all rows, or the teacher's feature where there is one language.
        """
        with torch.autocast(images.device.type, enabled=False):
            student, teacher = images, texts.to(images.device, images.dtype)
            own = (student - teacher[:, None]).square().sum(-1).mean()
            everywhere = own.detach().clone()
            sum_over_ranks(everywhere)
            loss = self.meet * (own + (everywhere / world_size() - own.detach()))
            others = [student[:, number] for number in range(1, student.shape[1])] or [teacher]
            compare, scale = super().__call__, logit_scale.detach()
            compared = [compare(student[:, 0], other, scale, image_keys, text_keys) for other in others]
            accuracy = torch.stack([each.accuracy for each in compared]).mean()
            if self.between and student.shape[1] > 1:
                loss = loss + self.between * torch.stack([each.loss for each in compared]).mean()
        return LossOutput(loss, accuracy)


class TeachStep(GradientStep):
    """The gradient of a batch of rows: texts in all languages go through the text tower, the teacher's features stand still."""

    def _features(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.logit_scale.device
        ids, mask = (to_device(batch[name], device) for name in ("input_ids", "attention_mask"))
        with self.autocast():
            _, texts = self.model(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1))
        student = texts.unflatten(0, ids.shape[:2])
        return student, student.new_zeros(len(student), 0)  # nothing else has a gradient

    def _loss(self, images: torch.Tensor, texts: torch.Tensor, batch: dict[str, Any]) -> LossOutput:
        return self.objective(images, batch["teacher"], self.model.logit_scale, batch["image_keys"], batch["text_keys"])
