"""Makes the golden fixtures: tiny random models, and what transformers computes with them. See README.md.

python generate.py OUT_DIR [NAME...]            write the fixtures and rope.json
python generate.py --check OUT_DIR [NAME...]    reload them and compute the logits a second way
python generate.py --search [NAME...]           find seeds for fixtures.py
"""

import argparse
import json
import pathlib
import shutil
import warnings

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fixtures import BASE, FIXTURES, ROPE_BASE, ROPE_CASES, Fixture

NUM_GREEDY = 256
LOGITS_EVERY = 32  # generated tokens
GAP_MIN = 1e-2  # between the top two logits, at each greedy step
DISTINCT_MIN = 32  # tokens in the continuation
SEARCH_PROMPTS = 64  # per set of weights
CHECK_TOLERANCE = 2e-5  # of max |logit|, between two orders of the same f32 arithmetic
FEATURE_MIN = 1e-2  # of max |logit|, by which the logits change without what the fixture covers

LOGIT_STD = 4.0
ATTENTION_GAIN = 1.5  # of q and k each: scores of standard deviation about 2, so that few tokens dominate
MLP_GAIN = 1.5

TRANSFORMERS_4 = transformers.__version__.startswith("4.")  # can only --check, and only what is in its format


# The models


def new_model(fixture: Fixture, config: dict, weights_seed: int):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fixture.architecture, **config), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(weights_seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Rounded to what the disk holds. Not by model.to(), which would round the RoPE frequencies too.
            weight.copy_(random_weight(name, weight.shape, model.config, generator).to(fixture.disk_dtype))
    return model.eval()


def random_weight(name: str, shape: torch.Size, config, generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.5 * normal
    if name == "model.norm.weight" and config.tie_word_embeddings:
        # With signs, or a token's own embedding would predict that token again and again.
        return (1 + 0.2 * normal) * torch.where(torch.randn(shape, generator=generator) < 0, -1.0, 1.0)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return ATTENTION_GAIN * (1 + 0.2 * normal)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * normal
    if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and config.tie_word_embeddings):
        return LOGIT_STD / config.hidden_size**0.5 * normal
    if name == "model.embed_tokens.weight":
        return normal
    gain = ATTENTION_GAIN if name.endswith(("q_proj.weight", "k_proj.weight")) else MLP_GAIN if ".mlp." in name else 1.0
    return gain / shape[1] ** 0.5 * normal


def load_model(path: pathlib.Path, **overrides):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **overrides
    ).eval()


def random_prompt(fixture: Fixture, vocab_size: int, prompt_seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(prompt_seed)
    return torch.randint(0, vocab_size, (fixture.prompt_len,), generator=generator)


# The oracle


@torch.no_grad()
def greedy(model, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, P] -> the continuations [batch, 256], the logits of every position but the last [batch, P + 255, vocab].

    One prefill of the whole prompt, then one token at a time with the KV cache. Never stops at an end token.
    """
    cache = DynamicCache(config=model.config)
    tokens, logits, tail = [], [], prompts
    for _ in range(NUM_GREEDY):
        logits.append(model(input_ids=tail, past_key_values=cache, use_cache=True).logits)
        tail = logits[-1][:, -1].argmax(-1, keepdim=True)
        tokens.append(tail)
    return torch.cat(tokens, 1), torch.cat(logits, 1)


def top2_gaps(logits: torch.Tensor, prompt_len: int) -> torch.Tensor:
    top = logits[..., prompt_len - 1 :, :].topk(2).values
    return top[..., 0] - top[..., 1]


def logit_positions(prompt_len: int) -> list[int]:
    last = prompt_len + NUM_GREEDY - 2  # the position whose logits choose the last token
    inside = [0, 7, 15, 16, prompt_len // 2]
    return sorted({*inside, *range(prompt_len - 1, last, LOGITS_EVERY), last})


# Files


def write_fixture(name: str, fixture: Fixture, out: pathlib.Path):
    path = out / "models" / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    config, (weights_seed, prompt_seed) = BASE | fixture.config, fixture.seeds
    original = new_model(fixture, config, weights_seed)

    on_disk = new_model(fixture, config, weights_seed).to(fixture.disk_dtype)
    on_disk.save_pretrained(path, **({"max_shard_size": fixture.shard_size} if fixture.shard_size else {}))
    rewrite_configs(path, fixture, config)

    model = load_model(path)
    prompt = random_prompt(fixture, config["vocab_size"], prompt_seed)
    continuation, logits = (x[0] for x in greedy(model, prompt[None]))
    assert_same_model(name, original, model, prompt, logits)

    gaps = top2_gaps(logits, fixture.prompt_len)
    assert gaps.min() >= GAP_MIN and continuation.unique().numel() >= DISTINCT_MIN, f"{name}: search seeds again"
    assert not set(continuation.tolist()) & end_tokens(fixture, config), f"{name}: an end token in the continuation"
    positions = logit_positions(fixture.prompt_len)
    metadata = dict(
        covers=fixture.covers,
        weights_seed=weights_seed,
        prompt_seed=prompt_seed,
        min_top2_gap=f"{gaps.min():.6f}",
        mean_top2_gap=f"{gaps.mean():.6f}",
        distinct_greedy=continuation.unique().numel(),
        config_format=f"transformers {fixture.format}",
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    tensors = dict(
        prompt=prompt.to(torch.int32),
        greedy=continuation.to(torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        logits=logits[positions],
    )
    write_safetensors(path / "golden.safetensors", tensors, {key: str(value) for key, value in metadata.items()})
    size_bytes = sum(file.stat().st_size for file in path.iterdir())
    print(
        f"{name:26} {size_bytes / 1000:6.0f} kB  gap min {gaps.min():.4f} mean {gaps.mean():.2f}  "
        f"distinct {continuation.unique().numel():3}  max |logit| {logits.abs().max():.1f}",
        flush=True,
    )


def assert_same_model(name: str, original, loaded, prompt: torch.Tensor, logits: torch.Tensor):
    """What the disk holds, in either format of config.json, is the model that was made."""
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in original.state_dict().items()), name
    assert original.config.rope_parameters.items() <= loaded.config.rope_parameters.items(), (
        name
    )  # `type` stays in the latter
    assert torch.equal(original.model.rotary_emb.original_inv_freq, loaded.model.rotary_emb.original_inv_freq), name
    # Not bit for bit: matrix-vector products depend on how the loaded weights are aligned.
    difference = (logits - greedy(original, prompt[None])[1][0]).abs().max()
    assert difference <= CHECK_TOLERANCE * logits.abs().max(), f"{name}: {difference}"


def end_tokens(fixture: Fixture, config: dict) -> set[int]:
    in_config = config["eos_token_id"]
    return {*(in_config if isinstance(in_config, list) else [in_config]), *(fixture.generation_eos or [])}


def rewrite_configs(path: pathlib.Path, fixture: Fixture, config: dict):
    written = json.loads((path / "config.json").read_text())
    if fixture.format == 4:
        written = as_transformers_4(written, fixture, config)
    write_json(path / "config.json", written | fixture.extra)
    (path / "generation_config.json").unlink(missing_ok=True)
    if fixture.generation_eos:
        write_json(
            path / "generation_config.json",
            dict(bos_token_id=config["bos_token_id"], eos_token_id=fixture.generation_eos),
        )


def as_transformers_4(written: dict, fixture: Fixture, config: dict) -> dict:
    """config.json as transformers 4 wrote it, without layer_types and a head_dim that can be derived."""
    parameters = dict(written.pop("rope_parameters"))
    rope_type, written["rope_theta"] = parameters.pop("rope_type"), parameters.pop("rope_theta")
    written["rope_scaling"] = None if rope_type == "default" else {fixture.scaling_key: rope_type, **parameters}
    written["torch_dtype"] = written.pop("dtype")
    written.pop("layer_types", None)
    if config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]:
        written.pop("head_dim", None)
    written["transformers_version"] = "4.46.0"
    return dict(sorted(written.items()))


def write_safetensors(path: pathlib.Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]):
    """As safetensors.torch.save_file, which however writes the metadata in a new order each time."""
    header, offset = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        size_bytes = tensor.numel() * tensor.element_size()
        dtype = {torch.int32: "I32", torch.float32: "F32"}[tensor.dtype]
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=[offset, offset + size_bytes])
        offset += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    )


def write_json(path: pathlib.Path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


# rope.json


def write_rope(out: pathlib.Path):
    cases = []
    for overrides, lengths in ROPE_CASES:
        for seq_len in lengths:
            inv_freq, attention_factor = rope_parameters(overrides, seq_len)
            cases.append(
                dict(
                    config=ROPE_BASE | overrides,
                    seq_len=seq_len,
                    inv_freq=inv_freq.tolist(),
                    attention_factor=attention_factor,
                )
            )
    (out / "rope.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"rope.json: {len(cases)} cases")


def rope_parameters(overrides: dict, seq_len: int | None) -> tuple[torch.Tensor, float]:
    config = AutoConfig.for_model("llama", **json.loads(json.dumps(ROPE_BASE | overrides)))
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    # A tensor, as the model's forward pass gives it: the base is then f32.
    return ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=None if seq_len is None else torch.tensor(seq_len))


# Checks


def check_fixture(name: str, fixture: Fixture, out: pathlib.Path) -> bool:
    path = out / "models" / name
    with safe_open(path / "golden.safetensors", "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}
    prompt, continuation, positions = (golden[key].long() for key in ("prompt", "greedy", "positions"))
    scale = golden["logits"].abs().max()
    tokens = torch.cat([prompt, continuation])[:-1]

    # Dynamic RoPE has no uncached twin: there the keys' rotation depends on when they were cached.
    is_dynamic = (BASE | fixture.config)["rope_parameters"]["rope_type"] == "dynamic"
    model = load_model(path)
    logits = replay(model, prompt, continuation) if is_dynamic else uncached(model, tokens)
    difference = (logits[positions] - golden["logits"]).abs().max() / scale
    same_tokens = torch.equal(logits[len(prompt) - 1 :].argmax(-1), continuation)

    twin = "replayed" if is_dynamic else "uncached"
    print(
        f"{name:26} {twin} differs by {difference:.1e} of max |logit|, tokens {'equal' if same_tokens else 'DIFFER'}",
        end="",
    )
    ok = bool(difference <= CHECK_TOLERANCE) and same_tokens
    if TRANSFORMERS_4:  # knows no rope_parameters to remove a feature with
        print("" if ok else "  FAILED")
        return ok

    without = uncached(remove_feature(path, fixture), tokens)
    feature = (without[positions] - golden["logits"]).abs().max() / scale
    ok = ok and bool(feature >= FEATURE_MIN)
    print(f"; without the feature {feature:.1e}{'' if ok else '  FAILED'}")
    if is_dynamic:
        print(
            f"{'':26} (all keys rotated anew with the last frequencies: "
            f"{(uncached(model, tokens)[positions] - golden['logits']).abs().max() / scale:.1e})"
        )
    return ok


@torch.no_grad()
def uncached(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens[None], use_cache=False).logits[0]


@torch.no_grad()
def replay(model, prompt: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    chunks = [prompt, *continuation[:-1, None]]
    return torch.cat(
        [model(input_ids=chunk[None], past_key_values=cache, use_cache=True).logits[0] for chunk in chunks]
    )


def remove_feature(path: pathlib.Path, fixture: Fixture):
    model = load_model(path, **(fixture.without if isinstance(fixture.without, dict) else {}))
    if fixture.without == "bias":
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(weight)
    if fixture.without == "qk_norm":
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    return model


# Seeds


def search_seeds(name: str, fixture: Fixture):
    """Prints the first weights seed for which a prompt seed fits, and the prompt seed with the largest minimal gap."""
    config = BASE | fixture.config
    prompts = torch.stack([random_prompt(fixture, config["vocab_size"], seed) for seed in range(SEARCH_PROMPTS)])
    for weights_seed in range(100):
        continuations, logits = greedy(new_model(fixture, config, weights_seed), prompts)
        gaps = top2_gaps(logits, fixture.prompt_len)
        usable = [
            (gaps[row].min().item(), row)
            for row, tokens in enumerate(continuations)
            if tokens.unique().numel() >= DISTINCT_MIN and not set(tokens.tolist()) & end_tokens(fixture, config)
        ]
        gap, prompt_seed = max(usable, default=(0.0, None))
        if gap >= 1.1 * GAP_MIN:
            print(f"{name}: seeds ({weights_seed}, {prompt_seed}), gap {gap:.4f}", flush=True)
            return
        print(f"{name}: weights {weights_seed} give a gap of {gap:.4f} at best", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("arguments", nargs="+", metavar="OUT_DIR [NAME...]")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    out, names = (
        (None, options.arguments) if options.search else (pathlib.Path(options.arguments[0]), options.arguments[1:])
    )
    chosen = {name: FIXTURES[name] for name in names or FIXTURES if FIXTURES[name].format == 4 or not TRANSFORMERS_4}
    if options.search:
        for name, fixture in chosen.items():
            search_seeds(name, fixture)
    elif options.check:
        if not all([check_fixture(name, fixture, out) for name, fixture in chosen.items()]):
            raise SystemExit("some fixtures failed")
    else:
        for name, fixture in chosen.items():
            write_fixture(name, fixture, out)
        if not names:
            write_rope(out)


if __name__ == "__main__":
    main()
