"""The tiny model: a folder of JSON files that a real vLLM serves with random weights. No network is needed."""

import json
import shutil
from pathlib import Path

NAME = "rehearsal-tiny"
# A two-layer Qwen3. Its 4 key-value heads split evenly over 1, 2 or 4 hosts. Its context is long, because one test
# needs a prompt on which a processor works for half a minute.
WRITTEN = Path(__file__).with_name("tiny")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write(folder: Path) -> None:
    """Write the model into `folder`, and make the folder if it is missing. The bytes are the same every time."""
    shutil.copytree(WRITTEN, folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False), encoding="utf-8")


def tokenizer() -> dict:
    """Return a byte-level BPE tokenizer without merges: one token for each byte, then the special tokens."""
    # As in GPT-2, a printable byte is its own letter. The other bytes get the letters from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) if byte in printable else chr(0x100 + hidden.index(byte)) for byte in range(256)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 256 + number, "content": word, "special": True, **flags} for number, word in enumerate(SPECIAL)
        ],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(letters)}, "merges": []},
    }
