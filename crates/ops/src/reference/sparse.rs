//! Digests, scores and selections, from the formulas alone.

use super::fp8::Outward;
use super::{Matrix, Pages, dot};
use crate::cluster::{ClusterLayout, Clustering, OrderedSlots};
use crate::sparse::{
    DigestKind, DigestSpec, Method, Reduce, RowPlan, Rule, Scope, Score, SelectionLimits, bitmap_words, mark,
    order_key, random_score, replay_rate, replay_score,
};
use crate::{Batch, BlockIndex, Gate, HeadShape, SparseRow};

/// Digests of all blocks: `[layer][block][head][partition of the block][value]`.
#[derive(Debug)]
pub struct DigestTable {
    pub(super) spec: DigestSpec,
    pub(super) values: Vec<f32>,
    num_blocks: usize,
    kv_heads: usize,
    per_block: usize,
    width: usize,
    gate: Option<Gate>,
    outward: Outward,
}

impl DigestTable {
    pub(super) fn new(
        spec: DigestSpec,
        geometry: crate::KvGeometry,
        num_blocks: usize,
        gate: Option<&Gate>,
    ) -> Self {
        let per_block = spec.per_block(geometry.page_tokens);
        let width = spec.width(geometry.head_dim);
        let len = geometry.num_layers * num_blocks * geometry.kv_heads * per_block * width;
        DigestTable {
            spec,
            values: vec![0.0; len],
            num_blocks,
            kv_heads: geometry.kv_heads,
            per_block,
            width,
            gate: gate.cloned(),
            outward: Outward::new(),
        }
    }

    /// Digests of a block and head.
    pub(super) fn of_block(&self, layer: usize, block: BlockIndex, head: usize) -> std::ops::Range<usize> {
        let len = self.per_block * self.width;
        let at = ((layer * self.num_blocks + block.at()) * self.kv_heads + head) * len;
        at..at + len
    }

    /// The digest of a partition of the sequence with this block table.
    fn of_partition(
        &self,
        layer: usize,
        table: &[BlockIndex],
        page_tokens: usize,
        head: usize,
        partition: usize,
    ) -> std::ops::Range<usize> {
        let last = (partition + 1) * self.spec.partition_tokens - 1;
        let within = last % page_tokens / self.spec.partition_tokens;
        let block = self.of_block(layer, table[last / page_tokens], head);
        let within = if self.per_block == 1 { 0 } else { within };
        block.start + within * self.width..block.start + (within + 1) * self.width
    }

    /// Makes the digests that `batch` completes.
    pub(super) fn update(&mut self, kv: &mut Pages, layer: usize, batch: &Batch) {
        let length = self.spec.partition_tokens;
        for sequence in batch.sequences {
            let table = batch.block_table(sequence);
            if let DigestKind::Cluster { span_tokens, sink_tokens, .. } = self.spec.kind {
                let spans =
                    sequence.first_position as usize / span_tokens..sequence.context_tokens() / span_tokens;
                for span in spans {
                    let sinks = sink_tokens.saturating_sub(span * span_tokens);
                    for head in 0..self.kv_heads {
                        self.cluster(
                            kv,
                            layer,
                            table,
                            head,
                            span * span_tokens..(span + 1) * span_tokens,
                            sinks,
                        );
                    }
                }
                continue;
            }
            for partition in sequence.first_position as usize / length..sequence.context_tokens() / length {
                for head in 0..self.kv_heads {
                    let positions = partition * length..(partition + 1) * length;
                    let digest = digest(self, kv, layer, table, head, positions);
                    let at = self.of_partition(layer, table, kv.geometry.page_tokens, head, partition);
                    self.values[at].copy_from_slice(&digest);
                }
            }
        }
    }
}

impl DigestTable {
    /// Clusters the keys at `positions`, of which the first `sinks` belong to no cluster, and copies keys and values in their order.
    fn cluster(
        &mut self,
        kv: &mut Pages,
        layer: usize,
        table: &[BlockIndex],
        head: usize,
        positions: std::ops::Range<usize>,
        sinks: usize,
    ) {
        let (d, length) = (kv.geometry.head_dim, self.spec.partition_tokens);
        let slot = |p: usize, part: usize| &kv.values[kv.slot(layer, table, p, head, part)..][..d];
        let mut clustering = Clustering::new(positions.len(), positions.len() / length, d);
        for (to, p) in clustering.keys_mut().chunks_exact_mut(d).zip(positions.clone()) {
            to.copy_from_slice(slot(p, 0));
        }
        clustering.run(sinks);
        for (token, p) in positions.clone().enumerate() {
            clustering.add_value(token, slot(p, 1));
        }
        for partition in 0..positions.len() / length {
            let global = positions.start / length + partition;
            let at = self.of_partition(layer, table, kv.geometry.page_tokens, head, global);
            clustering.digest(partition, &mut self.values[at.clone()]);
            self.values[at].iter_mut().for_each(|v| *v = kv.geometry.dtype.round(*v));
        }
        let copy = self.spec.copy();
        let ordered: Vec<BlockIndex> = table.iter().map(|&block| kv.block(block, copy)).collect();
        for (slot, &token) in clustering.order().iter().enumerate() {
            for part in [0, 1] {
                let from = kv.slot(layer, table, positions.start + usize::from(token), head, part);
                let to = kv.slot(layer, &ordered, positions.start + slot, head, part);
                kv.values.copy_within(from..from + d, to);
            }
        }
    }
}

/// The digest of the keys at `positions`, rounded as its kind says.
fn digest(
    of: &DigestTable,
    kv: &Pages,
    layer: usize,
    table: &[BlockIndex],
    head: usize,
    positions: std::ops::Range<usize>,
) -> Vec<f32> {
    let (kind, d) = (of.spec.kind, kv.geometry.head_dim);
    let keys: Vec<&[f32]> =
        positions.clone().map(|p| &kv.values[kv.slot(layer, table, p, head, 0)..][..d]).collect();
    let channel = |c: usize| keys.iter().map(move |k| k[c]);
    let max = |c: usize| channel(c).fold(f32::NEG_INFINITY, f32::max);
    let min = |c: usize| channel(c).fold(f32::INFINITY, f32::min);
    let values: Vec<f32> = match kind.unrounded() {
        DigestKind::MinMax => (0..d).map(max).chain((0..d).map(min)).collect(),
        DigestKind::CuboidMean => {
            let center = |c: usize| (min(c) + max(c)) / 2.0;
            let radius =
                |c: usize| channel(c).map(|k| (center(c) - k).abs()).sum::<f32>() / keys.len() as f32;
            let high = (0..d).map(|c| center(c) + radius(c));
            high.chain((0..d).map(|c| center(c) - radius(c))).collect()
        }
        DigestKind::Mean | DigestKind::Landmark => {
            let mean: Vec<f32> = (0..d).map(|c| channel(c).sum::<f32>() / keys.len() as f32).collect();
            let cosine =
                |k: &&[f32]| dot(k, &mean) / (dot(k, k) * dot(&mean, &mean)).sqrt().max(f32::MIN_POSITIVE);
            let least = keys.iter().map(cosine).fold(f32::INFINITY, f32::min);
            mean.into_iter().chain((kind == DigestKind::Landmark).then_some(least)).collect()
        }
        DigestKind::Cluster { .. } | DigestKind::Fp8(_) => {
            unreachable!("made span by span; without rounding")
        }
        DigestKind::Gate { .. } => {
            let gate = of.gate.as_ref().expect("digests of a gate have its weights");
            let keys: Vec<Vec<f32>> =
                positions.clone().zip(keys).map(|(p, k)| unrotated(gate, k, p)).collect();
            let channel = |c: usize| keys.iter().map(move |k| k[c]);
            let max = (0..d).map(|c| channel(c).fold(f32::NEG_INFINITY, f32::max));
            let min = (0..d).map(|c| channel(c).fold(f32::INFINITY, f32::min));
            let mean = (0..d).map(|c| channel(c).sum::<f32>() / keys.len() as f32);
            let pooled: Vec<f32> = max.chain(min).chain(mean).collect();
            projected(gate, gate.k_of(layer, head), &pooled, positions.start)
        }
    };
    match kind {
        DigestKind::Fp8(_) => of.outward.round(&values),
        _ => values.into_iter().map(|v| kv.geometry.dtype.round(v)).collect(),
    }
}

/// `x` of head_dim channels, before it was rotated to `position`.
fn unrotated(gate: &Gate, x: &[f32], position: usize) -> Vec<f32> {
    let half = x.len() / 2;
    let mut out = vec![0.0; x.len()];
    for c in 0..half {
        let (sin, cos) = (position as f32 * gate.inv_freq[c]).sin_cos();
        out[c] = (x[c] * cos + x[c + half] * sin) / gate.scale;
        out[c + half] = (x[c + half] * cos - x[c] * sin) / gate.scale;
    }
    out
}

/// `weights x`, rotated to `position`.
fn projected(gate: &Gate, weights: &[f32], x: &[f32], position: usize) -> Vec<f32> {
    let y: Vec<f32> = weights.chunks_exact(x.len()).map(|row| dot(row, x)).collect();
    let half = gate.dim / 2;
    let mut out = vec![0.0; gate.dim];
    for c in 0..half {
        let (sin, cos) = (position as f32 * gate.inv_freq_of(c)).sin_cos();
        out[c] = (y[c] * cos - y[c + half] * sin) * gate.scale;
        out[c + half] = (y[c + half] * cos + y[c] * sin) * gate.scale;
    }
    out
}

/// The query of a KV head for the row `qkv` at `position`, not scaled.
fn gate_query(gate: &Gate, layer: usize, head: usize, qkv: &[f32], position: usize) -> Vec<f32> {
    let cols = gate.heads.group() * gate.heads.head_dim;
    let queries = qkv[head * cols..][..cols].chunks_exact(gate.heads.head_dim);
    let queries: Vec<f32> = queries.flat_map(|q| unrotated(gate, q, position)).collect();
    projected(gate, gate.q_of(layer, head), &queries, position)
}

/// Scores and selections of the sparse rows of a step.
#[derive(Debug)]
pub struct Selections {
    pub(super) limits: SelectionLimits,
    /// `[place][kv head][line]`, one score per partition.
    pub(super) scores: Vec<Vec<f32>>,
    /// `[place][kv head]`; `None` attends to everything.
    pub(super) bits: Vec<Option<Vec<u64>>>,
    /// `[place][kv head]`: clusters that enter attention as one token each.
    pub(super) pseudo: Vec<Vec<PseudoToken>>,
    /// `[place]`.
    pub(super) ordered: Vec<OrderedSlots>,
}

/// A cluster that enters attention as one token.
#[derive(Clone, Debug)]
pub(super) struct PseudoToken {
    /// Per query head of the group: `q . centroid`.
    pub(super) scores: Vec<f32>,
    /// Tokens that it stands for.
    pub(super) size: usize,
    /// Mean of their values.
    pub(super) value: Vec<f32>,
}

impl Selections {
    pub(super) fn new(limits: SelectionLimits) -> Self {
        let rows = limits.rows_max * limits.heads.kv_heads;
        Selections {
            limits,
            scores: vec![vec![0.0; limits.partitions_max()]; rows * limits.lines_max],
            bits: vec![None; rows],
            pseudo: vec![Vec::new(); rows],
            ordered: vec![OrderedSlots::NONE; limits.rows_max],
        }
    }

    pub(super) fn line(&self, place: usize, head: usize, line: usize) -> usize {
        (place * self.limits.heads.kv_heads + head) * self.limits.lines_max + line
    }

    pub(super) fn at(&self, place: usize, head: usize) -> usize {
        place * self.limits.heads.kv_heads + head
    }

    pub(super) fn score(
        &mut self,
        digests: &[DigestTable],
        kv: &Pages,
        layer: usize,
        qkv: &Matrix,
        heads: HeadShape,
        batch: &Batch,
    ) {
        for (place, row) in batch.sparse_rows().enumerate() {
            let method = row.method;
            let Some(plan) = plan_in(layer, &row) else { continue };
            for head in 0..heads.kv_heads {
                let gate_query = match method.score {
                    Score::Gate { digests: index } => {
                        let gate = digests[index as usize].gate.as_ref();
                        let gate = gate.expect("digests of a gate have its weights");
                        gate_query(gate, layer, head, qkv.row(row.row), row.position)
                    }
                    _ => Vec::new(),
                };
                for line in 0..method.lines(heads) {
                    let at = self.line(place, head, line);
                    for partition in plan.candidates.clone() {
                        self.scores[at][partition] = match method.score {
                            Score::Recency => unreachable!("nothing competes"),
                            Score::Random { seed } => {
                                let head = if method.scope == Scope::Layer { 0 } else { head };
                                random_score(seed, layer, head, row.position, partition)
                            }
                            Score::Replay { seed, overlap_permille } => {
                                let head = if method.scope == Scope::Layer { 0 } else { head };
                                let prompt = row.sequence.prompt_len as usize;
                                let rate = replay_rate(method, overlap_permille, prompt, row.budget);
                                replay_score(seed, rate, layer, head, row.position, partition)
                            }
                            Score::Gate { digests: index } => {
                                let table = &digests[index as usize];
                                let digest = partition_digest(table, kv, layer, batch, &row, head, partition);
                                dot(&gate_query, &digest) / (digest.len() as f32).sqrt()
                            }
                            Score::Digest { digests: index } => {
                                let table = &digests[index as usize];
                                let digest = partition_digest(table, kv, layer, batch, &row, head, partition);
                                score_line(
                                    table.spec.kind,
                                    method,
                                    qkv.row(row.row),
                                    heads,
                                    head,
                                    line,
                                    &digest,
                                )
                            }
                        };
                    }
                }
            }
        }
    }

    pub(super) fn select(&mut self, digests: &[DigestTable], layer: usize, heads: HeadShape, batch: &Batch) {
        for (place, row) in batch.sparse_rows().enumerate() {
            let method = row.method;
            let plan = plan_in(layer, &row);
            self.ordered[place] = plan.as_ref().map_or(OrderedSlots::NONE, |plan| plan.ordered);
            for head in 0..heads.kv_heads {
                let at = self.at(place, head);
                self.pseudo[at].clear();
                if let (Rule::Clusters { .. }, Some(plan)) = (method.rule, &plan) {
                    let Score::Digest { digests: index } = method.score else {
                        unreachable!("clusters are digests")
                    };
                    let table = &digests[index as usize];
                    let blocks = batch.block_table(row.sequence);
                    let page_tokens = self.limits.page_tokens;
                    let digest = |p: usize| {
                        table.values[table.of_partition(layer, blocks, page_tokens, head, p)].to_vec()
                    };
                    let clusters: Vec<Vec<f32>> = plan.candidates.clone().map(digest).collect();
                    let context = row.position + 1;
                    self.bits[at] =
                        Some(self.clusters(method, plan, heads, (place, head), context, &clusters));
                    continue;
                }
                self.bits[at] = plan.as_ref().map(|plan| {
                    let outliers = self.outliers(method, plan, heads, place, head);
                    let scores = self.reduced(method, plan, heads, place, head, &outliers);
                    bitmap(method, plan, row.position + 1, &scores, &outliers)
                });
            }
        }
    }

    /// Selects whole clusters and notes those that become pseudo-tokens.
    fn clusters(
        &mut self,
        method: &Method,
        plan: &RowPlan,
        heads: HeadShape,
        (place, head): (usize, usize),
        context: usize,
        clusters: &[Vec<f32>],
    ) -> Vec<u64> {
        let layout = ClusterLayout { head_dim: heads.head_dim };
        let size =
            |p: usize| ClusterLayout::size(clusters[p][layout.size_at()], clusters[p][layout.size_at() + 1]);
        let (empty, mut order): (Vec<usize>, Vec<usize>) =
            plan.candidates.clone().partition(|&p| size(p) == 0);
        let scores = self.reduced(method, plan, heads, place, head, &empty);
        order.sort_by_key(|&p| (std::cmp::Reverse(order_key(scores[p])), p));
        let mut room = plan.room;
        let fits = |p: &&usize| {
            let fits = size(**p) <= room;
            room -= if fits { size(**p) } else { 0 };
            fits
        };
        let taken: Vec<usize> = order.iter().take_while(fits).copied().collect();
        let at = self.at(place, head);
        let line = |line: usize, p: usize| self.scores[self.line(place, head, line)][p];
        self.pseudo[at] = order[taken.len()..]
            .iter()
            .take(plan.estimated)
            .map(|&p| PseudoToken {
                scores: (0..heads.group()).map(|g| line(g, p)).collect(),
                size: size(p),
                value: clusters[p][layout.value_at()..][..heads.head_dim].to_vec(),
            })
            .collect();
        let mut bits = vec![0; bitmap_words(context)];
        mark(&mut bits, 0..plan.sink_end);
        mark(&mut bits, plan.tail_start..context);
        // Behind the sinks they lie one after the other, and spans are as long as their clusters together.
        let mut slot = plan.sink_end;
        for p in plan.candidates.clone() {
            if taken.contains(&p) {
                mark(&mut bits, slot..slot + size(p));
            }
            slot += size(p);
        }
        assert_eq!(slot, plan.tail_start, "every token is in one cluster");
        bits
    }

    /// The partitions of the prompt whose digests stand worst for their keys, the first of equals.
    fn outliers(
        &self,
        method: &Method,
        plan: &RowPlan,
        heads: HeadShape,
        place: usize,
        head: usize,
    ) -> Vec<usize> {
        let (among, count) = plan.outliers.clone();
        if count == 0 {
            return Vec::new();
        }
        let cosines = &self.scores[self.line(place, head, method.query_lines(heads))];
        let mut order: Vec<usize> = among.collect();
        order.sort_by_key(|&p| (order_key(cosines[p]), p));
        order.truncate(count);
        order
    }

    /// One score per candidate: lines and, where a layer shares its selection, heads made one.
    fn reduced(
        &self,
        method: &Method,
        plan: &RowPlan,
        heads: HeadShape,
        place: usize,
        head: usize,
        outliers: &[usize],
    ) -> Vec<f32> {
        let of = match method.scope {
            Scope::KvHead => head..head + 1,
            Scope::Layer => 0..heads.kv_heads,
        };
        let lines: Vec<Vec<f32>> = of
            .flat_map(|head| (0..method.query_lines(heads)).map(move |line| (head, line)))
            .map(|(head, line)| {
                let mut raw = self.scores[self.line(place, head, line)][plan.candidates.clone()].to_vec();
                outliers.iter().for_each(|p| raw[p - plan.candidates.start] = f32::NEG_INFINITY);
                if method.softmax { softmax(&raw, method.softmax_scale(heads.head_dim)) } else { raw }
            })
            .collect();
        (0..plan.candidates.len())
            .map(|i| {
                let scores = lines.iter().map(|line| line[i]);
                match method.reduce {
                    Reduce::Max => scores.fold(f32::NEG_INFINITY, f32::max),
                    Reduce::Mean | Reduce::MeanQuery => scores.sum::<f32>() / lines.len() as f32,
                }
            })
            .collect()
    }
}

/// What `row` attends to in `layer`; `None` if everything.
pub(super) fn plan_in(layer: usize, row: &SparseRow) -> Option<RowPlan> {
    let plan = row.plan();
    (layer >= row.method.dense_layers && !plan.is_dense()).then_some(plan)
}

/// The digest of a candidate as the row sees it: that of a partition which is still open covers what is there.
fn partition_digest(
    table: &DigestTable,
    kv: &Pages,
    layer: usize,
    batch: &Batch,
    row: &SparseRow,
    head: usize,
    partition: usize,
) -> Vec<f32> {
    let length = table.spec.partition_tokens;
    let blocks = batch.block_table(row.sequence);
    let (start, end) = (partition * length, (partition + 1) * length);
    if end > row.position + 1 {
        return digest(table, kv, layer, blocks, head, start..row.position + 1);
    }
    let at = table.of_partition(layer, blocks, kv.geometry.page_tokens, head, partition);
    table.values[at].to_vec()
}

/// The score of one digest for line `line` of a KV head.
fn score_line(
    kind: DigestKind,
    method: &Method,
    qkv: &[f32],
    heads: HeadShape,
    head: usize,
    line: usize,
    digest: &[f32],
) -> f32 {
    let (group, d) = (heads.group(), heads.head_dim);
    let query = |g: usize| &qkv[(head * group + g) * d..][..d];
    let raw = |q: &[f32]| match kind {
        DigestKind::Mean | DigestKind::Landmark | DigestKind::Cluster { .. } => dot(q, &digest[..d]),
        DigestKind::Gate { .. } => unreachable!("scored by its own query"),
        DigestKind::MinMax | DigestKind::CuboidMean | DigestKind::Fp8(_) => {
            let (high, low) = digest.split_at(d);
            q.iter().zip(high).zip(low).map(|((q, h), l)| (q * h).max(q * l)).sum()
        }
    };
    if line == method.query_lines(heads) {
        // Its tag.
        match kind {
            DigestKind::Cluster { .. } => {
                let at = ClusterLayout { head_dim: d }.size_at();
                ClusterLayout::size(digest[at], digest[at + 1]) as f32
            }
            _ => digest[d],
        }
    } else if method.reduce == Reduce::MeanQuery {
        let mean: Vec<f32> =
            (0..d).map(|c| (0..group).map(|g| query(g)[c]).sum::<f32>() / group as f32).collect();
        raw(&mean)
    } else if method.query_lines(heads) == 1 {
        (0..group).map(|g| raw(query(g))).sum::<f32>() / group as f32
    } else {
        raw(query(line))
    }
}

fn softmax(raw: &[f32], scale: usize) -> Vec<f32> {
    let scaled: Vec<f32> = raw.iter().map(|s| s / (scale as f32).sqrt()).collect();
    let max = scaled.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scaled.iter().map(|s| (s - max).exp()).collect();
    let sum: f32 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// The always-set and the `take` best candidates, of which `scores` holds one each.
fn bitmap(method: &Method, plan: &RowPlan, context: usize, scores: &[f32], outliers: &[usize]) -> Vec<u64> {
    let mut bits = vec![0; bitmap_words(context)];
    mark(&mut bits, 0..plan.sink_end);
    mark(&mut bits, plan.tail_start..context);
    let taken = |i: &usize| !outliers.contains(&(plan.candidates.start + i));
    let mut order: Vec<usize> = (0..scores.len()).filter(taken).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(order_key(scores[i])), i));
    let passes = |i: &&usize| !matches!(method.rule, Rule::Threshold(least) if scores[**i] < least);
    let best = order[..plan.take].iter().filter(passes).map(|i| plan.candidates.start + i);
    for partition in best.chain(outliers.iter().copied()) {
        let start = partition * method.partition_tokens;
        mark(&mut bits, start..(start + method.partition_tokens).min(context));
    }
    bits
}
