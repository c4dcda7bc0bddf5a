"""Loaded by the tests' ComfyUI as a custom node: makes core's Gemma 3 12B a few numbers wide.

Core knows one width of Gemma 3 12B and reads none from the file. With this its own loader,
tokenizer and projection run over a file of the same keys that the tests make (`shrunken_ltx2.py`),
48 layers as ever.
"""

from dataclasses import dataclass

import comfy.text_encoders.llama as llama

NODE_CLASS_MAPPINGS: dict[str, type] = {}
HIDDEN, VOCABULARY = 16, 64


@dataclass
class _Small(llama.Gemma3_12B_Config):
    vocab_size: int = VOCABULARY
    hidden_size: int = HIDDEN
    intermediate_size: int = 2 * HIDDEN
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim = 8
    vision_config = llama.GEMMA3_VISION_CONFIG | {
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }


llama.Gemma3_12B_Config = _Small
