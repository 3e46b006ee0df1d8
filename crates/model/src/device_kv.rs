//! What a device keeps of a context.

use ops::places::DigestState;
use ops::residency::SeatCounters;
use ops::sparse::{DigestSpec, SelectionLimits};
use ops::tally::{Overlap, RowTally, WORKING_SET_STEPS, WorkingSet, WorkingSetSpec};
use ops::tier::{TierSpec, TierState};
use ops::{Backend, Batch, BlockIndex, Gate, KvGeometry, SeatIndex, SequenceRows, Step};
use sparse::trace::{Player, Recorder};

use crate::Error;

/// The pages of a pool, the digests of its blocks, and the selections of a step.
pub struct DeviceKv<B: Backend> {
    pub(crate) pages: B::Kv,
    pub(crate) digests: Vec<B::Digests>,
    /// `None` where every request attends to everything.
    pub(crate) selection: Option<B::Selection>,
    /// Whether HBM is a tier apart.
    pub(crate) tiered: bool,
    pub(crate) page_tokens: usize,
    num_layers: usize,
    /// Where selections are recorded, if they are.
    pub(crate) recorder: Option<Recorder>,
    /// What is selected instead, if anything is.
    pub(crate) player: Option<Player>,
}

/// What a device is to keep of contexts.
#[derive(Clone, Debug)]
pub struct KvSpec {
    /// Shape.
    pub geometry: KvGeometry,
    /// Blocks of the pool in DRAM.
    pub num_blocks: usize,
    /// The HBM tier; `None` for unified memory.
    pub tier: Option<TierSpec>,
    /// Digests, in the order by which methods name them.
    pub digests: Vec<DigestSpec>,
    /// Blocks whose digests HBM has at a time, where it is apart.
    pub digest_places: Option<usize>,
    /// The weights of those that a gate makes.
    pub gate: Option<Gate>,
    /// Bounds on selections; `None` where every request attends to everything.
    pub selections: Option<SelectionLimits>,
    /// Over what working sets are counted.
    pub working_sets: WorkingSetSpec,
}

impl KvSpec {
    /// For requests that all attend to everything, in unified memory.
    pub fn dense(geometry: KvGeometry, num_blocks: usize) -> Self {
        KvSpec {
            geometry,
            num_blocks,
            tier: None,
            digests: Vec::new(),
            digest_places: None,
            gate: None,
            selections: None,
            working_sets: WorkingSetSpec::new(WORKING_SET_STEPS, 0..geometry.num_layers),
        }
    }
}

impl<B: Backend> DeviceKv<B> {
    /// A pool, and what goes with it.
    ///
    /// # Errors
    /// Out of memory; partitions that do not fit the pages; a gate that is missing or does not fit; an HBM
    /// tier that is too small.
    pub fn new(backend: &mut B, spec: &KvSpec) -> Result<Self, Error> {
        let KvSpec { geometry, num_blocks, tier, .. } = *spec;
        let gate = spec.gate.as_ref();
        let places = spec.digest_places;
        let digests =
            spec.digests.iter().map(|&digest| backend.digests(digest, geometry, num_blocks, places, gate));
        let digests = digests.collect::<Result<_, _>>()?;
        let selection = match spec.selections {
            None => None,
            Some(limits) => Some(backend.selection(limits)?.0),
        };
        let copies = DigestSpec::copies(&spec.digests);
        let mut pages = backend.kv(geometry, num_blocks, copies, tier)?;
        spec.selections
            .iter()
            .for_each(|limits| backend.tally_within(&mut pages, limits, &spec.working_sets));
        Ok(DeviceKv {
            pages,
            digests,
            selection,
            tiered: tier.is_some(),
            page_tokens: geometry.page_tokens,
            num_layers: geometry.num_layers,
            recorder: None,
            player: None,
        })
    }

    /// Forgets what HBM holds for `seat`.
    pub fn release(&mut self, backend: &mut B, seat: SeatIndex) {
        backend.release(&mut self.pages, seat);
    }

    /// Tokens of `seat` whose KV is in DRAM in all layers.
    pub fn saved_tokens(&mut self, backend: &mut B, seat: SeatIndex) -> usize {
        backend.saved_tokens(&mut self.pages, seat)
    }

    /// The state of the HBM tier; `None` in unified memory.
    pub fn tier_state(&self, backend: &B) -> Option<TierState> {
        backend.tier_state(&self.pages)
    }

    /// What happened to the pages of `seat` since it was released, and the cache frames that it holds.
    pub fn seat_counters(&self, backend: &B, seat: SeatIndex) -> (SeatCounters, usize) {
        backend.seat_counters(&self.pages, seat)
    }

    /// Bytes of digests that came to HBM for `seat` in the last step.
    pub fn digest_loads(&self, backend: &B, seat: SeatIndex) -> u64 {
        self.digests.iter().map(|digests| backend.digest_loads(digests, seat)).sum()
    }

    /// How much of each selection the next one repeated, since the start.
    pub fn overlap(&self, backend: &B) -> Overlap {
        backend.overlap(&self.pages)
    }

    /// What the last row of `seat` selected in the last step.
    pub fn row_tally(&self, backend: &B, seat: SeatIndex) -> RowTally {
        backend.row_tally(&self.pages, seat)
    }

    /// The pages that the last rows of the answer in `seat` selected.
    pub fn working_set(&self, backend: &B, seat: SeatIndex) -> WorkingSet {
        backend.working_set(&self.pages, seat)
    }

    /// Records what is selected from now on.
    pub fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
    }

    /// Takes the selections of a trace instead of those of policies from now on: for benches.
    pub fn replay(&mut self, player: Player) {
        self.player = Some(player);
    }

    /// The pages, for benches that fill them.
    pub fn pages(&mut self) -> &mut B::Kv {
        &mut self.pages
    }

    /// Begins a step: quotas of frames, and digests in HBM. `placed` is memory for its sequences.
    pub(crate) fn begin(&mut self, backend: &mut B, step: &Step, placed: &mut Vec<SequenceRows>) {
        for &(seat, extents) in step.resting {
            for layer in 0..self.num_layers {
                self.grant(backend, seat, layer, extents);
            }
        }
        backend.balance(&mut self.pages, &step.batch);
        placed.clear();
        placed.extend_from_slice(step.batch.sequences);
        placed.extend(step.prompts().map(|segment| segment.sequence.clone()));
        let placed = Batch { sequences: placed, ..step.batch };
        for digests in &mut self.digests {
            backend.place_digests(digests, &placed);
        }
    }

    /// Gives `seat` so many extents of cache frames in `layer`: see [`Backend::grant`].
    pub(crate) fn grant(&mut self, backend: &mut B, seat: SeatIndex, layer: usize, extents: u32) {
        backend.grant(&mut self.pages, seat, layer, extents as usize);
    }

    /// Writes what HBM alone has of `seat` to its blocks in `table`: see [`Backend::park`].
    pub fn park(&mut self, backend: &mut B, seat: SeatIndex, table: &[BlockIndex]) {
        backend.park(&mut self.pages, seat, table);
    }

    /// How much of the digests is in HBM: places are those of blocks, and the same for all kinds.
    pub fn digest_state(&self, backend: &B) -> DigestState {
        let mut sum = DigestState::default();
        for state in self.digests.iter().map(|digests| backend.digest_state(digests)) {
            sum = DigestState { loaded_bytes: sum.loaded_bytes + state.loaded_bytes, ..state };
        }
        sum
    }

    /// Makes the digests of the contexts of `batch`, whose pages were filled: for benches.
    pub fn digest(&mut self, backend: &mut B, layer: usize, batch: &Batch) {
        for digests in &mut self.digests {
            backend.digest(digests, &mut self.pages, layer, batch);
        }
    }
}
