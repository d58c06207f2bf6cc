"""Any tokenizer of a transformers folder: its ``tokenizer.json``, and what the family adds to it (padding, mask, longest text)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.families.cleaning import Clean, check_installed, clean_text, whole_characters
from cnclip_ft.models.known import refuse_code
from cnclip_ft.models.schema import Part
from data_tools.errors import RequestError
from data_tools.regular import regular

Padding = Literal["longest", "max_length"]
Mask = Literal["tokens", "to_end", "all"]
_LONGEST = 256 << 20  # bytes of a tokenizer.json
_SLOW = 1 << 20  # bytes of one that is not read before it is used
_HEAD = 1 << 20  # characters in which the special tokens stand
_SETTINGS = "tokenizer_config.json"


class Rules(Part):
    """What a family says of its texts beside the files.

    `mask`: what is attended to. ``tokens``: all but the padding behind; ``to_end``: up to the first end token, where padding has the id
    of a real token (CLIP); ``all``: padding too (SigLIP). `clean`: what is done to a text before (`families.cleaning`).
    """

    kind: Literal["transformers"]
    padding: Padding
    mask: Mask
    pad_id: Annotated[int, Field(ge=0)]
    end_id: Annotated[int, Field(ge=0)] | None = None
    clean: Clean | None = None


@dataclass(frozen=True)
class Deferred:
    """A tokenizer that is read when it is first used: a vocabulary of 250,000 takes a second, XLM-V's 900,000 six, and three
    times that by transformers; longer than the weights of a small model.

    Args:
        ours: `tokenizer.json` as it stands; else what transformers makes of the folder.
        lower_case: as for `FastTokenizer.of_folder`.
    """

    folder: Path
    ours: bool
    lower_case: bool = False

    def read(self) -> Backend:
        """
        Raises:
            RequestError: it is not readable.
        """
        if not self.ours:
            return _backend_of(_of_transformers(self.folder), self.folder, self.lower_case)
        try:
            file = self.folder / "tokenizer.json"
            regular(file, _LONGEST)
            return Backend.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself on damaged files
            raise RequestError(
                f"{self.folder}: its tokenizer cannot be read ({error}); fetch tokenizer.json and {_SETTINGS} again"
            ) from None


def _is_slow(folder: Path) -> bool:
    file = folder / "tokenizer.json"
    return file.is_file() and file.stat().st_size > _SLOW


def _told_beforehand(folder: Path, mask: Mask) -> tuple[dict[str, Any], int, int] | None:
    """Settings, pad and end of a large tokenizer without reading it; None where they are not plainly said."""
    file, special = folder / "tokenizer.json", folder / "special_tokens_map.json"
    if not _is_slow(folder) or not (folder / _SETTINGS).is_file():
        return None
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        more = json.loads(special.read_text(encoding="utf-8")) if special.is_file() else {}
        with open(file, encoding="utf-8") as text:
            head = text.read(_HEAD)
        added, _ = json.JSONDecoder().raw_decode(head, head.index("[", head.index('"added_tokens"')))
        numbers = {token["content"]: token["id"] for token in added}
        names = {key: settings.get(key, more.get(key)) for key in ("pad_token", "eos_token")}
        words = {key: name["content"] if isinstance(name, dict) else name for key, name in names.items()}
        pad, end = (numbers[word] for word in words.values())
        ends = head[head.index('"post_processor"') :]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    ends = ends[: ends.find('"decoder"')]
    if mask == "tokens" and (pad == end or f'"{words["pad_token"]}"' in ends):  # a text ends in what fills it up
        return None
    return more | settings, pad, end


def _of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        # False, not None: None asks the terminal whether code of the folder may run.
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds on folders that are incomplete
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RequestError(
            f"{folder}: its tokenizer cannot be read ({reason[:200]}). Expected tokenizer.json and tokenizer_config.json "
            "beside the weights; fetch the folder whole"
        ) from None


def _backend_of(theirs: Any, folder: Path, lower_case: bool) -> Backend:
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(
            f"{folder}: its {type(theirs).__name__} has no tokenizer.json. Write one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
        )
    backend = Backend.from_str(backend.to_str())  # transformers keeps its own state on the one it has
    if lower_case:
        own = backend.normalizer
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if own is None else [own])])
    return backend


class FastTokenizer(Tokenizer):
    """A tokenizer of the library tokenizers with the rules of its family.

    Args:
        backend: texts → ids, special tokens included.
        settings: content of ``tokenizer_config.json``, for transformers; written again with the model.
    """

    kind, schema = "transformers", Rules
    preparation = "as the tokenizer.json beside the weights says, cut to the context length"
    whole_vocabulary = False

    def __init__(
        self, backend: Backend | Deferred, settings: dict[str, Any], rules: Rules, context_length: int
    ) -> None:
        if rules.clean is not None:
            check_installed(rules.clean)
        self.settings, self.rules, self.context_length = settings, rules, context_length
        self.padding = rules.padding
        self._held, self._told = backend, (0, "")
        self._tell: Callable[[Tokenizer], None] | None = None
        if isinstance(backend, Backend):
            self._fit(backend)

    def _fit(self, backend: Backend) -> None:
        special = backend.num_special_tokens_to_add(False)
        if self.context_length <= special:
            raise RequestError(
                f"context_length is {self.context_length}; a text needs at least {special + 1} tokens, {special} of them special: data.context_length={special + 1} or more"
            )
        backend.no_padding()
        backend.enable_truncation(self.context_length, direction=self.settings.get("truncation_side") or "right")

    @property
    def _backend(self) -> Backend:
        """Texts → ids; read here where that was put off."""
        held = self._held
        if not isinstance(held, Deferred):
            return held
        backend = held.read()  # by each of several threads that come at once, which all get one that is ready
        self._fit(backend)
        self._held = backend
        if self._told[0]:
            try:
                super().check_rows(*self._told)
            except RequestError:
                self._held = held  # refused the next time too
                raise
        if self._tell is not None:
            self._tell(self)
        return backend

    def check_rows(self, rows: int, source: str) -> None:
        if isinstance(self._held, Deferred):
            self._told = rows, source
        else:
            super().check_rows(rows, source)

    def once_read(self, tell: Callable[[Tokenizer], None]) -> None:
        if isinstance(self._held, Deferred):
            self._tell = tell
        else:
            tell(self)

    @classmethod
    def of_folder(
        cls,
        folder: Path,
        context_length: int,
        *,
        padding: Padding = "longest",
        mask: Mask = "tokens",
        clean: Clean | None = None,
        lower_case: bool = False,
    ) -> FastTokenizer:
        """The tokenizer that transformers makes of a folder, with the rules of its family.

        Args:
            lower_case: make texts so before all else, which the folder forgets to.

        Raises:
            RequestError: there is none, it is code of the folder, or it is not of the library tokenizers.
        """
        refuse_code(folder)
        if not any(
            file.is_file() and (file.name == "tokenizer.json" or file.match("vocab.*") or file.suffix == ".model")
            for file in folder.iterdir()
        ):
            # Some classes would make a vocabulary of nothing. In the hub's cache files are links, which may lead nowhere.
            raise RequestError(f"{folder}: no tokenizer.json in it; fetch the folder whole, the tokenizer's files too")
        quick = _told_beforehand(folder, mask)
        if quick is not None:
            settings, pad, end = quick
            rules = Rules(kind="transformers", padding=padding, mask=mask, pad_id=pad, end_id=end, clean=clean)
            return cls(Deferred(folder, ours=False, lower_case=lower_case), settings, rules, context_length)
        theirs = _of_transformers(folder)
        backend = _backend_of(theirs, folder, lower_case)
        end, pad = theirs.eos_token_id, theirs.pad_token_id
        if mask == "to_end" and end is None:
            raise RequestError(f"{folder / _SETTINGS}: no eos_token in it, and the text tower reads its texts there")
        if pad is None:
            pad = 0 if end is None else end  # decoders are published without
        with TemporaryDirectory() as place:
            theirs.save_pretrained(place)
            settings = json.loads(Path(place, _SETTINGS).read_text(encoding="utf-8"))
        backend.no_padding()
        if mask == "tokens" and pad in backend.encode("a").ids:  # decoders may end a text in what fills it up
            mask, end = "to_end", pad
        return cls(
            backend,
            settings,
            Rules(kind="transformers", padding=padding, mask=mask, pad_id=pad, end_id=end, clean=clean),
            context_length,
        )

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
        return self._normal(self._cleaned([text])[0])

    def _normal(self, cleaned: str) -> str:
        normaliser = self._backend.normalizer
        return cleaned if normaliser is None else normaliser.normalize_str(cleaned)

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        kind, whole = self.rules.clean, map(whole_characters, texts)
        return list(whole) if kind is None else [clean_text(text, kind) for text in whole]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._ids(self._cleaned(texts))

    def prepared(self, texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
        cleaned = self._cleaned(texts)  # once: what mends broken characters is the slow part
        return [self._normal(text) for text in cleaned], self._ids(cleaned)

    def _ids(self, cleaned: list[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(cleaned)]

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
            # Up to the last that is no padding: a text may hold the pad's name. The first always: a text may hold nothing.
            real = input_ids.ne(self.rules.pad_id).to(input_ids.dtype)
            first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
            return ((real.sum(1, keepdim=True) - real.cumsum(1) + real > 0) | first).to(input_ids.dtype)
        end = input_ids.eq(self.rules.end_id or 0).to(input_ids.dtype)
        return (end.cumsum(1) - end == 0).to(input_ids.dtype)

    def with_context_length(self, context_length: int) -> FastTokenizer:
        held = self._held if isinstance(self._held, Deferred) else deepcopy(self._held)
        other = FastTokenizer(held, self.settings, self.rules, context_length)
        other._told, other._tell = self._told, self._tell
        return other

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
        settings = place / _SETTINGS
        try:
            said = json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{place}: its tokenizer cannot be read ({error}); fetch {_SETTINGS} again") from None
        later = Deferred(place, ours=True)
        return cls(later if _is_slow(place) else later.read(), said, Rules.model_validate(described), context_length)

    def save(self, folder: str | Path) -> None:
        said = self.settings | {"model_max_length": self.context_length}
        Path(folder, "tokenizer.json").write_text(self._whole + "\n", encoding="utf-8")
        Path(folder, _SETTINGS).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
