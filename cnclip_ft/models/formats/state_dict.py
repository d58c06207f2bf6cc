"""What a trainer saved → one state dict under a model's own names.

Trainers put the weights under a key of their own, and wrappers (DDP, torch.compile, FSDP, Lightning) their own words before
the names. Both are recognised, taken off and said; where two models could be meant, the file is refused and says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cnclip_ft.models.formats.torch_files import Stub
from data_tools.errors import RequestError
from data_tools.words import Said, joined

# Where the weights stand: one of the first may be there. Averaged weights are taken where nothing else is.
_PLACES = ("state_dict", "model", "model_state_dict", "module", "weights", "params")
_AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
_WRAPPERS = (
    "module",
    "_orig_mod",
    "model",
    "net",
    "network",
    "clip",
    "clip_model",
    "ema_model",
    "_forward_module",
    "_fsdp_wrapped_module",
)
_INSIDE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# Names by which a tower is known, whatever stands before them; the first that is found tells.
_ANCHORS = tuple(
    re.compile(rf"(|.*\.){name}$")
    for name in (
        r"visual\.trunk\..+",
        r"visual\.conv1\.weight",
        r"vision_model\.embeddings\.patch_embedding\.weight",
        r"(?:bert\.|text_model\.)?embeddings\.word_embeddings\.weight",
    )
)
_OPTIONAL = ("bert.", "text_model.")


def find_state_dict(content: Any) -> tuple[dict[str, Stub], dict[str, Any], list[str]]:
    """The state dict in what a torch file holds, the plain values beside it, and notes to say.

    Raises:
        RequestError: there is none, or more than one that could be meant.
    """
    if not isinstance(content, dict) or not content:
        raise RequestError(f"no state dict in it (a {type(content).__name__})")
    notes: list[str] = []
    there = [key for key in _PLACES if _holds_tensors(content.get(key))]
    averaged = [key for key in _AVERAGED if _holds_tensors(content.get(key))]
    # Beside the weights a tensor may stand alone: a loss, the state of a generator of random numbers.
    if not there and not averaged and _holds_tensors(content):
        return _checked(content), {}, notes
    if len(there) > 1:
        raise RequestError(
            f"two state dicts are in it, under {' and '.join(map(repr, there))}; save the one that is meant, alone"
        )
    if not there and not averaged:
        found = next((key for key in _PLACES if isinstance(content.get(key), dict) and content[key]), None)
        if found is not None:
            return _checked(content[found]), {}, notes
        raise RequestError(
            f"no state dict in it: {_listed(content)} {'is' if len(content) == 1 else 'are'} not tensors, and none of "
            f"{', '.join(_PLACES[:3])} is there"
        )
    taken = (there or averaged)[0]
    if averaged and there:
        notes.append(
            Said(
                "the weights under {taken!r} were taken, the averaged ones under {averaged!r} left",
                "取用 {taken!r} 下的权重，未取 {averaged!r} 下的平均权重",
                taken=taken,
                averaged=averaged[0],
            )
        )
    elif taken != "state_dict":
        notes.append(Said("the weights under {taken!r} were taken", "取用 {taken!r} 下的权重", taken=taken))
    extras = {}
    for key, value in content.items():
        if type(key) is str and key not in (taken, "optimizer") and (plain := _plain(value, [300])) is not _NOT_PLAIN:
            extras[key] = plain
    return _checked(content[taken]), extras, notes


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, Stub) for tensor in value.values())


def _checked(state: dict[Any, Any]) -> dict[str, Stub]:
    other = {key: value for key, value in state.items() if not isinstance(value, Stub) or type(key) is not str}
    if other:
        raise RequestError(f"no state dict in it: {_listed(other)} {'is' if len(other) == 1 else 'are'} not tensors")
    return dict(state)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(str(name)[:80] for name in list(names)[:3])


_NOT_PLAIN = object()


def _plain(value: Any, left: list[int]) -> Any:
    """A copy of numbers, words, lists and dicts; `_NOT_PLAIN` where there is something else, or more than `left`."""
    left[0] -= 1
    if left[0] < 0 or not (value is None or isinstance(value, (str, int, float, dict, list, tuple))):
        return _NOT_PLAIN
    if isinstance(value, dict):
        made = {key: _plain(inner, left) for key, inner in value.items()}
        return _NOT_PLAIN if any(inner is _NOT_PLAIN for inner in made.values()) else made
    if isinstance(value, (list, tuple)):
        items = [_plain(inner, left) for inner in value]
        return _NOT_PLAIN if any(inner is _NOT_PLAIN for inner in items) else items
    return value


def own_names(names: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Names of a file → the model's own ones, without what wrappers put before them.

    Returns:
        ``{name in the file: own name}``, the names that belong to something else than the model, and notes to say.

    Raises:
        RequestError: two models are in it, or a prefix no wrapper is known to make.
    """
    names = list(names)
    plain = {name: _INSIDE.sub("", name) for name in names}
    prefixes = next((found for anchor in _ANCHORS if (found := _before(anchor, plain.values()))), {""})
    if len(prefixes) > 1:
        said = " and ".join(repr(prefix) for prefix in sorted(prefixes))
        raise RequestError(
            f"two models are in it, with names that begin with {said}; save the one that is meant, alone"
        )
    (prefix,) = prefixes
    unknown = [word for word in prefix.split(".")[:-1] if word not in _WRAPPERS]
    if unknown:
        raise RequestError(
            f"its tensors' names begin with {prefix!r}, a prefix no wrapper known here makes ({', '.join(_WRAPPERS)}); "
            "save the state dict without it"
        )
    own = {name: short.removeprefix(prefix) for name, short in plain.items() if short.startswith(prefix)}
    if len(set(own.values())) < len(own):
        raise RequestError("two tensors have one name once the words of wrappers (module., _orig_mod.) are taken off")
    taken_off = {name[: len(name) - len(short)] for name, short in own.items() if name.endswith(short)} - {
        "",
        "module.",
    }
    inside = any(not name.endswith(short) for name, short in own.items())
    words = sorted(taken_off) + [Said("_orig_mod. and the like within names", "名称中间的 _orig_mod. 一类")] * inside
    notes: list[str] = []
    if words:
        notes.append(
            Said(
                "the prefix {words} of a wrapper was taken off the tensors' names",
                "张量名称中包装器的前缀 {words} 已去掉",
                words=joined(words, " and ", " 和 "),
            )
        )
    rest = sorted(plain.keys() - own.keys())
    if rest:
        notes.append(
            Said(
                "{count} tensors without the prefix {prefix} were left, e.g. {names}",
                "{count} 个没有前缀 {prefix} 的张量未取用，如 {names}",
                count=len(rest),
                prefix=prefix,
                names=_listed(rest),
            )
        )
    return own, rest, notes


def _before(anchor: re.Pattern[str], names: Iterable[str]) -> set[str]:
    found = {match[1] for name in names if (match := anchor.match(name))}
    # ``.*`` is greedy: where the tower's own word may stand before the name, it belongs to the name.
    return {prefix.removesuffix(word) if (word := _tower(prefix)) else prefix for prefix in found}


def _tower(prefix: str) -> str:
    return next((word for word in _OPTIONAL if prefix.endswith(word)), "")
