//! What [`super::check_tiers`] tries: each kind of digest, score and rule, on shapes that differ in what tiers look at.

use super::{heads_of, method};
use crate::HeadShape;
use crate::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score, TwoSided};

/// Shapes, and what the requests may ask for.
pub(super) struct Case {
    pub(super) heads: HeadShape,
    pub(super) page_tokens: usize,
    pub(super) digests: Vec<DigestSpec>,
    pub(super) methods: Vec<Method>,
    /// Of layer 1.
    pub(super) window: Option<usize>,
}

pub(super) fn cases() -> Vec<Case> {
    let spec = |kind, partition_tokens| DigestSpec { kind, partition_tokens };
    let by = |digests| Score::Digest { digests };
    let plain = method(16, by(0));
    let sinks = Always { sink_tokens: 20, recent_tokens: 40, ..plain.always };
    let none = Always { recent_tokens: 0, ..plain.always };
    let shadow = Always { recent_tokens: 32, generated_tokens: 20, outliers: 5, ..plain.always };
    let gate = DigestKind::Gate { dim: 32 };
    let cluster = |span_tokens, sink_tokens, copy| DigestKind::Cluster { span_tokens, sink_tokens, copy };
    let clusters = |span_tokens, estimate_permille, copy| Method {
        softmax: true,
        always: Always { sink_tokens: 4, recent_tokens: 64, ..plain.always },
        take_min: 0,
        rule: Rule::Clusters { span_tokens, estimate_permille, copy },
        ..plain
    };
    vec![
        Case {
            heads: heads_of(4, 2, 32),
            page_tokens: 16,
            digests: vec![spec(DigestKind::MinMax, 16), spec(DigestKind::CuboidMean, 32), spec(gate, 32)],
            methods: vec![
                plain,
                Method { always: none, open_competes: true, take_min: 3, ..plain },
                Method { always: sinks, partition_tokens: 32, score: by(1), ..plain },
                Method { dense_layers: 1, reduce: Reduce::Max, ..plain },
                Method { score: Score::Recency, partition_tokens: 1, always: sinks, ..plain },
                Method { partition_tokens: 32, score: Score::Gate { digests: 2 }, ..plain },
                Method {
                    partition_tokens: 32,
                    score: Score::Gate { digests: 2 },
                    softmax: true,
                    rule: Rule::Threshold(0.06),
                    ..plain
                },
            ],
            window: None,
        },
        Case {
            heads: heads_of(3, 3, 32),
            page_tokens: 8,
            // Of sizes that do not divide each other.
            digests: vec![
                spec(DigestKind::MinMax, 64),
                spec(DigestKind::CuboidMean, 24),
                spec(DigestKind::Landmark, 8),
            ],
            methods: vec![
                Method { partition_tokens: 64, reduce: Reduce::MeanQuery, ..plain },
                Method { partition_tokens: 24, score: by(1), ..plain },
                Method { partition_tokens: 24, score: by(1), always: none, open_competes: true, ..plain },
                Method {
                    partition_tokens: 8,
                    score: by(2),
                    always: shadow,
                    reduce: Reduce::Max,
                    softmax: true,
                    ..plain
                },
                Method { partition_tokens: 8, score: by(2), always: shadow, ..plain },
            ],
            window: Some(100),
        },
        Case {
            heads: heads_of(8, 1, 64),
            page_tokens: 64,
            digests: vec![
                spec(DigestKind::Mean, 8),
                spec(DigestKind::Fp8(TwoSided::MinMax), 16),
                spec(DigestKind::Fp8(TwoSided::CuboidMean), 128),
            ],
            methods: vec![
                Method { partition_tokens: 8, scope: Scope::Layer, ..plain },
                Method { score: by(1), ..plain },
                Method { partition_tokens: 128, score: by(2), ..plain },
                Method { partition_tokens: 8, score: Score::Random { seed: 2 }, ..plain },
                Method { score: Score::Replay { seed: 3, overlap_permille: 850 }, ..plain },
            ],
            window: None,
        },
        Case {
            heads: heads_of(4, 2, 32),
            page_tokens: 16,
            digests: vec![
                spec(cluster(128, 4, 0), 16),
                spec(DigestKind::Mean, 16),
                spec(cluster(64, 4, 1), 8),
            ],
            methods: vec![
                clusters(128, 232, 0),
                Method { score: by(1), ..plain },
                Method { partition_tokens: 8, score: by(2), ..clusters(64, 100, 1) },
                // In a place where clusters may have left pseudo-tokens, of each head.
                Method { score: by(1), scope: Scope::Layer, ..plain },
            ],
            window: None,
        },
    ]
}
