//! `random`: partitions by lot. The other half of the floor that any method must beat.

use ops::sparse::{Always, Method, Reduce, Rule, Scope, Score};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/random.md`.
pub const RANDOM: Policy = Policy {
    name: "random",
    summary: "partitions drawn by lot, anew for each token: a floor for comparison",
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
        OptionDoc { name: "seed", default: "0", help: "of the lots" },
    ],
    build,
};

fn build(options: &mut Options) -> Result<Setup, Error> {
    let method = Method {
        dense_layers: 0,
        partition_tokens: options.number("partition", 16, 1, 1024)?,
        score: Score::Random { seed: options.number("seed", 0, 0, u64::MAX)? },
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
