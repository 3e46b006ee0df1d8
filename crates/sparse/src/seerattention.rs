//! `seerattention`: partitions by a learned gate, as SeerAttention-R trains one beside a model. One of SPIN's methods.

use ops::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// See `docs/policies/seerattention.md`.
pub const SEERATTENTION: Policy = Policy {
    name: "seerattention",
    summary: "partitions by a learned gate, whose weights come with the model or from a file",
    source: "Gao et al. 2025, SeerAttention-R: Sparse Attention Adaptation for Long Reasoning (its decode)",
    options: &[
        OptionDoc {
            name: "partition",
            default: "32",
            help: "tokens per partition, as the gate was trained; divides the page or is a multiple of it",
        },
        OptionDoc {
            name: "gate",
            default: "model",
            help: "safetensors file with the gate's weights; model: gate.safetensors of the model",
        },
        OptionDoc {
            name: "threshold",
            default: "0",
            help: "least probability of a partition that is selected, within the budget; 0 selects as many as the budget holds",
        },
        OptionDoc {
            name: "sinks",
            default: "0",
            help: "first tokens that are always attended, in whole partitions",
        },
        OptionDoc { name: "dense-layers", default: "0", help: "first layers that attend to everything" },
    ],
    build,
};

fn build(options: &mut Options) -> Result<Setup, Error> {
    let partition_tokens = options.number("partition", 32, 1, 1024)?;
    // A server reads the file, once: see `Served::gate`.
    options.text("gate", "model")?;
    let threshold = options.number("threshold", 0.0, 0.0, 1.0)?;
    let method = Method {
        dense_layers: options.number("dense-layers", 0, 0, 1024)?,
        partition_tokens,
        score: Score::Gate { digests: 0 },
        // There is one score per KV head.
        reduce: Reduce::Mean,
        // Probabilities have the order of scores, so only a threshold needs them.
        softmax: threshold > 0.0,
        scope: Scope::KvHead,
        always: Always {
            sink_tokens: options.number("sinks", 0, 0, 1 << 20)?,
            recent_tokens: 1,
            generated_tokens: 0,
            outliers: 0,
        },
        open_competes: false,
        take_min: 1,
        rule: if threshold > 0.0 { Rule::Threshold(threshold) } else { Rule::Top },
    };
    let digest = DigestSpec { kind: DigestKind::Gate { dim: 0 }, partition_tokens };
    Ok(Setup { digest: Some(digest), method: Some(method) })
}
