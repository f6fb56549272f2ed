"""Tiny tokenizers made from lists, of the classes that the published pipelines use: bytes where the class can, else printable ASCII."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_LENGTH = 77  # tokens of a prompt that CLIP reads
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """CLIP's vocabulary without merges: 256 byte symbols, the same at a word's end, the two special tokens (514 in all)."""
    symbols = list(_byte_symbols())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), _BOS, _EOS]
    return {word: i for i, word in enumerate(words)}


def tokenizer() -> Any:
    """A CLIP tokenizer whose only words are bytes; ids of the special tokens are the two highest, as in CLIP."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=_LENGTH)


def t5_words() -> list[str]:
    """T5's special tokens in their published places, the word border, and printable ASCII (98 in all)."""
    return ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]


def t5_tokenizer() -> Any:
    """A T5 tokenizer whose only words are printable ASCII characters; every other one is unknown."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=[(word, 0.0) for word in t5_words()], extra_ids=0, model_max_length=512)


def gemma_words() -> dict[str, int]:
    """Gemma's special tokens in their published places, and 256 bytes (262 in all)."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {word: i for i, word in enumerate(words)}


def gemma_tokenizer() -> Any:
    """A Gemma tokenizer whose only words are bytes."""
    from transformers import GemmaTokenizer

    return GemmaTokenizer(vocab=gemma_words(), merges=[])


def qwen_words() -> dict[str, int]:
    """Qwen's vocabulary without merges: 256 byte symbols and three special tokens (259 in all)."""
    return {word: i for i, word in enumerate([*_byte_symbols(), _EOS, "<|im_start|>", "<|im_end|>"])}


def qwen_tokenizer() -> Any:
    """A Qwen tokenizer whose only words are bytes, with the chat template that Qwen 3 has without tools and thoughts."""
    from transformers import AddedToken, Qwen2Tokenizer

    made = Qwen2Tokenizer(vocab=qwen_words(), merges=[], chat_template=_CHAT)
    made.add_tokens([AddedToken(word, special=True) for word in ("<|im_start|>", "<|im_end|>")], special_tokens=True)
    return made


def _byte_symbols() -> Iterator[str]:
    """GPT-2's printable stand-ins for the 256 byte values (byte-level BPE)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = 256
    for byte in range(256):
        yield chr(byte if byte in printable else spare)
        spare += byte not in printable
