"""A list of pictures with their classes judged by zero-shot accuracy: the class whose averaged prompts are nearest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnclip_ft.evaluation.kinds.contract import Evaluator
from cnclip_ft.recipe_section import Place
from cnclip_ft.recipe_valid import ValidSet
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.words import Said

if TYPE_CHECKING:
    from cnclip_ft.features.shared_encoder import SharedEncoder


class ZeroShot(ValidSet):
    """Judged along: are pictures nearest to the name of their class?"""

    zero_shot: Place
    """A folder with a sub-folder for each class, or a store whose texts are class names."""
    classes: Place
    """File of classes, as for `cnclip-ft classify`."""
    templates: Place = "zh"
    """Prompts: zh, en, clip, siglip, several joined (zh+en), none, or a file."""

    scores = ("accuracy", "top5", "mean_per_class")

    def places(self) -> list[str]:
        return [self.zero_shot, self.classes]  # `templates` may be a word

    def open(self, name: str, open_split: Callable[[str, str], Any]) -> ZeroShotAccuracy:
        return ZeroShotAccuracy(name, self)


@dataclass(frozen=True)
class ClassScores:
    """`top5` is None below six classes, where it would say nothing."""

    images: int
    classes: int
    accuracy: float
    top5: float | None
    mean_per_class: float

    def value(self, name: str) -> float | None:
        return self.as_dict()[name]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class ZeroShotAccuracy(Evaluator):
    """Accuracy over the labelled pictures of a folder or store: the class whose averaged prompts are nearest.

    Raises:
        RequestError: naming the setting that cannot be used.
    """

    tabled = ("accuracy",)

    def __init__(self, name: str, setting: ZeroShot) -> None:
        from cnclip_ft.evaluation.classes.zero_shot import labelled_images, read_classes, read_templates
        from cnclip_ft.features.sources import open_source

        key, self.place = f"data.valid.{name}", setting.zero_shot
        try:
            self.classes = read_classes(setting.classes)
        except UserError as error:
            raise RequestError(f"{key}.classes: {error}") from None
        try:
            self.templates = read_templates(setting.templates, f"{key}.templates")
        except DataFault as error:
            raise RequestError(f"{key}.templates: {error}") from None
        try:
            self.source = open_source(setting.zero_shot)
            if self.source.kind == "texts":
                raise RequestError(f"{setting.zero_shot} is a file of texts; give a folder of images or a store")
            ids, labels = labelled_images(Path(setting.zero_shot), self.source, self.classes)
        except UserError as error:
            raise RequestError(f"{key}.zero_shot: {error}") from None
        self.read = self.source.read
        self.ids = [image_id for image_id, label in zip(ids, labels, strict=True) if label is not None]
        self.labels = [label for label in labels if label is not None]
        if not self.ids:
            raise RequestError(
                f"{key}.zero_shot: no picture of {setting.zero_shot} has a label (a sub-folder named like its class, or a "
                "class name as its text), so there is nothing to judge by"
            )

    def judge(self, name: str, encoder: SharedEncoder) -> tuple[ClassScores, None]:
        from cnclip_ft.evaluation.classes.zero_shot import average_prompts, prompts, score_classes

        pictures = encoder.images(name, self.ids, self.read)
        words = average_prompts(encoder.texts(prompts(self.classes, self.templates)), self.classes, self.templates)
        found = score_classes(pictures @ words.T, self.labels, self.classes)
        assert found is not None  # there are labels
        return ClassScores(found.images, len(self.classes), found.top1, found.top5, found.mean_per_class), None

    def say(self, scores: ClassScores) -> list[str]:
        return [f"accuracy {scores.accuracy:.2f}"]

    def chance(self) -> dict[str, float | None]:
        return {"accuracy": 100 / len(self.classes)}

    def checksum(self) -> str:
        sha = hashlib.sha256(
            json.dumps([[[c.key, c.names] for c in self.classes], self.templates, self.labels]).encode()
        )
        if self.source.kind == "store":
            sha.update(self.source.checksum.encode())
        else:  # the source's own tells by dates, which a copy changes
            for image_id in self.ids:
                path = Path(self.place, image_id)
                try:
                    sha.update(hashlib.sha256(path.read_bytes()).digest())
                except OSError as error:
                    raise RequestError(f"{path} cannot be read ({error.strerror or error}). Bring it back.") from None
        return sha.hexdigest()

    def describe(self) -> str:
        return Said(
            "zero-shot, {images:,} images of {classes:,} classes ({place})",
            "零样本，{images:,} 张图片，{classes:,} 个类别（{place}）",
            images=len(self.ids),
            classes=len(self.classes),
            place=self.place,
        )
