"""What a folder of transformers says about layers and BERT texts: obeyed, or refused by the name of the key.

A folder that asks for something else than the towers and WordPiece do would give other features than its author's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from cnclip_ft.models.description import checked_half
from cnclip_ft.models.families.chinese_clip.wordpiece import SPECIAL_TOKENS, read_vocabulary
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer
from cnclip_ft.models.families.transformers_tower import TransformersTower
from cnclip_ft.models.formats.files import read_json
from data_tools.errors import RequestError

# Keys that change no feature in evaluation: how weights began, training, heads nobody uses, generation (version 4 wrote it all).
_NO_EFFECT = frozenset((
    "architectures attn_implementation bos_token_id chunk_size_feed_forward classifier_dropout decoder_start_token_id directionality "
    "diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id finetuning_task "
    "gradient_checkpointing id2label initializer_factor initializer_range label2id length_penalty logit_scale_init_value max_length "
    "min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_past pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type "
    "problem_type projection_dim remove_invalid_values repetition_penalty return_dict sep_token_id temperature tie_encoder_decoder "
    "tie_word_embeddings top_k top_p torch_dtype torchscript transformers_version typical_p use_cache"
).split())  # fmt: skip
_ONLY = {"num_channels": 3, "position_embedding_type": "absolute"}
_TOKENIZERS = (
    "BertTokenizer",
    "BertTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "ChineseCLIPTokenizer",
)
_REPLACED = ({"String": "“"}, {"String": "”"}, {"Regex": "\\p{Co}"})  # by the tokenizers we write


def obeyed(config: Any, known: tuple[str, ...], where: str) -> dict[str, Any]:
    """The values of `known` keys in a section of a configuration.

    Raises:
        RequestError: it is no section, or another key in it says something that would change features.
    """
    if not isinstance(config, dict):
        raise RequestError(f"{where} is a {type(config).__name__}, expected an object; fetch the file again")
    for key, value in config.items():
        if key in known or key in _NO_EFFECT or key.startswith("_") or not value or _ONLY.get(key) == value:
            continue
        raise RequestError(
            f"{where}.{key} is {repr(value)[:60]}, which the towers here do not have"
            + (f" (only {_ONLY[key]!r})" if key in _ONLY else "")
            + "; if it changes no feature of this model, take the line out of the file"
        )
    found = {key: config[key] for key in known if key in config}
    for key in ("image_size", "patch_size"):  # transformers 5 takes both sides
        side = found.get(key)
        if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
            found[key] = side[0]
    return found


def half_of(
    tower: type[TransformersTower], config: Any, usual: PretrainedConfig, where: str, beside: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One half of a description, of a section of a configuration.

    Args:
        usual: what holds where the section says nothing.
        beside: keys that may stand there too.

    Raises:
        RequestError: a key or a value the tower cannot have.
    """
    found = obeyed(config, (*tower.config_keys, *beside), where)
    numbers = {key: found.get(key, getattr(usual, key)) for key in tower.config_keys}
    return checked_half(tower.schema, {"kind": tower.kind} | numbers, where)


IDS = ("eos_token_id", "pad_token_id")


def compare_ids(where: str, section: dict[str, Any], tokenizer: FastTokenizer) -> None:
    """
    Raises:
        RequestError: texts end, or are filled up, with another token than the configuration says.
    """
    rules = tokenizer.rules
    for key, own in zip(IDS, (rules.end_id, rules.pad_id), strict=True):
        if section.get(key) not in (None, own):
            raise RequestError(
                f"{where}.{key} is {repr(section[key])[:20]}, and that of the tokenizer beside it ({tokenizer.name}) {own}: it is another "
                "model's; fetch both again"
            )


# ---- texts ----------------------------------------------------------------------------------------------------------


def text_rules(folder: Path) -> tuple[Path | None, int | None]:
    """The vocabulary's file (``tokenizer.json`` before ``vocab.txt``, as transformers reads them) and the longest text in
    tokens the folder speaks of; None for what it leaves open.

    Raises:
        RequestError: another tokenizer than BERT WordPiece in lower case.
    """
    lengths = []
    settings_file, whole_file, list_file = (
        folder / n for n in ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
    )
    if settings_file.exists():
        settings = read_json(settings_file)
        _only(settings_file, settings, "tokenizer_class", _TOKENIZERS)
        for key, expected in (
            ("do_lower_case", True),
            ("tokenize_chinese_chars", True),
            ("do_basic_tokenize", True),
            ("strip_accents", True),
            ("truncation_side", "right"),
            ("padding_side", "right"),
        ):
            _only(settings_file, settings, key, (expected,))
        for token in SPECIAL_TOKENS:
            found = settings.get(f"{token[1:-1].lower()}_token")
            found = found.get("content") if isinstance(found, dict) else found
            if found not in (None, token):
                raise RequestError(
                    f"{settings_file}: {token[1:-1].lower()}_token is {repr(found)[:60]}; only {token} is known here"
                )
        added = settings.get("added_tokens_decoder") or {}
        _no_added(settings_file, list(added.values()) if isinstance(added, dict) else added)
        length = settings.get("model_max_length")
        if length is not None:
            if type(length) not in (int, float) or not length >= 3:
                raise RequestError(
                    f"{settings_file}: model_max_length is {repr(length)[:60]}, expected a whole number from 3"
                )
            lengths.append(length)
    if whole_file.exists():
        whole = read_json(whole_file)
        _check_pipeline(whole_file, whole)
        _no_added(whole_file, whole.get("added_tokens") or [])
        cut = whole.get("truncation")
        if cut is not None:
            if not isinstance(cut, dict) or type(cut.get("max_length")) is not int or cut["max_length"] < 3:
                raise RequestError(f"{whole_file}: truncation is {repr(cut)[:60]}, expected a max_length from 3")
            _only(whole_file, cut, "direction", ("Right",))
            lengths.append(cut["max_length"])
    if list_file.exists() and whole_file.exists():
        if read_vocabulary(whole_file) != read_vocabulary(list_file):
            raise RequestError(
                f"{folder}: tokenizer.json and vocab.txt hold different vocabularies; take the wrong one out"
            )
    said = [int(length) for length in lengths if length < 1_000_000]  # transformers writes 1e30 for "no limit"
    file = whole_file if whole_file.exists() and not list_file.exists() else list_file if list_file.exists() else None
    return file, min(said) if said else None


def _only(file: Path, settings: dict[str, Any], key: str, expected: tuple[Any, ...]) -> None:
    found = settings.get(key)
    if found is not None and found not in expected:
        raise RequestError(
            f"{file}: {key} is {repr(found)[:60]}; texts here are BERT WordPiece in lower case, cut at the end (only "
            f"{' or '.join(map(repr, expected))})"
        )


def _no_added(file: Path, tokens: Any) -> None:
    for token in tokens if isinstance(tokens, list) else [tokens]:
        content = token.get("content") if isinstance(token, dict) else token
        if content not in SPECIAL_TOKENS:
            raise RequestError(f"{file}: the added token {repr(content)[:60]}; only those of vocab.txt are known here")


def _check_pipeline(file: Path, whole: dict[str, Any]) -> None:
    def part(key: str, kinds: tuple[str, ...]) -> dict[str, Any]:
        found = whole.get(key)
        if not isinstance(found, dict) or found.get("type") not in kinds:
            kind = found.get("type") if isinstance(found, dict) else found
            raise RequestError(f"{file}: {key} is {repr(kind)[:60]}; only {' or '.join(kinds)} is known here")
        return found

    model = part("model", ("WordPiece",))
    _only(file, model, "unk_token", ("[UNK]",))
    _only(file, model, "continuing_subword_prefix", ("##",))
    part("pre_tokenizer", ("BertPreTokenizer",))
    part("post_processor", ("TemplateProcessing", "BertProcessing"))
    normalizer = part("normalizer", ("BertNormalizer", "Sequence"))
    steps = normalizer.get("normalizers") if normalizer["type"] == "Sequence" else [normalizer]
    for step in steps if isinstance(steps, list) else [steps]:
        if isinstance(step, dict) and step.get("type") == "Replace" and step.get("pattern") in _REPLACED:
            continue
        if not isinstance(step, dict) or step.get("type") != "BertNormalizer":
            raise RequestError(f"{file}: normalizer holds {repr(step)[:60]}; only BertNormalizer is known here")
        for key in ("lowercase", "handle_chinese_chars", "clean_text", "strip_accents"):
            _only(file, step, key, (True,))
