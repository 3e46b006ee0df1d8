//! `retroinfer`: clusters of keys, the best attended to token by token, the next ones by their means. One of SPIN's methods.

use ops::cluster::{CLUSTER_TOKENS_MAX, CLUSTERS_MAX};
use ops::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/retroinfer.md`.
pub const RETROINFER: Policy = Policy {
    name: "retroinfer",
    summary: "clusters of keys by their centroids, further ones estimated by their mean values",
    source: "Chen et al. 2025, RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference (span by span)",
    options: &[
        OptionDoc {
            name: "span",
            default: "256",
            help: "tokens that are clustered together, a multiple of 64; prefixes are shared in whole spans",
        },
        OptionDoc { name: "partition", default: "16", help: "tokens per cluster on average" },
        OptionDoc {
            name: "estimate",
            default: "23.2%",
            help: "clusters that are estimated beside those selected, as a share of all; 0% attends to the selected ones alone",
        },
        OptionDoc {
            name: "sinks",
            default: "4",
            help: "first tokens that are always attended and belong to no cluster",
        },
        OptionDoc {
            name: "window",
            default: "64",
            help: "latest tokens that are always attended, with the spans that they reach into",
        },
        OptionDoc { name: "dense-layers", default: "0", help: "first layers that attend to everything" },
    ],
    build,
};

/// Pages have at most so many tokens, and a span consists of whole pages.
const SPAN_UNIT: usize = 64;

fn build(options: &mut Options) -> Result<Setup, Error> {
    let partition_tokens = options.number("partition", 16, 1, CLUSTER_TOKENS_MAX)?;
    let span_tokens: usize = options.number("span", 256, SPAN_UNIT, CLUSTERS_MAX * CLUSTER_TOKENS_MAX)?;
    let most = CLUSTERS_MAX * partition_tokens;
    let unit = SPAN_UNIT.max(partition_tokens);
    if !span_tokens.is_multiple_of(SPAN_UNIT)
        || !span_tokens.is_multiple_of(partition_tokens)
        || span_tokens > most
    {
        let (option, value) = ("span", span_tokens.to_string());
        let allowed = format!("a multiple of {SPAN_UNIT} and of partition, from {unit} to {most}");
        return Err(Error::BadValue { option, value, allowed });
    }
    let estimate_permille = options.permille("estimate", 232)?;
    let sink_tokens = options.number("sinks", 4, 0, SPAN_UNIT as u32 / 2)?;
    let method = Method {
        dense_layers: options.number("dense-layers", 0, 0, 1024)?,
        partition_tokens,
        score: Score::Digest { digests: 0 },
        // A sum has the same order.
        reduce: Reduce::Mean,
        softmax: true,
        scope: Scope::KvHead,
        always: Always {
            sink_tokens,
            recent_tokens: options.number("window", 64, 1, 1 << 20)?,
            generated_tokens: 0,
            outliers: 0,
        },
        open_competes: false,
        take_min: 0,
        rule: Rule::Clusters { span_tokens, estimate_permille, copy: 0 },
    };
    let kind = DigestKind::Cluster { span_tokens, sink_tokens: sink_tokens as usize, copy: 0 };
    Ok(Setup { digest: Some(DigestSpec { kind, partition_tokens }), method: Some(method) })
}
