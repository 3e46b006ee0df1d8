//! `shadowkv`: small chunks by the mean of their keys, with those kept apart that no mean stands for. One of SPIN's methods.

use ops::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/shadowkv.md`.
pub const SHADOWKV: Policy = Policy {
    name: "shadowkv",
    summary: "small chunks by the mean of their keys, outlying chunks of the prompt always",
    source: "Sun et al. 2024, ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference (exact keys)",
    options: &[
        OptionDoc {
            name: "partition",
            default: "8",
            help: "tokens per chunk; divides the page or is a multiple of it",
        },
        OptionDoc {
            name: "outliers",
            default: "48",
            help: "chunks of the prompt that are always attended: those with the key least like its chunk's mean",
        },
        OptionDoc {
            name: "local",
            default: "32",
            help: "latest tokens of the prompt that are always attended",
        },
        OptionDoc {
            name: "generated",
            default: "1024",
            help: "latest generated tokens that are always attended; those before them compete",
        },
        OptionDoc { name: "dense-layers", default: "0", help: "first layers that attend to everything" },
    ],
    build,
};

fn build(options: &mut Options) -> Result<Setup, Error> {
    let partition_tokens = options.number("partition", 8, 1, 1024)?;
    let method = Method {
        dense_layers: options.number("dense-layers", 0, 0, 1024)?,
        partition_tokens,
        score: Score::Digest { digests: 0 },
        reduce: Reduce::Max,
        softmax: true,
        scope: Scope::KvHead,
        always: Always {
            sink_tokens: 0,
            recent_tokens: options.number("local", 32, 1, 1 << 20)?,
            generated_tokens: options.number("generated", 1024, 0, 1 << 20)?,
            outliers: options.number("outliers", 48, 0, 1 << 16)?,
        },
        open_competes: false,
        take_min: 1,
        rule: Rule::Top,
    };
    Ok(Setup {
        digest: Some(DigestSpec { kind: DigestKind::Landmark, partition_tokens }),
        method: Some(method),
    })
}
