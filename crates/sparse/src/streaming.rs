//! `streaming`: the first tokens and the latest ones. Half of the floor that any method must beat.

use ops::sparse::{Always, Method, Reduce, Rule, Scope, Score};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/streaming.md`.
pub const STREAMING: Policy = Policy {
    name: "streaming",
    summary: "the first tokens and the latest, whatever the query: a floor for comparison",
    source: "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks (without moving positions)",
    options: &[OptionDoc { name: "sinks", default: "4", help: "first tokens that are always attended" }],
    build,
};

fn build(options: &mut Options) -> Result<Setup, Error> {
    let sink_tokens = options.number("sinks", 4, 0, 1 << 20)?;
    let method = Method {
        dense_layers: 0,
        partition_tokens: 1,
        score: Score::Recency,
        reduce: Reduce::Mean,
        softmax: false,
        scope: Scope::KvHead,
        always: Always { sink_tokens, recent_tokens: 1, generated_tokens: 0, outliers: 0 },
        open_competes: false,
        take_min: 0,
        rule: Rule::Top,
    };
    Ok(Setup { digest: None, method: Some(method) })
}
