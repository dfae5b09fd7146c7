"""Tiny random models in the Hugging Face layout, each with a real byte-level BPE tokenizer.

They load with mlx-lm like the models they stand for, and keep what makes those awkward: a
vocabulary padded beyond the tokenizer, a chat template that adds an empty think block (Qwen3) or
a system turn (SmolLM2), and a list of end tokens in generation_config.json.

The same arguments give the same bytes in every run.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE

# Qwen2's and Qwen3's split, as tokenizer.json writes it.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3's: up to three digits together.
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# Qwen3.5's: marks belong to the letters before them.
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN_BASE_VOCAB = 151_643  # 256 bytes and 151,387 merges
QWEN_VOCAB_PAD = 267  # rows of the embedding that no token has: 151,936 - 151,669

# fmt: off
# Qwen3's added tokens in the order of their ids, 151,643 to 151,668.
QWEN_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]
QWEN_MARKERS = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
]
# SmolLM2's, ids 0 to 16.
LLAMA_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
    "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
    "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
    "<empty_output>",
]
# SmolLM3's, ids 128,000 to 128,018.
SMOLLM3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>", "<|finetune_right_pad_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|reserved_special_token_2|>", "<|im_start|>", "<|im_end|>", "<tool_response>",
    "</tool_response>", "<tool_call>", "</tool_call>", "<code>", "</code>",
]
# Granite 3's: those of StarCoder, ids 0 to 18, and those after the merges.
GRANITE_SPECIAL = [
    "<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>",
    "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>",
    "<commit_msg>", "<commit_after>", "<reponame>",
]
GRANITE_ROLES = [
    "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|start_of_cite|>",
    "<|end_of_cite|>", "<|start_of_plugin|>", "<|end_of_plugin|>",
]
# LFM2's, ids 0 to 13.
LFM2_SPECIAL = [
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>",
    "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>",
    "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>",
]
# fmt: on

QWEN_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nAnswer with <tool_call></tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA_TEMPLATE = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# What the merges are learned from.
CORPUS = """\
/no_think Expand this search query: configure nginx reverse proxy
hyde: To configure nginx as a reverse proxy, add a location block with proxy_pass and reload it.
lex: nginx reverse proxy config
lex: nginx proxy_pass location block
vec: how to configure nginx as a reverse proxy for an application server
/no_think Expand this search query: sourdough starter not rising
hyde: A sourdough starter that is not rising is often too cold. Keep it near 25 degrees, feed daily.
lex: sourdough starter inactive
lex: sourdough starter feeding temperature
vec: why does a sourdough starter stop rising and how to bring it back
/no_think Expand this search query: flights to Lisbon in May
hyde: Flights to Lisbon in May are cheapest on a Tuesday when they are booked two months before.
lex: Lisbon flights May price
vec: when to book cheap flights to Lisbon for travel in May
vec: which airlines fly to Lisbon in the spring
system user assistant search query search query the the the and and for of in on to is are
"""


def _decoder(
    *,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
) -> dict:
    """What config.json has in common for models with attention and a gated MLP in every layer."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def make_qwen3(
    folder: Path,
    *,
    head_dim: int = 16,
    seed: int = 0,
    vocab_pad: int = QWEN_VOCAB_PAD,
    full_vocab: bool = False,
    **sizes,
) -> Path:
    """Write a random float32 Qwen3 into `folder` and return it; `sizes` are those of `_decoder`.

    The embedding has `vocab_pad` rows more than the tokenizer has tokens. `full_vocab` gives the
    real 151,936 rows with made-up tokens; use it with `hidden=32` to stay at 20 MB.
    """
    tokenizer = qwen_tokenizer(full_vocab)
    end_of_text, im_end = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    config = _decoder(**sizes) | {
        "architectures": ["Qwen3ForCausalLM"],
        "bos_token_id": end_of_text,
        "eos_token_id": im_end,
        "head_dim": head_dim,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "sliding_window": None,
        "vocab_size": tokenizer.get_vocab_size() + vocab_pad,
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": QWEN_SPECIAL[1:],
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation_config = {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [im_end, end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    weights = _weights(config, head_norms=True, seed=seed)
    return _write(folder, weights, tokenizer, config, tokenizer_config, generation_config)


def make_llama(folder: Path, *, seed: int = 0, **sizes) -> Path:
    """Write a random float32 llama in SmolLM2's layout into `folder` and return it.

    `sizes` are those of `_decoder`.
    """
    tokenizer = llama_tokenizer()
    im_start, im_end = (tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    config = _decoder(**sizes)
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": im_start,
        "eos_token_id": im_end,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "pad_token_id": im_end,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    tokenizer_config = {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "chat_template": LLAMA_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        # GPT2Tokenizer would rebuild the tokenizer without the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    generation_config = {"bos_token_id": im_start, "eos_token_id": im_end, "pad_token_id": im_end}
    weights = _weights(config, head_norms=False, seed=seed)
    return _write(folder, weights, tokenizer, config, tokenizer_config, generation_config)


def make_smollm3(folder: Path, *, layers: int = 5, seed: int = 0, **sizes) -> Path:
    """Write a random float32 SmolLM3 into `folder` and return it.

    `sizes` are those of `_decoder`.
    """
    tokenizer = smollm3_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SMOLLM3_SPECIAL}
    end_of_text, im_end = ids["<|end_of_text|>"], ids["<|im_end|>"]
    config = _decoder(layers=layers, **sizes) | {
        "architectures": ["SmolLM3ForCausalLM"],
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": im_end,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)],
        "pad_token_id": ids["<|finetune_right_pad_id|>"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size() + 5,
    }
    tokenizer_config = {
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|im_end|>",
        "fast": False,
        "model_max_length": 131072,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "do_sample": True,
        "eos_token_id": [im_end, end_of_text],
        "pad_token_id": ids["<|finetune_right_pad_id|>"],
        "temperature": 0.6,
        "top_p": 0.95,
    }
    weights = _weights(config, head_norms=False, seed=seed)
    return _write(folder, weights, tokenizer, config, tokenizer_config, generation_config)


def make_granite(folder: Path, *, seed: int = 0, **sizes) -> Path:
    """Write a random float32 Granite 3 into `folder` and return it.

    `sizes` are those of `_decoder`.
    """
    tokenizer = granite_tokenizer()
    config = _decoder(**sizes) | {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": 0.125,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "logits_scaling": 10.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "granite",
        "pad_token_id": 0,
        "residual_multiplier": 1.75,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000.0,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": "<|end_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "errors": "replace",
        "model_max_length": 9223372036854775807,
        "pad_token": "<|end_of_text|>",
        "padding_side": "left",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|end_of_text|>",
        "vocab_size": 49152,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    weights = _weights(config, head_norms=False, seed=seed)
    return _write(folder, weights, tokenizer, config, tokenizer_config, generation_config)


def make_lfm2(
    folder: Path,
    *,
    hidden: int = 64,
    layer_types: tuple[str, ...] = ("conv", "full_attention", "conv", "conv"),
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 192,
    seed: int = 0,
) -> Path:
    """Write a random float32 LFM2 into `folder` and return it.

    As in LFM2's config.json, the MLP is narrower than `ffn`: two thirds, rounded up to 32.
    """
    tokenizer = lfm2_tokenizer()
    config = {
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": True,
        "block_dim": hidden,
        "block_ff_dim": ffn,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 32,
        "block_norm_eps": 1e-5,
        "block_use_swiglu": True,
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": hidden,
        "eos_token_id": 7,
        "full_attn_idxs": [i for i, kind in enumerate(layer_types) if kind == "full_attention"],
        "hidden_size": hidden,
        "max_position_embeddings": 128000,
        "model_type": "lfm2",
        "norm_eps": 1e-5,
        "num_attention_heads": heads,
        "num_heads": heads,
        "num_hidden_layers": len(layer_types),
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "rope_theta": 1000000.0,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    tokenizer_config = {
        "add_bos_token": True,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 128000,
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    draw = Draw(seed)
    width, size = -(-(2 * ffn // 3) // 32) * 32, hidden // heads
    weights = {
        "model.embed_tokens": draw.matrix(config["vocab_size"], hidden, gain=1),
        "model.embedding_norm": draw.norm(hidden),
    }
    for index, kind in enumerate(layer_types):
        layer = {
            "operator_norm": draw.norm(hidden),
            "ffn_norm": draw.norm(hidden),
            "feed_forward.w1": draw.matrix(width, hidden),
            "feed_forward.w2": draw.matrix(hidden, width),
            "feed_forward.w3": draw.matrix(width, hidden),
        }
        if kind == "conv":
            layer |= {
                "conv.conv": draw.matrix(hidden, 3)[:, None],
                "conv.in_proj": draw.matrix(3 * hidden, hidden),
                "conv.out_proj": draw.matrix(hidden, hidden),
            }
        else:
            layer |= {
                "self_attn.q_proj": draw.matrix(heads * size, hidden),
                "self_attn.k_proj": draw.matrix(kv_heads * size, hidden),
                "self_attn.v_proj": draw.matrix(kv_heads * size, hidden),
                "self_attn.out_proj": draw.matrix(hidden, heads * size),
                "self_attn.q_layernorm": draw.norm(size),
                "self_attn.k_layernorm": draw.norm(size),
            }
        weights |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    weights = {f"{name}.weight": value for name, value in weights.items()}
    return _write(folder, weights, tokenizer, config, tokenizer_config, generation_config)


def make_gemma3(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 7,
    heads: int = 4,
    kv_heads: int = 1,
    head_dim: int = 16,
    ffn: int = 128,
    window: int = 16,
    seed: int = 0,
) -> Path:
    """Write a random float32 Gemma 3 for text into `folder` and return it.

    Its tokenizer has one token more than the model has embeddings, as the real one has.
    """
    tokenizer = gemma_tokenizer()
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": window,
        "sliding_window_pattern": 6,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size() - 1,
    }
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 32768,
        "pad_token": "<pad>",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }
    generation_config = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    draw = Draw(seed)
    weights = {
        "model.embed_tokens": draw.matrix(config["vocab_size"], hidden, gain=1),
        "model.norm": draw.norm(hidden, 0),
    }
    for index in range(layers):
        layer = {
            "input_layernorm": draw.norm(hidden, 0),
            "post_attention_layernorm": draw.norm(hidden, 0),
            "pre_feedforward_layernorm": draw.norm(hidden, 0),
            "post_feedforward_layernorm": draw.norm(hidden, 0),
            "self_attn.q_proj": draw.matrix(heads * head_dim, hidden),
            "self_attn.k_proj": draw.matrix(kv_heads * head_dim, hidden),
            "self_attn.v_proj": draw.matrix(kv_heads * head_dim, hidden),
            "self_attn.o_proj": draw.matrix(hidden, heads * head_dim),
            "self_attn.q_norm": draw.norm(head_dim, 0),
            "self_attn.k_norm": draw.norm(head_dim, 0),
            "mlp.gate_proj": draw.matrix(ffn, hidden),
            "mlp.up_proj": draw.matrix(ffn, hidden),
            "mlp.down_proj": draw.matrix(hidden, ffn),
        }
        weights |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    weights = {f"{name}.weight": value for name, value in weights.items()}
    return _write(folder, weights, tokenizer, config, tokenizer_config, generation_config)


def make_qwen35(
    folder: Path,
    *,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    ffn: int = 128,
    keys: int = 2,
    values: int = 4,
    size: int = 16,
    seed: int = 0,
) -> Path:
    """Write a random float32 Qwen3.5 into `folder` and return it.

    As in the real ones, the text part's settings and weights are those of a model that also reads
    images; one tensor stands for the part that does.
    """
    tokenizer = qwen_tokenizer(split=QWEN35_SPLIT)
    end_of_text, im_end = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    kinds = ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    text = {
        "attention_bias": False,
        "attn_output_gate": True,
        "eos_token_id": end_of_text,
        "full_attention_interval": 4,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "layer_types": kinds,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": size,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_value_head_dim": size,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": tied,
        "vocab_size": tokenizer.get_vocab_size() + 5,
    }
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "eos_token_id": im_end,
        "image_token_id": 5,
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": tied,
        "vision_config": {"depth": 1, "hidden_size": 8, "model_type": "qwen3_5"},
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    generation_config = {"eos_token_id": [im_end, end_of_text], "pad_token_id": end_of_text}
    draw, width = Draw(seed), 2 * keys * size + values * size
    weights = {
        "model.language_model.embed_tokens.weight": draw.matrix(text["vocab_size"], hidden, gain=1),
        "model.language_model.norm.weight": draw.norm(hidden, 0),
        "model.visual.patch_embed.proj.weight": draw.matrix(8, 8),
        "mtp.fc.weight": draw.matrix(hidden, 2 * hidden),
    }
    if not tied:
        weights["lm_head.weight"] = draw.matrix(text["vocab_size"], hidden, gain=1)
    for index, kind in enumerate(kinds):
        layer = {
            "input_layernorm.weight": draw.norm(hidden, 0),
            "post_attention_layernorm.weight": draw.norm(hidden, 0),
            "mlp.gate_proj.weight": draw.matrix(ffn, hidden),
            "mlp.up_proj.weight": draw.matrix(ffn, hidden),
            "mlp.down_proj.weight": draw.matrix(hidden, ffn),
        }
        if kind == "full_attention":
            layer |= {
                "self_attn.q_proj.weight": draw.matrix(2 * heads * head_dim, hidden),
                "self_attn.k_proj.weight": draw.matrix(kv_heads * head_dim, hidden),
                "self_attn.v_proj.weight": draw.matrix(kv_heads * head_dim, hidden),
                "self_attn.o_proj.weight": draw.matrix(hidden, heads * head_dim),
                "self_attn.q_norm.weight": draw.norm(head_dim, 0),
                "self_attn.k_norm.weight": draw.norm(head_dim, 0),
            }
        else:
            layer |= {
                "linear_attn.conv1d.weight": draw.matrix(width, 4)[:, None],
                "linear_attn.in_proj_qkv.weight": draw.matrix(width, hidden),
                "linear_attn.in_proj_z.weight": draw.matrix(values * size, hidden),
                "linear_attn.in_proj_a.weight": draw.matrix(values, hidden),
                "linear_attn.in_proj_b.weight": draw.matrix(values, hidden),
                "linear_attn.out_proj.weight": draw.matrix(hidden, values * size),
                "linear_attn.A_log": draw.norm(values, 0.5),
                "linear_attn.dt_bias": draw.norm(values, -1),
                "linear_attn.norm.weight": draw.norm(size),
            }
        prefix = f"model.language_model.layers.{index}"
        weights |= {f"{prefix}.{name}": value for name, value in layer.items()}
    return _write(folder, weights, tokenizer, config, tokenizer_config, generation_config)


def make_qwen2(folder: Path, **options) -> Path:
    """Write a Qwen3 without head norms and with biases of q, k and v, which is a Qwen2."""
    make_qwen3(folder, **options)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(3)
    for name in list(tensors):
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            del tensors[name]
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = rng.normal(0, 1, tensors[name].shape[0]).astype(np.float32)
            tensors[name.replace("weight", "bias")] = bias
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return configure(folder, model_type="qwen2", architectures=["Qwen2ForCausalLM"])


def add_biases(folder: Path) -> Path:
    """Give a llama the biases of every linear layer."""
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(4)
    for name in [name for name in tensors if "_proj" in name]:
        bias = rng.normal(0, 1, tensors[name].shape[0]).astype(np.float32)
        tensors[name.replace("weight", "bias")] = bias
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return configure(folder, attention_bias=True, mlp_bias=True)


def configure(folder: Path, *missing: str, file: str = "config.json", **changes: object) -> Path:
    """Change keys of a model's config.json, and remove those named in `missing`."""
    path = folder / file
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    for key in missing:
        del config[key]
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return folder


def qwen_tokenizer(full_vocab: bool = False, split: str = QWEN_SPLIT) -> Tokenizer:
    """A tokenizer in Qwen3's layout: bytes, merges, then the added tokens in their real order.

    With `full_vocab`, made-up merges follow the learned ones until the ids are the real ones
    (151,643 `<|endoftext|>`, 151,645 `<|im_end|>`, 151,669 tokens in all).
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special=[])
    if full_vocab:
        tokenizer.model = _grow(json.loads(tokenizer.to_str())["model"], QWEN_BASE_VOCAB)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in QWEN_MARKERS])
    return tokenizer


def llama_tokenizer(special: Sequence[str] = LLAMA_SPECIAL) -> Tokenizer:
    """A tokenizer in SmolLM2's layout: special tokens first, every digit split off, no NFC."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special=special)
    return tokenizer


def granite_tokenizer() -> Tokenizer:
    """A tokenizer in Granite 3's layout: SmolLM2's, with the tokens of roles after the merges."""
    tokenizer = llama_tokenizer(GRANITE_SPECIAL)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in GRANITE_ROLES])
    return tokenizer


def smollm3_tokenizer() -> Tokenizer:
    """A tokenizer in SmolLM3's layout: Llama 3's split, the added tokens last, no BOS."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special=[])
    marks = [AddedToken(t, normalized=False, special=t[1] == "|") for t in SMOLLM3_SPECIAL]
    tokenizer.add_tokens(marks)
    return tokenizer


def lfm2_tokenizer() -> Tokenizer:
    """A tokenizer in LFM2's layout: special tokens first, Llama 3's split, a BOS by template."""
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special=LFM2_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 1)]
    )
    return tokenizer


def gemma_tokenizer() -> Tokenizer:
    """A tokenizer in Gemma's layout: SentencePiece's BPE over characters, with bytes for the others.

    Any two tokens whose text together is a token are merged, the token with the lowest id first.
    """
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    # SentencePiece merges across no space that follows a letter: a word begins with its space.
    words = [word for line in CORPUS.splitlines() for word in line.replace(" ", " ▁").split(" ")]
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    trained.train_from_iterator(words, trainer)
    learned = json.loads(trained.to_str())["model"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    special += ["<start_of_turn>", "<end_of_turn>"]
    runs = [
        *("\n" * n for n in range(1, 6)),
        *("▁" * n for n in range(2, 9)),
        "<table>",
        "</table>",
    ]
    pieces = dict.fromkeys("".join(pair) for pair in learned["merges"])
    letters = [x for x in learned["vocab"] if x not in pieces and x not in runs]
    tokens = [*special, *runs, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (text[:cut], text[cut:])
        for text in (*runs, *pieces)
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in runs])
    tokenizer.add_special_tokens([AddedToken("<image_soft_token>", normalized=False)])
    return tokenizer


def _train(tokenizer: Tokenizer, special: Sequence[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)


def _grow(model: dict, size: int) -> BPE:
    """Append merges of a token and a byte, the oldest token first, until there are `size`."""
    vocab = model["vocab"]  # token -> id
    merges = [tuple(pair) for pair in model["merges"]]
    tokens = sorted(vocab, key=vocab.get)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    for first in tokens:  # grows while it is read: a new token is a first half later on
        for second in letters:
            if len(vocab) == size:
                return BPE(vocab, merges)
            if (token := first + second) not in vocab:
                vocab[token] = len(vocab)
                tokens.append(token)
                merges.append((first, second))


class Draw:
    """Random float32 weights, large enough that greedy decoding does not repeat the last token.

    Norms differ from 1, so that a swapped pair shows.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def matrix(self, rows: int, columns: int, gain: float = 2.0) -> np.ndarray:
        return self.rng.normal(0, gain * columns**-0.5, (rows, columns)).astype(np.float32)

    def norm(self, size: int, mean: float = 1.0) -> np.ndarray:
        return self.rng.normal(mean, 0.1, size).astype(np.float32)


def _weights(config: dict, *, head_norms: bool, seed: int) -> dict[str, np.ndarray]:
    """The weights of a model with attention and a gated MLP in every layer."""
    draw = Draw(seed)
    hidden, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_rows = config["num_attention_heads"] * size
    kv_rows = config["num_key_value_heads"] * size

    matrix, norm = draw.matrix, draw.norm
    weights = {"model.embed_tokens": matrix(vocab, hidden, gain=1), "model.norm": norm(hidden)}
    if not config["tie_word_embeddings"]:
        weights["lm_head"] = matrix(vocab, hidden, gain=1)
    for index in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(hidden),
            "self_attn.q_proj": matrix(q_rows, hidden),
            "self_attn.k_proj": matrix(kv_rows, hidden),
            "self_attn.v_proj": matrix(kv_rows, hidden),
            "self_attn.o_proj": matrix(hidden, q_rows),
            "post_attention_layernorm": norm(hidden),
            "mlp.gate_proj": matrix(ffn, hidden),
            "mlp.up_proj": matrix(ffn, hidden),
            "mlp.down_proj": matrix(hidden, ffn),
        }
        if head_norms:
            layer |= {"self_attn.q_norm": norm(size), "self_attn.k_norm": norm(size)}
        weights |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    return {f"{name}.weight": value for name, value in weights.items()}


def _write(
    folder: Path,
    weights: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    config: dict,
    tokenizer_config: dict,
    generation_config: dict,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", {"added_tokens_decoder": added, **tokenizer_config}),
        ("generation_config.json", generation_config),
    ):
        text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def end_early(folder: Path) -> Path:
    """Make a random model end most completions within a few tokens.

    An empty expansion earns points where a random one earns none, so rewards differ within a
    group, and rollouts are short.
    """
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"].copy()
    embeddings[:, 0] += 10  # what every hidden state then points to
    embeddings[end, 0] += 4
    weights["model.embed_tokens.weight"] = embeddings
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
