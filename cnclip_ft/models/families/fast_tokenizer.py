"""Any tokenizer of a transformers folder: its ``tokenizer.json``, and what the family adds to it (padding, mask, longest text)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers
from tokenizers.normalizers import Normalizer

from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.families.cleaning import Clean, check_installed, clean_text, whole_characters
from cnclip_ft.models.schema import Part
from data_tools.errors import RequestError
from data_tools.regular import regular

Padding = Literal["longest", "max_length"]
Mask = Literal["tokens", "to_end", "all"]
_LONGEST = 256 << 20  # bytes of a tokenizer.json
_SETTINGS = "tokenizer_config.json"


class Rules(Part):
    """What a family says of its texts beside the files.

    `mask`: what is attended to. ``tokens``: all but padding; ``to_end``: up to the first end token, where padding has the id
    of a real token (CLIP); ``all``: padding too (SigLIP). `clean`: what is done to a text before (`families.cleaning`).
    """

    kind: Literal["transformers"]
    padding: Padding
    mask: Mask
    pad_id: Annotated[int, Field(ge=0)]
    end_id: Annotated[int, Field(ge=0)] | None = None
    clean: Clean | None = None


class FastTokenizer(Tokenizer):
    """A tokenizer of the library tokenizers with the rules of its family.

    Args:
        backend: texts → ids, special tokens included.
        settings: content of ``tokenizer_config.json``, for transformers; written again with the model.
    """

    kind, schema = "transformers", Rules
    preparation = "as the tokenizer.json beside the weights says, cut to the context length"
    whole_vocabulary = False

    def __init__(self, backend: Backend, settings: dict[str, Any], rules: Rules, context_length: int) -> None:
        special = backend.num_special_tokens_to_add(False)
        if context_length <= special:
            raise RequestError(
                f"context_length is {context_length}; a text needs at least {special + 1} tokens, {special} of them special"
            )
        if rules.clean is not None:
            check_installed(rules.clean)
        self._backend, self.settings, self.rules, self.context_length = backend, settings, rules, context_length
        self.padding = rules.padding
        backend.no_padding()
        backend.enable_truncation(context_length, direction=settings.get("truncation_side") or "right")

    @classmethod
    def of_folder(
        cls,
        folder: Path,
        context_length: int,
        *,
        padding: Padding = "longest",
        mask: Mask = "tokens",
        clean: Clean | None = None,
    ) -> FastTokenizer:
        """The tokenizer that transformers makes of a folder, with the rules of its family.

        Raises:
            RequestError: there is none, it is code of the folder, or it is not of the library tokenizers.
        """
        from transformers import AutoTokenizer

        _refuse_code(folder / _SETTINGS)
        try:
            # False, not None: None asks the terminal whether code of the folder may run.
            theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # noqa: BLE001 - transformers raises many kinds on folders that are incomplete
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise RequestError(
                f"{folder}: its tokenizer cannot be read ({reason[:200]}). Expected tokenizer.json and tokenizer_config.json "
                "beside the weights; fetch the folder whole"
            ) from None
        backend = getattr(theirs, "backend_tokenizer", None)
        if backend is None:
            raise RequestError(
                f"{folder}: its {type(theirs).__name__} has no tokenizer.json. Write one with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
            )
        end, pad = theirs.eos_token_id, theirs.pad_token_id
        if mask == "to_end" and end is None:
            raise RequestError(f"{folder / _SETTINGS}: no eos_token in it, and the text tower reads its texts there")
        if pad is None:
            pad = 0 if end is None else end  # decoders are published without
        with TemporaryDirectory() as place:
            theirs.save_pretrained(place)
            settings = json.loads(Path(place, _SETTINGS).read_text(encoding="utf-8"))
        backend = Backend.from_str(backend.to_str())  # transformers keeps its own state on the one it has
        backend.no_padding()
        if mask == "tokens" and pad in backend.encode("a").ids:  # decoders may end a text in what fills it up
            mask, end = "to_end", pad
        return cls(
            backend,
            settings,
            Rules(kind="transformers", padding=padding, mask=mask, pad_id=pad, end_id=end, clean=clean),
            context_length,
        )

    def normalise_before(self, step: Normalizer) -> None:
        """Let a text pass `step` before all that the folder's own rules do to it."""
        own = self._backend.normalizer
        self._backend.normalizer = normalizers.Sequence([step, *([] if own is None else [own])])

    @property
    def ends_in(self) -> int | None:
        """The end token, where every text is given one."""
        end = self.rules.end_id
        return end if self.encode(["a"])[0][-1] == end else None

    @property
    def name(self) -> str:
        return str(self.settings.get("tokenizer_class") or "tokenizer.json")

    @cached_property
    def vocab_size(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        return self.rules.pad_id

    def prepare(self, text: str) -> str:
        text = self._cleaned([text])[0]
        normaliser = self._backend.normalizer
        return text if normaliser is None else normaliser.normalize_str(text)

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        kind, whole = self.rules.clean, map(whole_characters, texts)
        return list(whole) if kind is None else [clean_text(text, kind) for text in whole]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(self._cleaned(texts))]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(found.ids) for found in self._uncut.encode_batch_fast(self._cleaned(texts))]

    @cached_property
    def _uncut(self) -> Backend:
        backend = deepcopy(self._backend)
        backend.no_truncation()
        return backend

    def mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.rules.mask == "all":
            return torch.ones_like(input_ids)
        if self.rules.mask == "tokens":
            return input_ids.ne(self.rules.pad_id).to(input_ids.dtype)
        end = input_ids.eq(self.rules.end_id or 0).to(input_ids.dtype)
        return (end.cumsum(1) - end == 0).to(input_ids.dtype)

    def with_context_length(self, context_length: int) -> FastTokenizer:
        return FastTokenizer(deepcopy(self._backend), self.settings, self.rules, context_length)

    @cached_property
    def _whole(self) -> str:
        """``tokenizer.json``."""
        return self._uncut.to_str(pretty=True)

    def fingerprint(self) -> str:
        said = f"{self.rules.model_dump_json()} {self.settings.get('truncation_side')} {self._whole}"
        return hashlib.sha256(said.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return self.rules.model_dump()

    @classmethod
    def read(cls, place: Path | None, context_length: int, described: dict[str, Any]) -> FastTokenizer:
        if place is None:
            raise RequestError("the tokenizer of this checkpoint is missing: tokenizer.json")
        file, settings = place / "tokenizer.json", place / _SETTINGS
        try:
            regular(file, _LONGEST)
            backend = Backend.from_file(str(file))
            said = json.loads(settings.read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself on damaged files
            raise RequestError(
                f"{place}: its tokenizer cannot be read ({error}); fetch tokenizer.json and {_SETTINGS} again"
            ) from None
        return cls(backend, said, Rules.model_validate(described), context_length)

    def save(self, folder: str | Path) -> None:
        said = self.settings | {"model_max_length": self.context_length}
        Path(folder, "tokenizer.json").write_text(self._whole + "\n", encoding="utf-8")
        Path(folder, _SETTINGS).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_code(file: Path) -> None:
    try:
        code = json.loads(file.read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return  # transformers says what is wrong with it
    if code:
        raise RequestError(
            f"{file}: names code of its own ({repr(code)[:80]}), which is never run. If tokenizer.json alone gives its author's "
            "tokens, take auto_map out of the file"
        )
