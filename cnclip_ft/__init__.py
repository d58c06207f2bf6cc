"""Two-stage fine-tuning of Chinese(-English) CLIP models.

``load(path)`` gives a model with `encode_images` and `encode_texts`; `train`, `evaluate` and `search` do what the commands do;
`clip` has the names of cn_clip. Importing the package imports no torch.
"""

# No import at all: `python -m cnclip_ft` runs this before it can take the working folder off the search path.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from cnclip_ft import clip
    from cnclip_ft.calls import evaluate, search, train
    from cnclip_ft.models.checkpoints import load
    from cnclip_ft.models.families.chinese_clip.catalog import available_models

__version__ = "0.1.0"
__all__ = ["available_models", "clip", "evaluate", "load", "search", "train"]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'cnclip_ft' has no attribute {name!r}")
    from data_tools.circles import no_search_for_circles

    with no_search_for_circles():  # torch and transformers are three thousand modules
        if name == "available_models":
            return import_module("cnclip_ft.models.families.chinese_clip.catalog").available_models
        if name == "load":
            return import_module("cnclip_ft.models.checkpoints").load
        if name == "clip":
            return import_module("cnclip_ft.clip")
        return getattr(import_module("cnclip_ft.calls"), name)


def __dir__() -> list[str]:
    return sorted(__all__ + ["__doc__", "__version__"])
