//! `arkvale`: Quest's score on a tighter box around each partition's keys, with sinks and a window. The method that the
//! SparseServe paper builds on.

use ops::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score, TwoSided};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/arkvale.md`.
pub const ARKVALE: Policy = Policy {
    name: "arkvale",
    summary: "partitions by their keys' mean box (cuboid-mean), with sinks and a window",
    source: "Chen et al. 2024, ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction (pure top-k)",
    options: &[
        OptionDoc {
            name: "partition",
            default: "32",
            help: "tokens per partition; divides the page or is a multiple of it",
        },
        OptionDoc {
            name: "sinks",
            default: "32",
            help: "first tokens that are always attended, in whole partitions",
        },
        OptionDoc {
            name: "window",
            default: "64",
            help: "latest tokens that are always attended, in whole partitions",
        },
        OptionDoc { name: "scope", default: "kv-head", help: "who shares a selection: kv-head or layer" },
        OptionDoc {
            name: "digest",
            default: "same",
            help: "type of digests: same as K, or fp8, rounded outward",
        },
        OptionDoc { name: "dense-layers", default: "0", help: "first layers that attend to everything" },
    ],
    build,
};

fn build(options: &mut Options) -> Result<Setup, Error> {
    let partition_tokens = options.number("partition", 32, 1, 1024)?;
    let kind = options.choice(
        "digest",
        &[("same", DigestKind::CuboidMean), ("fp8", DigestKind::Fp8(TwoSided::CuboidMean))],
    )?;
    let method = Method {
        dense_layers: options.number("dense-layers", 0, 0, 1024)?,
        partition_tokens,
        score: Score::Digest { digests: 0 },
        reduce: Reduce::Mean,
        softmax: false,
        scope: options.choice("scope", &[("kv-head", Scope::KvHead), ("layer", Scope::Layer)])?,
        always: Always {
            sink_tokens: options.number("sinks", 32, 0, 1 << 20)?,
            recent_tokens: options.number("window", 64, 0, 1 << 20)?,
            generated_tokens: 0,
            outliers: 0,
        },
        open_competes: false,
        take_min: 1,
        rule: Rule::Top,
    };
    let digest = DigestSpec { kind, partition_tokens };
    Ok(Setup { digest: Some(digest), method: Some(method) })
}
