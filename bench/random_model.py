#!/usr/bin/env python3
"""A Llama of 355 M parameters in bf16 with random weights, and a BPE tokenizer: speed needs no trained model.

    python bench/random_model.py OUT                             # writes the Hugging Face directory OUT
    python bench/random_model.py OUT --gate                      # writes OUT/gate.safetensors, for the policy seerattention
    python bench/random_model.py OUT --gguf LLAMA_CPP_TREE       # converts OUT to OUT.gguf (bf16) for llama.cpp

Needs torch, transformers and tokenizers; made with 2.13.0, 5.19.0 and 0.23.3. Random weights measure speed and memory
of dense attention. They say nothing of sparse attention, whose cost depends on what a trained model attends to.
"""

import argparse
import runpy
import sys
import sysconfig
from pathlib import Path

SEED = 1234
VOCABULARY = 32000
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The split that Qwen2 uses: llama.cpp knows it by name, so both sides tokenize alike.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer():
    """Byte-level BPE, trained on Python's standard library, which is also what bench/peers.py makes prompts of."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = (f.read_text(errors="ignore") for f in files if not {"site-packages", "test"} & set(f.parts))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=40960
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_model(out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,  # tied, a random model repeats its last token
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    tokens.save_pretrained(out)


def write_gate(out: Path) -> None:
    """Of random weights, as wide as a head (docs/policies/seerattention.md)."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(out)
    heads, dim = config.num_key_value_heads, config.head_dim
    inputs = {"k_gate": 3 * dim, "q_gate": config.num_attention_heads // heads * dim}
    torch.manual_seed(SEED)
    tensors = {
        f"layers.{layer}.{part}": (torch.randn(heads, dim, cols) / cols**0.5).to(torch.bfloat16)
        for layer in range(config.num_hidden_layers)
        for part, cols in inputs.items()
    }
    save_file(tensors, out / "gate.safetensors")


def write_gguf(out: Path, tree: Path) -> None:
    """llama.cpp's own converter, told which of the splits it knows this tokenizer uses."""
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", str(out), "--outfile", f"{out}.gguf", "--outtype", "bf16"]
    runpy.run_path(str(tree / "convert_hf_to_gguf.py"), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--gguf", type=Path, metavar="LLAMA_CPP_TREE")
    args = parser.parse_args()
    if args.gate:
        write_gate(args.out)
    elif args.gguf:
        write_gguf(args.out, args.gguf)
    else:
        write_model(args.out)


if __name__ == "__main__":
    main()
