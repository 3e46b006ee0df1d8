//! Digests do not depend on how a context is cut into steps.

use super::{Random, assert_same_bits, gate_of, heads_of, normals, tensor};
use crate::sparse::{Attention, DigestKind, DigestSpec, TwoSided};
use crate::{Backend, Batch, BlockIndex, DType, KvGeometry, SeatIndex, SequenceRows};

const PAGE_TOKENS: usize = 16;
/// The last page and the last partitions stay open.
const CONTEXT: usize = 13 * PAGE_TOKENS + 5;

/// Digests of a context that runs at once have the bits of those of the same context that comes in pieces, some of one token. Of
/// every kind, for partitions shorter and longer than a page.
pub fn check_digest_chunks<B: Backend>(backend: &mut B, dtype: DType, seed: u64) {
    let mut random = Random::keyed(seed, 8);
    let kinds = [
        DigestKind::MinMax,
        DigestKind::CuboidMean,
        DigestKind::Fp8(TwoSided::MinMax),
        DigestKind::Fp8(TwoSided::CuboidMean),
        DigestKind::Mean,
        DigestKind::Landmark,
        DigestKind::Gate { dim: 16 },
    ];
    let specs = kinds.map(|kind| [4, 16, 48].map(|partition_tokens| DigestSpec { kind, partition_tokens }));
    let mut specs = specs.concat();
    let clusters = DigestKind::Cluster { span_tokens: 64, sink_tokens: 3, copy: 0 };
    specs.push(DigestSpec { kind: clusters, partition_tokens: 8 });
    let mut cuts = vec![0, CONTEXT];
    cuts.extend((0..12).map(|_| 1 + random.below(CONTEXT - 1)));
    // A partition's last token alone, and the one before it.
    cuts.extend([46, 47, 48, 49]);
    cuts.sort_unstable();
    cuts.dedup();
    let (whole, pieces) =
        (make(backend, &specs, dtype, seed, &[0, CONTEXT]), make(backend, &specs, dtype, seed, &cuts));
    for ((spec, whole), pieces) in specs.iter().zip(&whole).zip(&pieces) {
        assert!(!whole.is_empty(), "{spec:?}: nothing is compared");
        assert_same_bits(&format!("seed {seed} {dtype} {spec:?} in steps to {cuts:?}"), pieces, whole);
    }
}

/// The digests of all complete partitions of each of `specs`, where steps end at `cuts`.
fn make<B: Backend>(
    backend: &mut B,
    specs: &[DigestSpec],
    dtype: DType,
    seed: u64,
    cuts: &[usize],
) -> Vec<Vec<f32>> {
    let heads = heads_of(4, 2, 32);
    let geometry = KvGeometry { num_layers: 1, kv_heads: 2, head_dim: 32, page_tokens: PAGE_TOKENS, dtype };
    let table: Vec<BlockIndex> = (0..CONTEXT.div_ceil(PAGE_TOKENS) as u32).rev().map(BlockIndex).collect();
    let gate = gate_of(specs, heads, 1, seed);
    let mut kv = backend.kv(geometry, table.len(), DigestSpec::copies(specs), None).expect("memory");
    let digests = specs.iter().map(|&spec| backend.digests(spec, geometry, table.len(), None, gate.as_ref()));
    let mut digests = digests.collect::<Result<Vec<_>, _>>().expect("memory");
    let cols = heads.qkv_cols();
    let values = normals(&mut Random::keyed(seed, 9), CONTEXT * cols);
    let inv_freq: Vec<f32> = (0..16).map(|c| 0.9f32.powi(c)).collect();
    backend.reserve(heads, CONTEXT, 1, CONTEXT, cols).expect("scratch");
    for cut in cuts.windows(2) {
        let (first, rows) = (cut[0], cut[1] - cut[0]);
        let positions: Vec<u32> = (first as u32..cut[1] as u32).collect();
        let sequence = SequenceRows {
            rows: 0..rows as u32,
            first_position: first as u32,
            prompt_len: CONTEXT as u32,
            blocks: 0..table.len() as u32,
            attention: Attention::Dense,
            seat: SeatIndex(0),
            quota: 0,
        };
        let batch = Batch {
            tokens: &positions,
            positions: &positions,
            sequences: &[sequence],
            block_tables: &table,
            methods: &[],
        };
        let mut x = tensor(backend, cols, &values[first * cols..cut[1] * cols]);
        let mut angles = backend.tensor(rows, 32).expect("memory");
        backend.rope_angles(&mut angles, &positions, &inv_freq, &vec![0; rows], 1.0);
        backend.append(&mut kv, 0, &mut x, heads, None, &angles, &batch);
        digests.iter_mut().for_each(|digests| backend.digest(digests, &mut kv, 0, &batch));
    }
    let read = |(spec, digests): (&DigestSpec, &B::Digests)| -> Vec<f32> {
        let made = CONTEXT / spec.made_together() * spec.made_together();
        let ends = |block: usize| {
            let (start, end) = (block * PAGE_TOKENS, (block + 1) * PAGE_TOKENS);
            end <= made && end / spec.partition_tokens > start / spec.partition_tokens
        };
        let blocks = (0..table.len()).filter(|&block| ends(block));
        let places = blocks.flat_map(|block| (0..2).map(move |head| (block, head)));
        places.flat_map(|(block, head)| backend.read_digests(digests, 0, table[block], head)).collect()
    };
    specs.iter().zip(&digests).map(read).collect()
}
