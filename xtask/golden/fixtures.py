"""The table of fixtures: one tiny model per architecture option, and the configurations of rope.json.

Configurations are written here as transformers 5 names them; `format: 4` asks for a config.json in the older form.
"""

from dataclasses import dataclass, field

import torch

BOS, EOS = 1, 2
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Fixture:
    architecture: str  # model_type: llama, mistral, qwen2 or qwen3
    covers: str  # one sentence
    prompt_len: int
    seeds: tuple[int, int]  # (weights, prompt), found by `generate.py --search`
    config: dict = field(default_factory=dict)  # over BASE
    format: int = 5  # of config.json: transformers 4 or 5
    scaling_key: str = "rope_type"  # or "type", the older spelling, format 4 only
    extra: dict = field(default_factory=dict)  # written into config.json as is; must not change the model
    disk_dtype: torch.dtype = torch.float32
    shard_size: str | None = None
    generation_eos: list[int] | None = None  # writes a generation_config.json
    without: dict | str = field(default_factory=dict)  # what --check removes: config overrides, or "bias", "qk_norm"


BASE = dict(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=MAX_POSITIONS,
    rms_norm_eps=1e-5,
    bos_token_id=BOS,
    eos_token_id=EOS,
    tie_word_embeddings=False,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)

DEFAULT_ROPE = BASE["rope_parameters"]
SMALL = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)


def rope(rope_type, theta=10000.0, **parameters):
    return dict(rope_type=rope_type, rope_theta=theta, **parameters)


FIXTURES = {
    "llama-default": Fixture(
        "llama",
        "Llama with grouped-query attention, untied embeddings, default RoPE",
        77,
        (0, 29),
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "llama-mha-tied": Fixture(
        "llama",
        "Llama 2 form: multi-head attention, tied embeddings, head_dim not in config.json",
        53,
        (0, 6),
        dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=131),
        format=4,
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "llama-mqa": Fixture(
        "llama",
        "multi-query attention (one KV head), attention_bias and mlp_bias",
        91,
        (0, 9),
        dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, vocab_size=160),
        without="bias",
    ),
    "llama-rope-linear": Fixture(
        "llama",
        "linear RoPE scaling, older `type` key",
        69,
        (0, 5),
        SMALL | dict(rope_parameters=rope("linear", factor=4.0)),
        format=4,
        scaling_key="type",
        without=dict(rope_parameters=DEFAULT_ROPE),
    ),
    "llama-rope-dynamic": Fixture(
        "llama",
        "dynamic NTK RoPE: the prompt is shorter than max_position_embeddings, the continuation crosses it",
        61,
        (0, 13),
        SMALL | dict(max_position_embeddings=96, rope_parameters=rope("dynamic", factor=4.0)),
        without=dict(rope_parameters=DEFAULT_ROPE),
    ),
    "llama-rope-dynamic-long": Fixture(
        "llama",
        "dynamic NTK RoPE: the prompt is longer than max_position_embeddings; older `type` key",
        117,
        (0, 62),
        SMALL | dict(max_position_embeddings=96, rope_parameters=rope("dynamic", factor=4.0)),
        format=4,
        scaling_key="type",
        without=dict(rope_parameters=DEFAULT_ROPE),
    ),
    "llama-rope-llama3": Fixture(
        "llama",
        "llama3 RoPE scaling, prompt longer than original_max_position_embeddings",
        83,
        (0, 60),
        SMALL
        | dict(
            rope_parameters=rope(
                "llama3",
                500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
        format=4,
        without=dict(rope_parameters=rope("default", 500000.0)),
    ),
    "llama-rope-yarn": Fixture(
        "llama",
        "YaRN with its default factors, prompt longer than original_max_position_embeddings",
        85,
        (0, 48),
        SMALL | dict(rope_parameters=rope("yarn", factor=8.0, original_max_position_embeddings=64)),
        format=4,
        without=dict(rope_parameters=DEFAULT_ROPE),
    ),
    "llama-rope-yarn-factors": Fixture(
        "llama",
        "YaRN with explicit attention_factor, beta_fast, beta_slow and truncate=false",
        102,
        (0, 31),
        SMALL
        | dict(
            rope_parameters=rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=64,
                attention_factor=1.35,
                beta_fast=6.0,
                beta_slow=0.5,
                truncate=False,
            )
        ),
        without=dict(rope_parameters=rope("yarn", factor=8.0, original_max_position_embeddings=64)),
    ),
    "llama-rope-yarn-mscale": Fixture(
        "llama",
        "YaRN whose attention factor comes from mscale and mscale_all_dim",
        71,
        (0, 5),
        SMALL
        | dict(
            rope_parameters=rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=64,
                beta_fast=16,
                beta_slow=1,
                mscale=0.5,
                mscale_all_dim=1.5,
            )
        ),
        format=4,
        without=dict(rope_parameters=rope("yarn", factor=8.0, original_max_position_embeddings=64)),
    ),
    "llama-head32": Fixture(
        "llama",
        "head_dim 32 = hidden_size / heads, without head_dim in config.json",
        45,
        (0, 24),
        dict(
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=3,
            intermediate_size=72,
            vocab_size=199,
        ),
        format=4,
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "llama-head96": Fixture(
        "llama",
        "head_dim 96, set explicitly",
        59,
        (0, 13),
        dict(num_attention_heads=2, num_key_value_heads=1, head_dim=96, intermediate_size=64),
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "llama-head256": Fixture(
        "llama",
        "head_dim 256, set explicitly",
        43,
        (1, 39),
        dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=256, intermediate_size=64),
        format=4,
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "mistral-full": Fixture(
        "mistral",
        "Mistral with sliding_window null",
        93,
        (0, 50),
        dict(sliding_window=None, rope_parameters=rope("default", 1000000.0)),
        without=dict(sliding_window=48),
    ),
    "mistral-window": Fixture(
        "mistral",
        "Mistral whose prompt is longer than its sliding window of 48; head_dim null in config.json",
        150,
        (0, 14),
        dict(
            sliding_window=48,
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=3,
            intermediate_size=64,
        ),
        format=4,
        extra=dict(head_dim=None),
        without=dict(sliding_window=49),
    ),
    "qwen2-bias": Fixture(
        "qwen2",
        "Qwen2: bias on q, k and v only, tied embeddings, a sliding_window that use_sliding_window=false disables",
        74,
        (0, 49),
        dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, vocab_size=151),
        format=4,
        extra=dict(sliding_window=32, max_window_layers=1, use_sliding_window=False),
        without="bias",
    ),
    "qwen2-window": Fixture(
        "qwen2",
        "Qwen2 with use_sliding_window: layer 0 attends to all, layers 1 and 2 (max_window_layers=1) to a window of 40",
        118,
        (0, 13),
        dict(
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=3,
            intermediate_size=72,
            use_sliding_window=True,
            sliding_window=40,
            max_window_layers=1,
        ),
        format=4,
        without=dict(sliding_window=41),
    ),
    "qwen3-qknorm": Fixture(
        "qwen3",
        "Qwen3: RMS norm of q and k per head, head_dim different from hidden_size / heads",
        87,
        (0, 15),
        dict(
            head_dim=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            rms_norm_eps=1e-6,
            rope_parameters=rope("default", 1000000.0),
        ),
        without="qk_norm",
    ),
    "qwen3-window": Fixture(
        "qwen3",
        "Qwen3 with layer_types that max_window_layers alone could not say: sliding (40), full, sliding",
        109,
        (0, 61),
        dict(
            num_hidden_layers=3,
            intermediate_size=56,
            use_sliding_window=True,
            sliding_window=40,
            max_window_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        without=dict(layer_types=["full_attention"] * 3),
    ),
    "llama-sharded": Fixture(
        "llama",
        "weights in several safetensors shards with an index",
        66,
        (0, 33),
        dict(vocab_size=144),
        shard_size="90KB",
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "llama-bf16-disk": Fixture(
        "llama",
        "weights stored as bf16, widened exactly and computed in f32",
        98,
        (0, 32),
        dict(intermediate_size=96),
        format=4,
        disk_dtype=torch.bfloat16,
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "llama-f16-disk": Fixture(
        "llama",
        "weights stored as f16, widened exactly and computed in f32",
        79,
        (0, 5),
        dict(intermediate_size=96),
        disk_dtype=torch.float16,
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
    "llama-eos-list": Fixture(
        "llama",
        "eos_token_id as a list in config.json and a longer one in generation_config.json",
        58,
        (2, 36),
        dict(eos_token_id=[EOS, 5]),
        format=4,
        generation_eos=[EOS, 5, 9],
        without=dict(rope_parameters=rope("default", 20000.0)),
    ),
}


# Configurations of rope.json: (over ROPE_BASE, sequence lengths; None where the length has no influence).
ROPE_BASE = dict(hidden_size=256, num_attention_heads=4, max_position_embeddings=4096)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=1024)

ROPE_CASES = [
    (dict(rope_parameters=rope("default")), [None]),
    (dict(rope_parameters=rope("default", 500000.0), head_dim=128), [None]),
    (dict(rope_parameters=rope("default", 1e8), head_dim=96), [None]),
    (dict(rope_parameters=rope("linear", factor=4.0)), [None]),
    (dict(rope_parameters=rope("linear", 1000000.0, factor=2.5), head_dim=32), [None]),
    (dict(rope_parameters=rope("dynamic", factor=2.0)), [None, 1, 4095, 4096, 4097, 5000, 8192, 20000]),
    (
        dict(rope_parameters=rope("dynamic", factor=4.0), max_position_embeddings=96, head_dim=32),
        [61, 96, 97, 117, 317, 384],
    ),
    (
        dict(
            rope_parameters=rope(
                "llama3",
                500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            head_dim=128,
            max_position_embeddings=131072,
        ),
        [None],
    ),
    (
        dict(
            rope_parameters=rope(
                "llama3",
                500000.0,
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            head_dim=64,
            max_position_embeddings=131072,
        ),
        [None],
    ),
    (dict(rope_parameters=YARN), [None]),
    (dict(rope_parameters=YARN | dict(truncate=False)), [None]),
    (dict(rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=2.0)), [None]),
    (dict(rope_parameters=YARN | dict(beta_fast=16, beta_slow=2, truncate=False), head_dim=96), [None]),
    (dict(rope_parameters=YARN | dict(attention_factor=1.0)), [None]),
    (dict(rope_parameters=YARN | dict(attention_factor=0.75, mscale=1.0, mscale_all_dim=0.5)), [None]),
    (dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)), [None]),
    (dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.5)), [None]),
    (dict(rope_parameters=YARN | dict(mscale=0.707)), [None]),
    # A factor that is not max_position_embeddings / original_max_position_embeddings: the factor counts.
    (dict(rope_parameters=YARN | dict(factor=2.0)), [None]),
    # No original_max_position_embeddings: max_position_embeddings takes its place.
    (dict(rope_parameters=rope("yarn", 1000000.0, factor=4.0), head_dim=128), [None]),
    # The correction range clamped below to 0, and above to head_dim - 1.
    (dict(rope_parameters=rope("yarn", factor=8.0, original_max_position_embeddings=64), head_dim=32), [None]),
    (dict(rope_parameters=rope("yarn", 10.0, factor=4.0, original_max_position_embeddings=4096), head_dim=32), [None]),
]
