//! Working sets: given selections in many layers, of requests that come, go and run again, as the naive sets say.

use super::{Random, Reference, heads_of, method};
use crate::sparse::{Attention, Method, Score, SelectionLimits};
use crate::tally::{SAMPLED_LAYERS_MAX, WORKING_SET_STEPS_MAX, WorkingSetSpec};
use crate::{Backend, Batch, BlockIndex, DType, HeadShape, KvGeometry, SeatIndex, SequenceRows};

const SEATS: usize = 3;
const LAYERS: usize = 9;
/// Rows of a sequence in a step.
const ROWS: usize = 3;
/// Of pages of 8 slots, more than are counted at once.
const CONTEXT: usize = 6000;
const KV_HEADS: usize = 2;
/// Of whatever sequence: no page is read.
const TABLE: [BlockIndex; CONTEXT / 8] = [BlockIndex(0); CONTEXT / 8];

/// A selection of a row in a layer, of each head: slots, or `None` for everything.
type Selected = Option<[Vec<u64>; KV_HEADS]>;

/// A device that selects what it is told to.
struct World<B: Backend> {
    backend: B,
    kv: B::Kv,
    selection: B::Selection,
    heads: HeadShape,
}

impl<B: Backend> World<B> {
    fn new(mut backend: B, page_tokens: usize, sets: &WorkingSetSpec) -> Self {
        let heads = heads_of(4, KV_HEADS, 32);
        let geometry = KvGeometry {
            num_layers: LAYERS,
            kv_heads: KV_HEADS,
            head_dim: 32,
            page_tokens,
            dtype: DType::Bf16,
        };
        let limits = SelectionLimits::new(&methods(), heads, page_tokens, SEATS * ROWS, CONTEXT);
        let (selection, _) = backend.selection(limits).expect("memory");
        let mut kv = backend.kv(geometry, 1, 0, None).expect("memory");
        backend.tally_within(&mut kv, &limits, sets);
        World { backend, kv, selection, heads }
    }

    fn layer(&mut self, layer: usize, batch: &Batch, given: &[Selected]) {
        let World { backend, kv, selection, heads } = self;
        let mut qkv = backend.tensor(batch.num_rows(), heads.qkv_cols()).expect("memory");
        backend.upload(&mut qkv, &vec![0.5; batch.num_rows() * heads.qkv_cols()]);
        backend.score(selection, &[], kv, layer, &qkv, *heads, batch);
        backend.select(selection, &[], layer, *heads, batch);
        for (place, given) in given.iter().enumerate() {
            for head in 0..KV_HEADS {
                let own = backend.read_selection(selection, place, head);
                assert_eq!(own.is_some(), given.is_some(), "who selects in layer {layer}");
                given.iter().for_each(|given| backend.write_selection(selection, place, head, &given[head]));
            }
        }
        backend.tally(kv, layer, batch, selection);
    }
}

/// Those of early layers attend to everything with the second.
fn methods() -> [Method; 2] {
    let recent = method(1, Score::Recency);
    [recent, Method { dense_layers: 5, ..recent }]
}

/// Who has a seat.
#[derive(Clone, Copy)]
struct Request {
    prompt: usize,
    done: usize,
    method: usize,
    /// Where most of what it selects is.
    favourite: usize,
}

/// The arrays of a step.
#[derive(Default)]
struct Step {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
}

impl Step {
    fn push(&mut self, seat: usize, request: &Request, positions: std::ops::Range<usize>) {
        let first = self.positions.len() as u32;
        self.positions.extend(positions.clone().map(|p| p as u32));
        self.tokens.resize(self.positions.len(), 0);
        self.sequences.push(SequenceRows {
            rows: first..self.positions.len() as u32,
            first_position: positions.start as u32,
            prompt_len: request.prompt as u32,
            blocks: 0..TABLE.len() as u32,
            attention: Attention::Sparse { method: request.method as u16, budget: 64 },
            seat: SeatIndex(seat as u32),
            quota: 0,
        });
    }

    fn batch<'a>(&'a self, methods: &'a [Method]) -> Batch<'a> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            sequences: &self.sequences,
            block_tables: &TABLE,
            methods,
        }
    }

    /// The same with the last rows alone, as the last layer may run it.
    fn narrowed(&self) -> Step {
        let mut step = Step::default();
        for s in &self.sequences {
            let row = step.positions.len() as u32;
            let last = s.context_tokens() as u32 - 1;
            step.positions.push(last);
            step.tokens.push(0);
            step.sequences.push(SequenceRows { rows: row..row + 1, first_position: last, ..s.clone() });
        }
        step
    }
}

/// Slots for a row: its own, some of a favourite stretch, and now and then any.
fn select(random: &mut Random, position: usize, favourite: usize) -> Vec<u64> {
    let mut bits = vec![0u64; (position + 1).div_ceil(64)];
    let mut set = |slot: usize| bits[slot / 64] |= 1 << (slot % 64);
    set(position);
    for _ in 0..random.below(40) {
        let near = favourite + random.below(300);
        set(if random.below(8) == 0 { random.below(position + 1) } else { near.min(position) });
    }
    bits
}

/// Whatever is selected by whom, the working sets are those of the naive sets.
pub fn check_working_sets<B: Backend>(make: &mut dyn FnMut() -> B, seed: u64) {
    let (mut full, mut shrank, mut released) = (0, 0, 0);
    for run in 0..8 {
        let mut random = Random::keyed(seed, 70 << 8 | run);
        let page_tokens = [8, 16, 64][random.below(3)];
        let steps = [1, 2, 3, 8, 12, WORKING_SET_STEPS_MAX][random.below(6)];
        // Some layers have a window, and so no selection.
        let windowed: Vec<bool> = (0..LAYERS).map(|_| run % 2 == 1 && random.below(3) == 0).collect();
        let sets = WorkingSetSpec::new(steps, (0..LAYERS).filter(|layer| !windowed[*layer]));
        let what = format!("seed {seed} working sets run {run}: {sets:?}, pages of {page_tokens}");
        let mut world = World::new(make(), page_tokens, &sets);
        let mut oracle = World::new(Reference::default(), page_tokens, &sets);
        let methods = methods();
        let mut requests: [Option<Request>; SEATS] = [None; SEATS];
        let mut before = [0; SEATS];
        for number in 0..150 {
            let mut step = Step::default();
            for seat in 0..SEATS {
                if random.below(50) == 0 && requests[seat].take().is_some() {
                    let index = SeatIndex(seat as u32);
                    world.backend.release(&mut world.kv, index);
                    oracle.backend.release(&mut oracle.kv, index);
                    assert_eq!(
                        world.backend.working_set(&world.kv, index),
                        Default::default(),
                        "{what} step {number}: who left has none"
                    );
                    released += 1;
                }
                let request = requests[seat].get_or_insert_with(|| {
                    let prompt = 100 + random.below(CONTEXT - 700);
                    let favourite = random.below(prompt);
                    Request { prompt, done: prompt, method: random.below(2), favourite }
                });
                if random.below(4) == 0 {
                    continue;
                }
                if random.below(30) == 0 {
                    request.favourite = random.below(request.done);
                }
                let rows = if random.below(5) == 0 { ROWS } else { 1 };
                step.push(seat, request, request.done..request.done + rows);
                request.done += rows;
            }
            if step.sequences.is_empty() {
                continue;
            }
            let whole = step.batch(&methods);
            world.backend.balance(&mut world.kv, &whole);
            oracle.backend.balance(&mut oracle.kv, &whole);
            let narrowed = step.narrowed();
            for layer in (0..LAYERS).filter(|layer| !windowed[*layer]) {
                let step = if layer + 1 == LAYERS { &narrowed } else { &step };
                let batch = step.batch(&methods);
                let given: Vec<Selected> = batch
                    .sparse_rows()
                    .map(|row| {
                        let favourite = requests[row.sequence.seat.at()]?.favourite;
                        let heads = [(); KV_HEADS].map(|()| select(&mut random, row.position, favourite));
                        (layer >= row.method.dense_layers).then_some(heads)
                    })
                    .collect();
                world.layer(layer, &batch, &given);
                oracle.layer(layer, &batch, &given);
            }
            for (seat, before) in before.iter_mut().enumerate() {
                let index = SeatIndex(seat as u32);
                let got = world.backend.working_set(&world.kv, index);
                let expected = oracle.backend.working_set(&oracle.kv, index);
                assert_eq!(got, expected, "{what} step {number}, seat {seat}");
                full += usize::from(got.steps as usize == steps && got.layers as usize == SAMPLED_LAYERS_MAX);
                shrank += usize::from(got.pages < *before && got.steps > 1);
                *before = got.pages;
            }
            assert_eq!(
                world.backend.overlap(&world.kv),
                oracle.backend.overlap(&oracle.kv),
                "{what} step {number}: overlap"
            );
        }
    }
    assert!(
        full > 0 && shrank > 0 && released > 0,
        "seed {seed} is no test of working sets: {full} {shrank} {released}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::WorkingSet;

    /// One head selects pages that are told, the other its own page alone.
    #[test]
    fn the_last_steps_count() {
        let sets = WorkingSetSpec::new(3, 4..6);
        let mut world = World::new(Reference::default(), 16, &sets);
        let seat = SeatIndex(1);
        let request = Request { prompt: 640, done: 640, method: 1, favourite: 0 };
        let methods = methods();
        // Own page included, 40 at all positions: pages of the last three steps.
        for (number, (pages, wanted)) in
            [(&[1, 2, 3][..], 4), (&[3, 4], 5), (&[1], 5), (&[], 4), (&[], 2), (&[], 1)]
                .into_iter()
                .enumerate()
        {
            let position = 640 + number;
            let mut step = Step::default();
            step.push(1, &request, position..position + 1);
            let batch = step.batch(&methods);
            world.backend.balance(&mut world.kv, &batch);
            let own = |pages: &[usize]| {
                let mut bits = vec![0u64; 11];
                pages.iter().for_each(|page| bits[page / 4] |= 1 << (page % 4 * 16 + 5));
                bits[position / 64] |= 1 << (position % 64);
                bits
            };
            // Layer 4 attends to everything.
            world.layer(4, &batch, &[None]);
            world.layer(5, &batch, &[Some([own(pages), own(&[])])]);
            let steps = (number as u32 + 1).min(3);
            let expected = WorkingSet { pages: wanted + 1, layers: 1, steps };
            assert_eq!(world.backend.working_set(&world.kv, seat), expected, "step {number}");
            assert_eq!(world.backend.working_set(&world.kv, SeatIndex(0)), WorkingSet::default());
        }
        world.backend.release(&mut world.kv, seat);
        assert_eq!(world.backend.working_set(&world.kv, seat), WorkingSet::default());
    }
}
