//! `replay`: partitions by lots that are drawn anew now and then, so that consecutive selections share a stated part. For
//! benches of caches: no model selects like this, but its locality is known.

use ops::sparse::{Always, Method, Reduce, Rule, Scope, Score};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/replay.md`.
pub const REPLAY: Policy = Policy {
    name: "replay",
    summary: "partitions drawn by lot with a stated overlap from step to step: for benches of caches",
    source: "-",
    options: &[
        OptionDoc { name: "partition", default: "16", help: "tokens per partition" },
        OptionDoc {
            name: "sinks",
            default: "4",
            help: "first tokens that are always attended, in whole partitions",
        },
        OptionDoc {
            name: "window",
            default: "64",
            help: "latest tokens that are always attended, in whole partitions",
        },
        OptionDoc {
            name: "overlap",
            default: "0.85",
            help: "share of the drawn partitions that the step before had drawn, 0 to 1 in thousandths",
        },
        OptionDoc { name: "seed", default: "0", help: "of the lots" },
    ],
    build,
};

fn build(options: &mut Options) -> Result<Setup, Error> {
    let overlap: f64 = options.number("overlap", 0.85, 0.0, 1.0)?;
    let overlap_permille = (overlap * 1000.0).round() as u16;
    let method = Method {
        dense_layers: 0,
        partition_tokens: options.number("partition", 16, 1, 1024)?,
        score: Score::Replay { seed: options.number("seed", 0, 0, u64::MAX)?, overlap_permille },
        reduce: Reduce::Mean,
        softmax: false,
        scope: Scope::KvHead,
        always: Always {
            sink_tokens: options.number("sinks", 4, 0, 1 << 20)?,
            recent_tokens: options.number("window", 64, 0, 1 << 20)?,
            generated_tokens: 0,
            outliers: 0,
        },
        open_competes: false,
        take_min: 1,
        rule: Rule::Top,
    };
    Ok(Setup { digest: None, method: Some(method) })
}
