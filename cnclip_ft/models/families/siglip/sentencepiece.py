"""SigLIP's ``spiece.model`` as a tokenizer of the library tokenizers, with the ids of transformers' SiglipTokenizer.

That one needs the package sentencepiece and cannot be written as ``tokenizer.json``. What it does to a text is big_vision's
``canonicalize_text`` (`families.cleaning`), then the model's own normalisation. The former stands in the tokenizer as well, so
that whoever loads the saved tokenizer.json gets nearly the same ids: all but a sigma at the end of a word.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from data_tools.errors import RequestError
from data_tools.regular import regular

_LONGEST = 64 << 20  # bytes of a vocabulary
_PUNCTUATION = r"[!-/:-@\[-`{-~]"  # all of ASCII's
_UNIGRAM = 1  # kind of model
END, UNKNOWN = "</s>", "<unk>"


def sentencepiece_backend(file: Path, *, lower_case: bool = True) -> Backend:
    """Of a model file of the package sentencepiece; a text ends in ``</s>``.

    Raises:
        RequestError: it cannot be read, or is of another kind than SigLIP's.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        regular(file, _LONGEST)
        content = import_protobuf().ModelProto.FromString(file.read_bytes())
        pieces = [(piece.piece, piece.score) for piece in content.pieces]
        numbers = {piece: number for number, (piece, _) in enumerate(pieces)}
        if content.trainer_spec.model_type != _UNIGRAM or not {END, UNKNOWN} <= numbers.keys():
            raise ValueError(f"no unigram model with {END} and {UNKNOWN}")
        model = models.Unigram(pieces, numbers[UNKNOWN], content.trainer_spec.byte_fallback)
    except RequestError:
        raise
    except Exception as error:  # noqa: BLE001 - there is no end of what damaged files raise
        raise RequestError(
            f"{file}: SigLIP's vocabulary cannot be read ({str(error)[:200] or type(error).__name__}); fetch it again"
        ) from None
    backend = Backend(model)
    rules = content.normalizer_spec.precompiled_charsmap
    backend.normalizer = normalizers.Sequence(
        [
            *([normalizers.Lowercase()] * lower_case),
            normalizers.Replace(Regex(_PUNCTUATION), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            *([normalizers.Precompiled(rules)] if rules else []),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, numbers[END])])
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, lstrip=True, rstrip=True) for t in (END, UNKNOWN)]
    )
    return backend
