"""A tokenizer.json as the vocabulary of a GGUF file: byte-level BPE whose splits llama.cpp has a name for."""

import json
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt.data.chat_template import ChatTemplate
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.interop.awkward_texts import AWKWARD_TEXTS
from gpt.interop.model_folder import QWEN_PATTERN

if TYPE_CHECKING:
    from gguf import GGUFWriter

LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""Regular expression that cuts text into words in the tokenizer.json of Llama 3."""
PATTERNS = {QWEN_PATTERN: "qwen2", LLAMA3_PATTERN: "llama-bpe"}
"""Regular expression -> llama.cpp's name of the pre-tokenizer."""
SUPPORTED = "byte-level BPE that cuts words as GPT-2, Llama 3, Qwen or SmolLM"
IN_BPE_ONLY = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Settings of BPE that llama.cpp's byte-level BPE lacks."""


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of a GGUF file."""

    pre: str
    """Name of the pre-tokenizer."""
    tokens: list[str]
    """Name of each id."""
    types: list[int]
    """gguf.TokenType of each id."""
    merges: list[str]
    begin_of_text: int
    end_of_text: int
    chat_template: str | None

    def add_to(self, writer: "GGUFWriter") -> None:
        """Add the vocabulary to the metadata of a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.begin_of_text)
        writer.add_eos_token_id(self.end_of_text)
        writer.add_add_bos_token(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def describe_vocabulary(tokenizer: Tokenizer, n_rows: int, chat_template: ChatTemplate | None = None) -> Vocabulary:
    """Return the vocabulary of a file, with a name for each row of the embedding.

    Args:
        tokenizer: the tokenizer.
        n_rows: rows of the embedding; those without a token are unused ones.
        chat_template: its chat template, which may have a bos_token of its own.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    from gguf import TokenType

    definition = json.loads(tokenizer.definition)
    model, pre = definition["model"], find_pre_tokenizer(definition)
    if pre is None or tokenizer.end_of_text is None:
        reason = "its end-of-text token is missing" if pre else "this one is another"
        raise UserError(f"GGUF has no such tokenizer ({SUPPORTED}): {reason}; gpt export --to hf writes any")
    names = {index: f"[PAD{index}]" for index in range(n_rows)}
    types = dict.fromkeys(names, TokenType.UNUSED)
    for name, index in model["vocab"].items():
        names[index], types[index] = name, TokenType.NORMAL
    for token in definition.get("added_tokens") or ():
        index = token["id"]
        names[index] = token["content"]
        types[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:  # llama.cpp requires one: this never applies, because no text is cut into names of special tokens
        merges = [f"{names[tokenizer.end_of_text]} {names[tokenizer.end_of_text]}"]
    ids = {name: index for index, name in names.items()}
    begin = None if chat_template is None else ids.get(chat_template.special_tokens.get("bos_token", ""))
    return Vocabulary(
        pre=pre,
        tokens=list(names.values()),
        types=[int(kind) for kind in types.values()],
        merges=merges,
        begin_of_text=tokenizer.end_of_text if begin is None else begin,
        end_of_text=tokenizer.end_of_text,
        chat_template=None if chat_template is None else chat_template.source,
    )


def list_comparable_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the awkward texts that llama.cpp can cut as the tokenizer does: for one with NFC, those that are NFC."""
    if json.loads(tokenizer.definition).get("normalizer") is None:
        return list(AWKWARD_TEXTS)
    return [text for text in AWKWARD_TEXTS if unicodedata.is_normalized("NFC", text)]


def find_pre_tokenizer(definition: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of a tokenizer's pre-tokenizer; None if it has none for it.

    Llama.cpp normalises no text. That of NFC, as Qwen's, is accepted: only texts that are not NFC differ.
    """
    model, normalizer = definition["model"], definition.get("normalizer")
    is_plain = model.get("type") == "BPE" and not any(model.get(name) for name in IN_BPE_ONLY)
    if not is_plain or (normalizer or {"type": "NFC"}).get("type") != "NFC":
        return None
    match definition.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "gpt-2"
        case {"type": "Sequence", "pretokenizers": [first, {"type": "ByteLevel", "add_prefix_space": False} as last]}:
            if first == {"type": "Digits", "individual_digits": True} and last.get("use_regex", True):
                return "smollm"
            if first.get("type") == "Split" and not last.get("use_regex", True):
                return PATTERNS.get((first.get("pattern") or {}).get("Regex", ""))
    return None
