"""The tiny model: a folder of plain JSON that a real vLLM serves with random weights, made here and offline."""

import json
from pathlib import Path

NAME = "rehearsal-tiny"
CONTAINER_PATH = f"/root/.cache/huggingface/{NAME}"
# Long enough for a prompt that takes a processor half a minute.
CONTEXT = 131072

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path) -> Path:
    """Write the model into `folder` (made if missing) and return it; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def files() -> dict[str, dict]:
    """Each file of the model by its name."""
    return {
        "config.json": config(),
        "generation_config.json": {"eos_token_id": token_id("<|im_end|>"), "do_sample": False},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": tokenizer_config(),
    }


def config() -> dict:
    """A two-layer Qwen3; 8 heads and 4 key-value heads split evenly over 1, 2 or 4 hosts."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "eos_token_id": token_id("<|im_end|>"),
    }


def tokenizer_config() -> dict:
    """What transformers reads beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }


def tokenizer() -> dict:
    """A byte-level BPE tokenizer without merges: one token a byte, then the special ones."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(word) for word in SPECIAL],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": _vocabulary(), "merges": []},
    }


def token_id(special: str) -> int:
    """The id of a special token: they follow the 256 bytes."""
    return 256 + SPECIAL.index(special)


def _added(word: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id(word), "content": word, "special": True, **flags}


def _vocabulary() -> dict[str, int]:
    """GPT-2's letters for bytes: a printable byte is itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) if byte in printable else chr(0x100 + hidden.index(byte)) for byte in range(256)]
    return {letter: number for number, letter in enumerate(letters)}
