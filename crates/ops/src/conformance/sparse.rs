//! Digests, scores, selections and attention to them.

use super::{
    Random, Reference, Work, assert_close, assert_same_bits, attention_tolerance, gate_of, heads_of, method,
    normals, tensor,
};
use crate::coverage::{Coverage, Inspection, Inspections, TOP_TOKENS};
use crate::sparse::{
    Always, Attention, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score, SelectionLimits, TwoSided,
    bitmap_words,
};
use crate::{Backend, BlockIndex, DType, HeadShape, KvGeometry, SPLIT_TOKENS, SeatIndex, SequenceRows};

const LAYER: usize = 1;

/// A pool full of random pages, and what a layer needs to attend to it sparsely.
struct Bench<B: Backend> {
    kv: B::Kv,
    digests: Vec<B::Digests>,
    selection: B::Selection,
    heads: HeadShape,
}

/// What is tried.
pub(super) struct Case {
    heads: HeadShape,
    page_tokens: usize,
    pub(super) digests: Vec<DigestSpec>,
    pub(super) methods: Vec<Method>,
}

/// One sequence: tokens in context, rows in this step, tokens of the prompt, method, budget.
#[derive(Clone, Copy)]
struct Row {
    context: usize,
    rows: usize,
    prompt: usize,
    attention: Attention,
}

pub(super) fn cases() -> Vec<Case> {
    let spec = |kind, partition_tokens| DigestSpec { kind, partition_tokens };
    let by = |digests| Score::Digest { digests };
    let sinks = Always { sink_tokens: 20, recent_tokens: 33, generated_tokens: 0, outliers: 0 };
    let none = Always { sink_tokens: 0, recent_tokens: 0, generated_tokens: 0, outliers: 0 };
    let gate = |dim| DigestKind::Gate { dim };
    let (min_max, cuboid) = (DigestKind::Fp8(TwoSided::MinMax), DigestKind::Fp8(TwoSided::CuboidMean));
    let gated = |digests| Score::Gate { digests };
    let clusters = |copy, span_tokens, sink_tokens| DigestKind::Cluster { span_tokens, sink_tokens, copy };
    let whole = |partition_tokens, (digests, copy), span_tokens, sink_tokens, estimate_permille| Method {
        softmax: true,
        always: Always { sink_tokens, recent_tokens: 64, generated_tokens: 0, outliers: 0 },
        take_min: 0,
        rule: Rule::Clusters { span_tokens, estimate_permille, copy },
        ..method(partition_tokens, by(digests))
    };
    let shadow = Always { sink_tokens: 0, recent_tokens: 32, generated_tokens: 20, outliers: 9 };
    vec![
        Case {
            heads: heads_of(8, 2, 64),
            page_tokens: 16,
            digests: vec![spec(DigestKind::MinMax, 16), spec(DigestKind::CuboidMean, 32), spec(gate(64), 32)],
            methods: vec![
                method(16, by(0)),
                Method { always: none, open_competes: true, take_min: 3, ..method(16, by(0)) },
                Method { always: sinks, scope: Scope::Layer, ..method(32, by(1)) },
                Method { dense_layers: LAYER + 1, ..method(32, by(1)) },
                method(32, gated(2)),
            ],
        },
        Case {
            heads: heads_of(3, 3, 80),
            page_tokens: 32,
            digests: vec![spec(DigestKind::Mean, 8), spec(DigestKind::Landmark, 8), spec(gate(40), 8)],
            methods: vec![
                Method { always: sinks, reduce: Reduce::Max, softmax: true, ..method(8, by(0)) },
                Method { always: shadow, reduce: Reduce::Max, softmax: true, ..method(8, by(1)) },
                Method { always: shadow, ..method(8, by(1)) },
                method(4, Score::Random { seed: 3 }),
                method(8, Score::Replay { seed: 5, overlap_permille: 850 }),
                Method { softmax: true, rule: Rule::Threshold(0.03), ..method(8, gated(2)) },
                Method { scope: Scope::Layer, reduce: Reduce::Max, ..method(8, by(0)) },
            ],
        },
        Case {
            heads: heads_of(6, 1, 96),
            page_tokens: 8,
            digests: vec![spec(DigestKind::MinMax, 64), spec(DigestKind::CuboidMean, 8), spec(gate(96), 64)],
            methods: vec![
                Method { reduce: Reduce::MeanQuery, ..method(64, by(0)) },
                Method { softmax: true, ..method(8, by(1)) },
                Method { always: sinks, ..method(1, Score::Recency) },
                Method { scope: Scope::Layer, ..method(8, Score::Replay { seed: 6, overlap_permille: 700 }) },
                Method { scope: Scope::Layer, ..method(64, gated(2)) },
            ],
        },
        Case {
            heads: heads_of(4, 1, 128),
            page_tokens: 64,
            digests: vec![spec(DigestKind::Mean, 1), spec(DigestKind::MinMax, 16), spec(gate(32), 1)],
            methods: vec![
                Method { reduce: Reduce::Max, ..method(1, by(0)) },
                Method { scope: Scope::Layer, always: none, open_competes: true, ..method(16, by(1)) },
                Method { scope: Scope::Layer, ..method(64, Score::Random { seed: 4 }) },
                Method { always: sinks, ..method(1, gated(2)) },
            ],
        },
        Case {
            heads: heads_of(8, 2, 64),
            page_tokens: 16,
            digests: vec![
                spec(clusters(0, 256, 4), 16),
                spec(DigestKind::Mean, 16),
                spec(clusters(1, 64, 0), 1),
            ],
            methods: vec![
                whole(16, (0, 0), 256, 4, 232),
                method(16, by(1)),
                // Every token is its own cluster.
                whole(1, (2, 1), 64, 0, 1000),
            ],
        },
        Case {
            heads: heads_of(6, 1, 96),
            page_tokens: 8,
            digests: vec![spec(clusters(0, 512, 40), 32), spec(clusters(1, 128, 0), 8)],
            methods: vec![whole(32, (0, 0), 512, 40, 300), whole(8, (1, 1), 128, 0, 0)],
        },
        Case {
            heads: heads_of(3, 3, 80),
            page_tokens: 64,
            digests: vec![spec(clusters(0, 128, 4), 16)],
            methods: vec![Method { dense_layers: LAYER, ..whole(16, (0, 0), 128, 4, 150) }],
        },
        Case {
            heads: heads_of(6, 2, 80),
            page_tokens: 16,
            digests: vec![spec(min_max, 16), spec(cuboid, 8), spec(min_max, 32)],
            methods: vec![
                method(16, by(0)),
                Method { reduce: Reduce::Max, ..method(16, by(0)) },
                Method { always: sinks, ..method(8, by(1)) },
                Method { always: none, open_competes: true, take_min: 3, ..method(32, by(2)) },
            ],
        },
        // The widest heads there are, the narrowest, and such as fill no vector.
        Case {
            heads: heads_of(2, 1, 256),
            page_tokens: 64,
            digests: vec![
                spec(DigestKind::MinMax, 64),
                spec(min_max, 64),
                spec(DigestKind::Landmark, 16),
                spec(clusters(0, 256, 4), 64),
            ],
            methods: vec![
                Method { reduce: Reduce::Max, ..method(64, by(0)) },
                Method { always: none, open_competes: true, ..method(64, by(1)) },
                Method { always: shadow, reduce: Reduce::Max, softmax: true, ..method(16, by(2)) },
                whole(64, (3, 0), 256, 4, 300),
            ],
        },
        Case {
            heads: heads_of(3, 3, 2),
            page_tokens: 16,
            digests: vec![spec(cuboid, 16), spec(DigestKind::Landmark, 8), spec(clusters(0, 64, 4), 8)],
            methods: vec![
                method(16, by(0)),
                Method { always: shadow, ..method(8, by(1)) },
                whole(8, (2, 0), 64, 4, 300),
            ],
        },
        Case {
            heads: heads_of(5, 1, 40),
            page_tokens: 8,
            digests: vec![spec(min_max, 8), spec(DigestKind::Landmark, 16), spec(clusters(0, 64, 4), 16)],
            methods: vec![
                Method { reduce: Reduce::Max, ..method(8, by(0)) },
                Method { always: shadow, reduce: Reduce::Max, softmax: true, ..method(16, by(1)) },
                whole(16, (2, 0), 64, 4, 300),
            ],
        },
    ]
}

/// Sequences of one step: a decode, a few replayed tokens, a prompt's end with some of its answer, dense ones, and budgets
/// from nothing to everything.
fn rows(methods: usize, random: &mut Random) -> Vec<Row> {
    let mut all = Vec::new();
    for method in 0..methods as u16 {
        let long = 2 * SPLIT_TOKENS + 40 + random.below(200);
        for (context, rows, prompt, budget) in [
            (long, 1, long - 30, 200),
            (long, 1, 50, 3 * SPLIT_TOKENS / 2),
            (300, 5, 290, 0),
            (130, 9, 126, 90),
            (7, 1, 3, 4),
            (1, 1, 0, 0),
        ] {
            let attention = Attention::Sparse { method, budget: budget as u32 };
            all.push(Row { context, rows, prompt, attention });
        }
    }
    all.push(Row { context: 200, rows: 3, prompt: 0, attention: Attention::Dense });
    all
}

/// The rows as a batch over `tables`.
fn work(rows: &[Row], tables: &[Vec<BlockIndex>], methods: &[Method]) -> Work {
    let steps: Vec<(usize, usize)> = rows.iter().map(|r| (r.context, r.rows)).collect();
    let mut work = Work { methods: methods.to_vec(), ..Work::new(&steps, tables) };
    for (sequence, row) in work.sequences.iter_mut().zip(rows) {
        (sequence.prompt_len, sequence.attention) = (row.prompt as u32, row.attention);
    }
    work
}

/// Block tables for the rows: block `i` of sequence `s` has content `first[s] + i`, wherever it lies.
fn shuffled_tables(rows: &[Row], page_tokens: usize, random: &mut Random) -> Vec<Vec<BlockIndex>> {
    let counts: Vec<usize> = rows.iter().map(|r| r.context.div_ceil(page_tokens)).collect();
    let mut places: Vec<u32> = (0..counts.iter().sum::<usize>() as u32).collect();
    for i in (1..places.len()).rev() {
        places.swap(i, random.below(i + 1));
    }
    let mut places = places.into_iter();
    counts.iter().map(|&n| places.by_ref().take(n).map(BlockIndex).collect()).collect()
}

impl<B: Backend> Bench<B> {
    /// The content of a page depends on `seed`, the sequence and the block's place in it, not on where it lies.
    fn new(
        backend: &mut B,
        case: &Case,
        dtype: DType,
        rows: &[Row],
        tables: &[Vec<BlockIndex>],
        seed: u64,
    ) -> Self {
        let (heads, page_tokens) = (case.heads, case.page_tokens);
        let HeadShape { kv_heads, head_dim, .. } = heads;
        let geometry = KvGeometry { num_layers: LAYER + 1, kv_heads, head_dim, page_tokens, dtype };
        let num_blocks = tables.iter().map(Vec::len).sum();
        let copies = DigestSpec::copies(&case.digests);
        let mut kv = backend.kv(geometry, num_blocks, copies, None).expect("memory");
        for (s, table) in tables.iter().enumerate() {
            for (i, &block) in table.iter().enumerate() {
                for head in 0..kv_heads {
                    let mut random = Random::keyed(seed, ((s << 20 | i) << 8 | head) as u64);
                    let (k, v) = (
                        normals(&mut random, page_tokens * head_dim),
                        normals(&mut random, page_tokens * head_dim),
                    );
                    backend.write_page(&mut kv, LAYER, block, head, &k, &v);
                }
            }
        }
        let gate = gate_of(&case.digests, heads, LAYER + 1, seed);
        let digests =
            case.digests.iter().map(|&spec| backend.digests(spec, geometry, num_blocks, None, gate.as_ref()));
        let digests = digests.collect::<Result<Vec<_>, _>>().expect("memory");
        let context_max = rows.iter().map(|r| r.context).max().expect("rows");
        let num_rows = rows.iter().map(|r| r.rows).sum();
        let limits = SelectionLimits::new(&case.methods, heads, page_tokens, num_rows, context_max);
        let (selection, _) = backend.selection(limits).expect("memory");
        backend.reserve(heads, num_rows, rows.len(), context_max, heads.qkv_cols()).expect("scratch");
        Bench { kv, digests, selection, heads }
    }

    /// Digests of everything before the rows of `work`, then of those.
    fn digest(&mut self, backend: &mut B, rows: &[Row], work: &Work, tables: &[Vec<BlockIndex>]) {
        for table in &mut self.digests {
            for (row, blocks) in rows.iter().zip(tables) {
                if row.context > row.rows {
                    let before = row.context - row.rows;
                    let earlier = Work::new(&[(before, before)], std::slice::from_ref(blocks));
                    backend.digest(table, &mut self.kv, LAYER, &earlier.batch());
                }
            }
            backend.digest(table, &mut self.kv, LAYER, &work.batch());
        }
    }

    fn score(&mut self, backend: &mut B, x: &B::Tensor, work: &Work) {
        let Bench { kv, digests, selection, heads } = self;
        backend.score(selection, digests, kv, LAYER, x, *heads, &work.batch());
    }

    fn select(&mut self, backend: &mut B, work: &Work) {
        backend.select(&mut self.selection, &self.digests, LAYER, self.heads, &work.batch());
    }

    /// A row of output, then its log-sum-exps, row after row.
    fn attend(&mut self, backend: &mut B, x: &B::Tensor, work: &Work) -> Vec<f32> {
        let (rows, heads) = (work.tokens.len(), self.heads);
        let mut out = backend.tensor(rows, heads.q_cols()).expect("memory");
        let mut lse = backend.tensor(rows, heads.q_heads).expect("memory");
        let selection = Some(&self.selection);
        backend.attend(
            &mut out,
            Some(&mut lse),
            &self.kv,
            LAYER,
            x,
            heads,
            None,
            &work.batch(),
            selection,
            0,
        );
        (0..rows)
            .flat_map(|row| [backend.row(&out, row).to_vec(), backend.row(&lse, row).to_vec()].concat())
            .collect()
    }

    /// What the selections of the last rows of sequences cover, as far as these are sparse.
    fn cover(&mut self, backend: &mut B, x: &B::Tensor, work: &Work) -> Vec<(SeatIndex, Coverage)> {
        let mut inspections = Inspections::default();
        let generates =
            |s: &&SequenceRows| s.attention != Attention::Dense && s.context_tokens() > s.prompt_len as usize;
        let asked =
            work.sequences.iter().filter(generates).map(|s| Inspection { seat: s.seat, layer: LAYER as u32 });
        inspections.asked.extend(asked);
        inspections.asked.push(Inspection { seat: SeatIndex(u32::MAX), layer: LAYER as u32 + 1 });
        let Bench { kv, selection, heads, .. } = self;
        backend.cover(&mut inspections, kv, LAYER, x, *heads, &work.batch(), selection);
        assert_eq!(
            inspections.found.len(),
            inspections.asked.len() - 1,
            "what is asked in this layer is found"
        );
        inspections.found
    }

    /// All of it, as a step does.
    fn run(&mut self, backend: &mut B, values: &[f32], work: &Work) -> Vec<f32> {
        let x = tensor(backend, self.heads.qkv_cols(), values);
        self.score(backend, &x, work);
        self.select(backend, work);
        self.attend(backend, &x, work)
    }
}

/// Rounded queries shift scores, and with them weights, and who is among the best.
fn check_coverage(
    what: &str,
    dtype: DType,
    got: &[(SeatIndex, Coverage)],
    expected: &[(SeatIndex, Coverage)],
) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let swapped = if dtype == DType::F32 { 1.0 } else { 3.0 };
    for ((seat, got), (seat_expected, expected)) in got.iter().zip(expected) {
        assert_eq!(seat, seat_expected, "{what}: order");
        let what = format!("{what} {seat:?}: {got:?}, not {expected:?}");
        assert!((got.mass - expected.mass).abs() <= 2.0 * attention_tolerance(dtype), "{what}");
        assert!((got.recall - expected.recall).abs() <= swapped / TOP_TOKENS as f32, "{what}");
    }
}

/// Each operation against the oracle, given the oracle's inputs; then whole layers, whose bits must not depend on the batch
/// nor on where pages lie.
pub fn check_sparse<B: Backend>(backend: &mut B, dtype: DType, seed: u64) {
    for (index, case) in cases().iter().enumerate() {
        let what = format!("seed {seed} sparse {dtype} case {index}");
        let mut random = Random::keyed(seed, 7 + index as u64);
        let rows = rows(case.methods.len(), &mut random);
        let tables = shuffled_tables(&rows, case.page_tokens, &mut random);
        let work_all = work(&rows, &tables, &case.methods);
        let cols = case.heads.qkv_cols();
        let values = normals(&mut random, work_all.tokens.len() * cols);
        let page_seed = random.next_u64();

        let mut oracle = Reference::default();
        let mut expected = Bench::new(&mut oracle, case, dtype, &rows, &tables, page_seed);
        let mut got = Bench::new(backend, case, dtype, &rows, &tables, page_seed);
        expected.digest(&mut oracle, &rows, &work_all, &tables);
        got.digest(backend, &rows, &work_all, &tables);
        check_digests(&what, case, dtype, &rows, &tables, (backend, &got), (&mut oracle, &expected));

        let x = tensor(backend, cols, &values);
        let xo = tensor(&mut oracle, cols, &values);
        got.score(backend, &x, &work_all);
        expected.score(&mut oracle, &xo, &work_all);
        check_scores(&what, case, dtype, &work_all, (backend, &mut got), (&mut oracle, &mut expected));
        got.select(backend, &work_all);
        expected.select(&mut oracle, &work_all);
        check_selections(&what, case, &work_all, (backend, &got), (&mut oracle, &expected));
        let out = got.attend(backend, &x, &work_all);
        let out_expected = expected.attend(&mut oracle, &xo, &work_all);
        assert_close(&format!("{what}: output"), &out, &out_expected, attention_tolerance(dtype));
        let found = got.cover(backend, &x, &work_all);
        check_coverage(&what, dtype, &found, &expected.cover(&mut oracle, &xo, &work_all));

        // With its own scores this time.
        let out = got.run(backend, &values, &work_all);
        for (s, row) in rows.iter().enumerate() {
            let first = work_all.sequences[s].rows.start as usize;
            for i in 0..row.rows {
                let alone = Row { context: row.context - row.rows + i + 1, rows: 1, ..*row };
                let work = work(&[alone], &tables[s..s + 1], &case.methods);
                let values = &values[(first + i) * cols..(first + i + 1) * cols];
                let part = got.run(backend, values, &work);
                let at = (first + i) * (case.heads.q_cols() + case.heads.q_heads);
                let whole = &out[at..at + part.len()];
                assert_same_bits(&format!("{what}: sequence {s} row {i} alone"), &part, whole);
            }
        }
        let tables = shuffled_tables(&rows, case.page_tokens, &mut random);
        let work_moved = work(&rows, &tables, &case.methods);
        let mut moved = Bench::new(backend, case, dtype, &rows, &tables, page_seed);
        moved.digest(backend, &rows, &work_moved, &tables);
        let out_moved = moved.run(backend, &values, &work_moved);
        assert_same_bits(&format!("{what}: pages elsewhere"), &out_moved, &out);
    }
}

fn check_digests<B: Backend>(
    what: &str,
    case: &Case,
    dtype: DType,
    rows: &[Row],
    tables: &[Vec<BlockIndex>],
    (backend, got): (&mut B, &Bench<B>),
    (oracle, expected): (&mut Reference, &Bench<Reference>),
) {
    for (index, spec) in case.digests.iter().enumerate() {
        for (row, table) in rows.iter().zip(tables) {
            // Blocks in which whole partitions end, and no others.
            let ends = |block: usize| {
                let (start, end) = (block * case.page_tokens, (block + 1) * case.page_tokens);
                let made = row.context / spec.made_together() * spec.made_together();
                end <= made && end / spec.partition_tokens > start / spec.partition_tokens
            };
            for block in (0..table.len()).filter(|&b| ends(b)) {
                for head in 0..case.heads.kv_heads {
                    let found = backend.read_digests(&got.digests[index], LAYER, table[block], head);
                    let wanted = oracle.read_digests(&expected.digests[index], LAYER, table[block], head);
                    let what = format!("{what}: {spec:?} block {block} head {head}");
                    match spec.kind {
                        // Sums run over positions in ascending order, and rounding to fp8 is exact.
                        DigestKind::MinMax
                        | DigestKind::CuboidMean
                        | DigestKind::Fp8(_)
                        | DigestKind::Mean
                        | DigestKind::Cluster { .. } => assert_same_bits(&what, &found, &wanted),
                        // Sums over hundreds of products.
                        DigestKind::Gate { .. } => {
                            assert_close(&what, &found, &wanted, 4.0 * rounding(dtype))
                        }
                        // The cosine has products, summed in any order.
                        DigestKind::Landmark => assert_close(&what, &found, &wanted, rounding(dtype)),
                    }
                }
            }
        }
    }
}

/// Two results that differ in their last bits may be rounded to neighbours.
fn rounding(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-6,
        DType::F16 => 1e-3,
        DType::Bf16 => 8e-3,
    }
}

/// Compares scores, then makes both the same; coarse, so that some are equal, where no rounding follows.
fn check_scores<B: Backend>(
    what: &str,
    case: &Case,
    dtype: DType,
    work: &Work,
    (backend, got): (&mut B, &mut Bench<B>),
    (oracle, expected): (&mut Reference, &mut Bench<Reference>),
) {
    // By method: where a row has one candidate, the terms of its score may cancel, and the error is one of the terms.
    let mut scores = vec![(Vec::new(), Vec::new()); work.methods.len()];
    for (place, row) in work.batch().sparse_rows().enumerate() {
        let method = row.method;
        let plan = row.plan();
        if plan.is_dense() || LAYER < method.dense_layers || plan.candidates.is_empty() {
            continue;
        }
        let Attention::Sparse { method: index, .. } = row.sequence.attention else {
            unreachable!("a sparse row has a method")
        };
        for head in 0..case.heads.kv_heads {
            for line in 0..method.lines(case.heads) {
                let len = plan.candidates.end;
                let (mut found, mut wanted) = (vec![0.0; len], vec![0.0; len]);
                backend.read_scores(&got.selection, place, head, line, &mut found);
                oracle.read_scores(&expected.selection, place, head, line, &mut wanted);
                let (some, same) = (&found[plan.candidates.clone()], &wanted[plan.candidates.clone()]);
                if line < method.query_lines(case.heads) {
                    let of_method = &mut scores[index as usize];
                    of_method.0.extend_from_slice(some);
                    of_method.1.extend_from_slice(same);
                } else if matches!(method.rule, Rule::Clusters { .. }) {
                    // Sizes, which every device knows exactly.
                    assert_same_bits(&format!("{what}: tags of method {index}"), some, same);
                    continue;
                } else {
                    assert_close(&format!("{what}: tags of method {index}"), some, same, rounding(dtype));
                }
                if !method.softmax {
                    wanted.iter_mut().for_each(|s| *s = (*s * 0.25).round());
                }
                backend.write_scores(&mut got.selection, place, head, line, &wanted);
                oracle.write_scores(&mut expected.selection, place, head, line, &wanted);
            }
        }
    }
    for (method, (found, wanted)) in scores.iter().enumerate() {
        assert_close(
            &format!("{what}: scores of method {method}"),
            found,
            wanted,
            attention_tolerance(dtype),
        );
    }
}

/// Same slots, as many as the plan says.
fn check_selections<B: Backend>(
    what: &str,
    case: &Case,
    work: &Work,
    (backend, got): (&mut B, &Bench<B>),
    (oracle, expected): (&mut Reference, &Bench<Reference>),
) {
    for (place, row) in work.batch().sparse_rows().enumerate() {
        let method = row.method;
        let plan = row.plan();
        for head in 0..case.heads.kv_heads {
            let what = format!("{what}: selection of sparse row {place} head {head}");
            let found = backend.read_selection(&got.selection, place, head);
            let wanted = oracle.read_selection(&expected.selection, place, head);
            let words = bitmap_words(row.position + 1);
            let found = found.map(|bits| bits[..words].to_vec());
            assert_eq!(found, wanted, "{what}: {plan:?}");
            if let Some(bits) = found {
                let attended = bits.iter().map(|w| w.count_ones() as usize).sum::<usize>();
                let open =
                    row.position + 1 - (row.position + 1) / method.partition_tokens * method.partition_tokens;
                let full = plan.attended(row.position + 1, method.partition_tokens);
                let all_taken = attended + method.partition_tokens >= full + open.min(1);
                assert!(attended <= full && (all_taken || method.rule != Rule::Top), "{what}");
                assert!(
                    bits[row.position / 64] >> (row.position % 64) & 1 == 1 || method.open_competes,
                    "{what}: a row attends to itself"
                );
            }
        }
    }
}
