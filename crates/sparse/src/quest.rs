//! `quest`: an upper bound of every token's score, from the extremes of each partition's keys.

use ops::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score, TwoSided};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/quest.md`.
pub const QUEST: Policy = Policy {
    name: "quest",
    summary: "partitions by an upper bound of their tokens' scores (min and max of keys)",
    source: "Tang et al. 2024, Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    options: &[
        OptionDoc {
            name: "partition",
            default: "16",
            help: "tokens per partition; divides the page or is a multiple of it",
        },
        OptionDoc {
            name: "group",
            default: "mean",
            help: "how the scores of the query heads of a KV head become one: mean, max, or query-mean (the score of the \
                   mean query)",
        },
        OptionDoc { name: "scope", default: "kv-head", help: "who shares a selection: kv-head or layer" },
        OptionDoc {
            name: "last",
            default: "always",
            help: "the partition of the token itself: always attended, or made to compete like any other",
        },
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
    let partition_tokens = options.number("partition", 16, 1, 1024)?;
    let kind = options
        .choice("digest", &[("same", DigestKind::MinMax), ("fp8", DigestKind::Fp8(TwoSided::MinMax))])?;
    let competes = options.choice("last", &[("always", false), ("compete", true)])?;
    let method = Method {
        dense_layers: options.number("dense-layers", 0, 0, 1024)?,
        partition_tokens,
        score: Score::Digest { digests: 0 },
        reduce: options.choice(
            "group",
            &[("mean", Reduce::Mean), ("max", Reduce::Max), ("query-mean", Reduce::MeanQuery)],
        )?,
        softmax: false,
        scope: options.choice("scope", &[("kv-head", Scope::KvHead), ("layer", Scope::Layer)])?,
        always: Always {
            sink_tokens: 0,
            recent_tokens: u32::from(!competes),
            generated_tokens: 0,
            outliers: 0,
        },
        open_competes: competes,
        // The authors' evaluation never selects fewer than three pages, their kernels force the current one.
        take_min: if competes { 3 } else { 1 },
        rule: Rule::Top,
    };
    Ok(Setup { digest: Some(DigestSpec { kind, partition_tokens }), method: Some(method) })
}
