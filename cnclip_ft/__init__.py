"""Two-stage fine-tuning of Chinese(-English) CLIP models.

``load(path)`` gives a model with `encode_images` and `encode_texts`. Importing the package imports no torch.
"""

# No import at all: `python -m cnclip_ft` runs this before it can take the working folder off the search path.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from cnclip_ft.models.checkpoints import load

__version__ = "0.1.0"
__all__ = ["available_models", "load"]


def available_models() -> list[str]:
    """Names of the published sizes."""
    from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES

    return [name for name, architecture in ARCHITECTURES.items() if architecture.hub]


def __getattr__(name: str) -> object:
    if name == "load":
        from cnclip_ft.models.checkpoints import load

        return load
    raise AttributeError(f"module 'cnclip_ft' has no attribute {name!r}")
