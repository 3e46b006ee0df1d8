//! The HBM tier: requests of all kinds come, share, grow and go, on a device with tiers, the same device without, and the
//! oracle. Outputs must be the same bits with and without tiers; what is resident, hit, missed and evicted must be what the
//! naive model says; every resident page must equal its copy in DRAM.

use super::tier_cases::{Case, cases};
use super::{Random, Reference, assert_same_bits, gate_of, normals, rows_of, tensor};
use crate::coverage::{Coverage, Inspection, Inspections};
use crate::residency::{EXTENT_FRAMES, EvictionRule};
use crate::sparse::{Attention, DigestSpec, Method, SelectionLimits};
use crate::tally::{WORKING_SET_STEPS, WorkingSetSpec};
use crate::tier::{LinkSpec, TierSpec, TierState, TooSmall, Transfer};
use crate::{Backend, Batch, BlockIndex, DType, Gate, KvGeometry, SPLIT_TOKENS, SeatIndex, SequenceRows};

const LAYERS: usize = 2;
const SEATS: usize = 4;
const INJECT: usize = 96;
const CONTEXT: usize = 2 * SPLIT_TOKENS + 200;

/// Blocks whose digests HBM has at a time: not those of all requests that there can be.
fn places_of(num_blocks: usize) -> usize {
    num_blocks / 2
}

/// A device with its cache.
struct World<'a, B: Backend> {
    backend: &'a mut B,
    kv: B::Kv,
    digests: Vec<B::Digests>,
    selection: B::Selection,
}

/// What a layer of a step came to.
struct Seen {
    out: Vec<f32>,
    /// Of each sparse row and head.
    selections: Vec<Option<Vec<u64>>>,
    /// Of the last rows of sequences.
    coverage: Vec<(SeatIndex, Coverage)>,
}

impl<'a, B: Backend> World<'a, B> {
    fn new(
        backend: &'a mut B,
        case: &Case,
        geometry: KvGeometry,
        num_blocks: usize,
        tier: Option<TierSpec>,
        gate: Option<&Gate>,
        sets: &WorkingSetSpec,
    ) -> Self {
        let heads = case.heads;
        let places = tier.map(|_| places_of(num_blocks));
        let digests =
            case.digests.iter().map(|&spec| backend.digests(spec, geometry, num_blocks, places, gate));
        let digests = digests.collect::<Result<Vec<_>, _>>().expect("memory");
        let rows = INJECT + SEATS;
        let limits = SelectionLimits::new(&case.methods, heads, geometry.page_tokens, rows, CONTEXT);
        let (selection, _) = backend.selection(limits).expect("memory");
        backend.reserve(heads, rows, SEATS, CONTEXT, heads.qkv_cols()).expect("scratch");
        let copies = DigestSpec::copies(&case.digests);
        let mut kv = backend.kv(geometry, num_blocks, copies, tier).expect("memory");
        backend.tally_within(&mut kv, &limits, sets);
        World { backend, kv, digests, selection }
    }

    fn begin(&mut self, batch: &Batch) {
        self.backend.balance(&mut self.kv, batch);
        for digests in &mut self.digests {
            self.backend.place_digests(digests, batch);
        }
    }

    /// Bytes of digests that the last step loaded for `seat`.
    fn loaded(&self, seat: SeatIndex) -> u64 {
        self.digests.iter().map(|digests| self.backend.digest_loads(digests, seat)).sum()
    }

    /// A sequence leaves its seat and keeps its blocks.
    fn park(&mut self, seat: SeatIndex, table: &[BlockIndex]) {
        self.backend.park(&mut self.kv, seat, table);
        self.backend.release(&mut self.kv, seat);
    }

    /// A warm start after a layer: the last rows of all sequences look up everything before them, and attend to nothing.
    fn warm(&mut self, case: &Case, layer: usize, batch: &Batch) {
        let last = |s: &SequenceRows| SequenceRows {
            first_position: s.context_tokens() as u32 - 1,
            attention: Attention::Dense,
            ..s.clone()
        };
        let mut sequences: Vec<SequenceRows> = batch.sequences.iter().map(last).collect();
        for (row, s) in sequences.iter_mut().enumerate() {
            s.rows = row as u32..row as u32 + 1;
        }
        let resolved = Batch { sequences: &sequences, ..*batch };
        self.backend.settle(&mut self.kv, &resolved);
        let waves = self.backend.resolve(&mut self.kv, layer, case.heads, None, &resolved, None);
        (0..waves).for_each(|wave| self.backend.gather(&mut self.kv, wave));
    }

    /// One layer of a step; `given` selections take the place of its own.
    fn layer(
        &mut self,
        case: &Case,
        layer: usize,
        qkv: &[f32],
        batch: &Batch,
        given: Option<&[Option<Vec<u64>>]>,
    ) -> Seen {
        let World { backend, kv, digests, selection } = self;
        let heads = case.heads;
        let rows = batch.num_rows();
        let mut x = tensor(*backend, heads.qkv_cols(), qkv);
        let mut angles = backend.tensor(rows, heads.head_dim).expect("memory");
        let inv_freq: Vec<f32> = (0..heads.head_dim / 2).map(|c| 0.9f32.powi(c as i32)).collect();
        backend.rope_angles(&mut angles, batch.positions, &inv_freq, &vec![0; rows], 1.0);
        backend.append(kv, layer, &mut x, heads, None, &angles, batch);
        let window = if layer == 1 { case.window } else { None };
        if window.is_none() {
            for digests in digests.iter_mut() {
                backend.digest(digests, kv, layer, batch);
            }
        }
        backend.save(kv, layer, batch);
        let mut selections = Vec::new();
        let selects = window.is_none() && batch.sparse_rows().next().is_some();
        if selects {
            backend.score(selection, digests, kv, layer, &x, heads, batch);
            backend.select(selection, digests, layer, heads, batch);
            for place in 0..batch.sparse_rows().count() {
                for head in 0..heads.kv_heads {
                    match given.and_then(|given| given[selections.len()].as_ref()) {
                        Some(bits) => backend.write_selection(selection, place, head, bits),
                        None => assert!(
                            given.is_none() || backend.read_selection(selection, place, head).is_none()
                        ),
                    }
                    selections.push(backend.read_selection(selection, place, head));
                }
            }
        }
        if selects {
            backend.tally(kv, layer, batch, selection);
        }
        let selection = selects.then_some(&*selection);
        let mut out = backend.tensor(rows, heads.q_cols()).expect("memory");
        let waves = backend.resolve(kv, layer, heads, window, batch, selection);
        for wave in 0..waves {
            backend.gather(kv, wave);
            backend.attend(&mut out, None, kv, layer, &x, heads, window, batch, selection, wave);
        }
        let mut inspections = Inspections::default();
        if let Some(selection) = selection {
            let last = batch.sparse_rows().filter(|r| r.row + 1 == r.sequence.rows.end as usize);
            let asked = last.map(|r| Inspection { seat: r.sequence.seat, layer: layer as u32 });
            inspections.asked.extend(asked);
            backend.cover(&mut inspections, kv, layer, &x, heads, batch, selection);
        }
        Seen { out: rows_of(*backend, &out), selections, coverage: inspections.found }
    }
}

/// A request.
struct Request {
    seat: SeatIndex,
    blocks: Vec<BlockIndex>,
    /// Blocks at the front that another request filled.
    shared: usize,
    /// Tokens that were known to be saved after its last step.
    saved: usize,
    prompt: usize,
    done: usize,
    attention: Attention,
    /// Of its tokens: what a position contributes does not depend on the step in which it runs.
    key: u64,
}

/// The requests of a run, and the blocks that they use.
struct Traffic {
    random: Random,
    requests: Vec<Request>,
    /// In no order, so that runs of adjacent blocks are as likely as single ones.
    free: Vec<BlockIndex>,
    owners: Vec<u32>,
    page_tokens: usize,
    /// Tokens of a prefix that are shared as a whole or not at all.
    shared_together: usize,
}

impl Traffic {
    /// Lets a request come, with the saved prefix of another now and then. Its method is the one that has selected least, in
    /// `selected` rows so far, or will soon.
    fn arrive(&mut self, selected: &[usize], saved: impl FnOnce(SeatIndex) -> usize) {
        let seat = (0..SEATS as u32).map(SeatIndex).find(|s| self.requests.iter().all(|r| r.seat != *s));
        let Some(seat) = seat else { return };
        let random = &mut self.random;
        let prompt = [40, 300, 700, CONTEXT - 60][random.below(4)] + random.below(50);
        let wanted = (prompt + 50).min(CONTEXT).div_ceil(self.page_tokens);
        let budget = [0, 64, 200, 600, CONTEXT][random.below(5)] as u32;
        let is_dense = random.below(selected.len() + 1) == 0;
        let asks_for = |r: &&Request, m: usize| matches!(r.attention, Attention::Sparse { method, .. } if method as usize == m);
        let tried = |&m: &usize| selected[m] + 20 * self.requests.iter().filter(|r| asks_for(r, m)).count();
        let attention = match (0..selected.len()).min_by_key(tried) {
            Some(method) if !is_dense => Attention::Sparse { method: method as u16, budget },
            _ => Attention::Dense,
        };
        let (mut blocks, mut key) = (Vec::new(), random.next_u64());
        if let (Some(other), true) = (self.requests.first(), random.below(2) == 0) {
            let whole = saved(other.seat).min(other.prompt).min(prompt - 1) / self.shared_together
                * (self.shared_together / self.page_tokens);
            blocks.extend_from_slice(&other.blocks[..whole]);
            key = other.key;
        }
        if self.free.len() < wanted - blocks.len() {
            return;
        }
        let shared = blocks.len();
        while blocks.len() < wanted {
            blocks.extend(self.free.pop());
        }
        blocks.iter().for_each(|b| self.owners[b.at()] += 1);
        let done = shared * self.page_tokens;
        self.requests.push(Request { seat, blocks, shared, saved: 0, prompt, done, attention, key });
    }

    /// Lets a request that has run leave its seat and go on in another one, or in the same if no other is free; returns its place
    /// and the seat that it left.
    fn change_seat(&mut self) -> Option<(usize, SeatIndex)> {
        let taken = |seat: SeatIndex| self.requests.iter().any(|r| r.seat == seat);
        let free = (0..SEATS as u32).map(SeatIndex).find(|seat| !taken(*seat));
        let at = self.requests.iter().position(|r| r.done > r.shared * self.page_tokens)?;
        let request = &mut self.requests[at];
        let left = request.seat;
        request.seat = free.unwrap_or(left);
        // Of a seat nothing is known before its first step.
        request.saved = 0;
        Some((at, left))
    }

    /// Lets a request go; returns its seat.
    fn leave(&mut self) -> Option<SeatIndex> {
        if self.requests.is_empty() {
            return None;
        }
        let at = self.random.below(self.requests.len());
        let request = self.requests.swap_remove(at);
        for block in &request.blocks {
            self.owners[block.at()] -= 1;
            if self.owners[block.at()] == 0 {
                self.free.push(*block);
            }
        }
        Some(request.seat)
    }
}

/// One step's arrays.
#[derive(Default)]
struct Step {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
    tables: Vec<BlockIndex>,
    keys: Vec<u64>,
}

impl Step {
    fn of(traffic: &mut Traffic, quota_max: usize) -> Self {
        let mut step = Step::default();
        let mut inject = INJECT;
        let mut places = places_of(traffic.owners.len());
        for request in &mut traffic.requests {
            let left = (request.blocks.len() * traffic.page_tokens).min(CONTEXT) - request.done;
            if left == 0 || traffic.random.below(6) == 0 {
                continue;
            }
            let in_prompt = request.done < request.prompt;
            let rows = match traffic.random.below(8) {
                // Some of its answer once more, as after a preemption.
                0 if !in_prompt => 3,
                _ if !in_prompt => 1,
                1 => 1,
                _ => INJECT / 2 + traffic.random.below(INJECT / 2),
            };
            let rows = rows.min(left).min(if rows > 1 { inject } else { 1 });
            let rows = if in_prompt { rows.min(request.prompt - request.done) } else { rows };
            let blocks = (request.done + rows).div_ceil(traffic.page_tokens);
            let placed = if request.attention == Attention::Dense { 0 } else { blocks };
            if rows == 0 || placed > places {
                continue;
            }
            places -= placed;
            inject -= if rows > 1 { rows } else { 0 };
            let (row, table) = (step.tokens.len() as u32, step.tables.len() as u32);
            step.positions.extend(request.done as u32..(request.done + rows) as u32);
            step.tokens.resize(step.positions.len(), 0);
            step.keys.extend(std::iter::repeat_n(request.key, rows));
            step.tables.extend_from_slice(&request.blocks);
            step.sequences.push(SequenceRows {
                rows: row..row + rows as u32,
                first_position: request.done as u32,
                prompt_len: request.prompt as u32,
                blocks: table..table + request.blocks.len() as u32,
                attention: request.attention,
                seat: request.seat,
                quota: traffic.random.below(quota_max / SEATS + 1) as u32,
            });
            request.done += rows;
        }
        step
    }

    fn batch<'a>(&'a self, methods: &'a [Method]) -> Batch<'a> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            sequences: &self.sequences,
            block_tables: &self.tables,
            methods,
        }
    }

    /// The inputs of a layer.
    fn qkv(&self, layer: usize, cols: usize) -> Vec<f32> {
        let row = |(&key, &position): (&u64, &u32)| {
            normals(&mut Random::keyed(key, u64::from(position) << 8 | layer as u64), cols)
        };
        self.keys.iter().zip(&self.positions).flat_map(row).collect()
    }
}

/// The whole of it, with HBM from the smallest legal size up. Returns in how many waves beyond one per layer the backend did it:
/// the oracle needs none.
pub fn check_tiers<B: Backend>(make: &mut dyn FnMut() -> B, dtype: DType, seed: u64) -> u64 {
    let mut covered: [Covered; EvictionRule::ALL.len()] = Default::default();
    for (index, case) in cases().iter().enumerate() {
        let mut selected = vec![0; case.methods.len()];
        let mut runs = 0;
        let geometry = KvGeometry {
            num_layers: LAYERS,
            kv_heads: case.heads.kv_heads,
            head_dim: case.heads.head_dim,
            page_tokens: case.page_tokens,
            dtype,
        };
        let partitions = case.digests.iter().map(|d| d.made_together());
        let spec = TierSpec {
            bytes: 0,
            seats: SEATS,
            context_max: CONTEXT,
            inject_tokens_max: INJECT,
            replay_rows: INJECT,
            partition_tokens_max: partitions.max().unwrap_or(1),
            copies: DigestSpec::copies(&case.digests),
            eviction: EvictionRule::Bucketed,
            transfer: Transfer::Fused,
            link: None,
            poison: true,
        };
        let Err(TooSmall { smallest }) = spec.layout(&geometry) else { panic!("nothing is too small") };
        let pool = (SEATS * CONTEXT / case.page_tokens * geometry.block_bytes()) as u64;
        let extents = |n| (n * EXTENT_FRAMES * geometry.page_bytes()) as u64;
        // What does not depend on the rule is checked with the first.
        let sizes = |rule| match rule {
            EvictionRule::Bucketed => vec![0, pool / 8, pool / 2, 4 * pool],
            EvictionRule::Exact => vec![4 * pool],
            EvictionRule::Global => vec![(pool / 8).max(extents(3))],
        };
        for (eviction, covered) in EvictionRule::ALL.into_iter().zip(&mut covered) {
            for more in sizes(eviction) {
                let (transfer, link) = moved(eviction);
                let spec = TierSpec { bytes: smallest + more, eviction, transfer, link, ..spec };
                let rule = eviction.name();
                let what = format!("seed {seed} tiers {dtype} case {index} {rule} hbm {smallest} + {more}");
                let random = Random::keyed(seed, (40 + index as u64) << 8 | runs);
                covered.add(&run(make, case, geometry, spec, &what, random, &mut selected));
                runs += 1;
            }
        }
        // Who has selected least comes next: some more runs where a method had no turn yet.
        for _ in 0..8 {
            if selected.iter().all(|&n| n > 0) {
                break;
            }
            let spec = TierSpec { bytes: smallest + pool / 2, ..spec };
            let what = format!("seed {seed} tiers {dtype} case {index} once more");
            let random = Random::keyed(seed, (40 + index as u64) << 8 | runs);
            covered[0].add(&run(make, case, geometry, spec, &what, random, &mut selected));
            runs += 1;
        }
        assert!(
            selected.iter().all(|&n| n > 0),
            "seed {seed} tries not all methods of case {index}: {selected:?}"
        );
    }
    for (rule, covered) in EvictionRule::ALL.map(EvictionRule::name).iter().zip(&covered) {
        assert!(covered.everything(), "seed {seed} is no test of {rule}: {covered:?}");
    }
    assert!(covered.iter().any(|covered| covered.duplicates > 0), "seed {seed}: nothing is held twice");
    covered.iter().map(|covered| covered.extra_waves).sum()
}

/// How pages move where `rule` is tried, which must not show; with a link, in so long a time that somebody waits.
fn moved(rule: EvictionRule) -> (Transfer, Option<LinkSpec>) {
    let slow = LinkSpec { bytes_per_second: 200_000_000, call_nanos: 20_000 };
    match rule {
        EvictionRule::Bucketed => (Transfer::Fused, None),
        EvictionRule::Exact => (Transfer::PerPage, None),
        EvictionRule::Global => (Transfer::Fused, Some(slow)),
    }
}

/// What happened in some runs, so that a check of nothing shows.
#[derive(Debug, Default)]
struct Covered {
    hits: u64,
    misses: u64,
    evictions: u64,
    streamed: u64,
    extra_waves: u64,
    /// Pages that selections repeated.
    repeated: u64,
    /// Times that a sequence had a working set of as many steps as are looked at.
    grown: usize,
    /// Bytes of digests, seat by seat.
    loaded: u64,
    /// Times that more tokens of a request were saved than after the step before.
    saves: usize,
    /// Steps of sequences that begin with blocks of others.
    shared: usize,
    /// Frames that hold what another sequence holds, too, over all steps.
    duplicates: u64,
    /// Times that a request left its seat and kept its blocks.
    parked: usize,
    /// Runs in which digests came back to HBM; the oracle, which has no places, counts each.
    loads: usize,
}

impl Covered {
    const fn everything(&self) -> bool {
        let Covered {
            hits, misses, evictions, streamed, repeated, grown, saves, shared, parked, loads, ..
        } = *self;
        hits > 0
            && misses > 0
            && evictions > 0
            && streamed > 0
            && repeated > 0
            && grown > 0
            && saves > 0
            && shared > 0
            && parked > 0
            && loads > 0
    }

    fn add(&mut self, other: &Covered) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.evictions += other.evictions;
        self.streamed += other.streamed;
        self.extra_waves += other.extra_waves;
        self.repeated += other.repeated;
        self.grown += other.grown;
        self.saves += other.saves;
        self.shared += other.shared;
        self.duplicates += other.duplicates;
        self.parked += other.parked;
        self.loads += other.loads;
    }

    /// Adds what happened to the pages of a seat.
    fn count<B: Backend>(&mut self, world: &World<B>, seat: SeatIndex) {
        let (counters, _) = world.backend.seat_counters(&world.kv, seat);
        self.hits += counters.hits;
        self.misses += counters.misses;
        self.evictions += counters.evictions;
        self.streamed += counters.streamed;
    }
}

fn run<B: Backend>(
    make: &mut dyn FnMut() -> B,
    case: &Case,
    geometry: KvGeometry,
    spec: TierSpec,
    what: &str,
    mut random: Random,
    selected: &mut [usize],
) -> Covered {
    let num_blocks = SEATS * CONTEXT.div_ceil(case.page_tokens);
    let (mut tiered, mut unified, mut oracle) = (make(), make(), Reference::default());
    let gate = gate_of(&case.digests, case.heads, LAYERS, random.next_u64());
    let gate = gate.as_ref();
    let steps = [1, 3, 5, WORKING_SET_STEPS][random.below(4)];
    let sets = WorkingSetSpec::new(steps, (0..LAYERS).filter(|layer| *layer != 1 || case.window.is_none()));
    let mut tiered = World::new(&mut tiered, case, geometry, num_blocks, Some(spec), gate, &sets);
    let mut unified = World::new(&mut unified, case, geometry, num_blocks, None, gate, &sets);
    let mut oracle = World::new(&mut oracle, case, geometry, num_blocks, Some(spec), gate, &sets);
    let mut free: Vec<BlockIndex> = (0..num_blocks as u32).rev().map(BlockIndex).collect();
    for i in 0..free.len() / 2 {
        let other = random.below(free.len());
        free.swap(i, other);
    }
    let mut traffic = Traffic {
        random,
        requests: Vec::new(),
        free,
        owners: vec![0; num_blocks],
        page_tokens: case.page_tokens,
        shared_together: case
            .digests
            .iter()
            .map(|d| d.shared_together(case.page_tokens))
            .max()
            .unwrap_or(case.page_tokens),
    };
    let quota_max =
        tiered.backend.tier_state(&tiered.kv).map_or(0, |s| s.cache_frames as usize / 32 / LAYERS);
    let mut covered = Covered::default();
    for number in 0..40 {
        let what = format!("{what} step {number}");
        if traffic.random.below(12) == 0
            && let Some(seat) = traffic.leave()
        {
            covered.count(&tiered, seat);
            tiered.backend.release(&mut tiered.kv, seat);
            unified.backend.release(&mut unified.kv, seat);
            oracle.backend.release(&mut oracle.kv, seat);
        }
        if traffic.random.below(6) == 0
            && let Some((request, seat)) = traffic.change_seat()
        {
            covered.count(&tiered, seat);
            tiered.park(seat, &traffic.requests[request].blocks);
            unified.park(seat, &traffic.requests[request].blocks);
            oracle.park(seat, &traffic.requests[request].blocks);
            covered.parked += 1;
        }
        traffic.arrive(selected, |seat| settle(&mut tiered, &mut oracle, seat));
        let step = Step::of(&mut traffic, quota_max);
        if step.tokens.is_empty() {
            continue;
        }
        let batch = step.batch(&case.methods);
        for row in batch.sparse_rows().filter(|row| !row.plan().is_dense()) {
            if let Attention::Sparse { method, .. } = row.sequence.attention {
                selected[method as usize] += 1;
            }
        }
        tiered.begin(&batch);
        unified.begin(&batch);
        oracle.begin(&batch);
        for layer in 0..LAYERS {
            // As for a prompt that enters a layer, or leaves it.
            let mut random = Random::keyed(spec.bytes, (number * LAYERS + layer) as u64);
            if random.below(3) == 0 {
                let seat = SeatIndex(random.below(SEATS) as u32);
                let (of, extents) = (random.below(LAYERS), random.below(quota_max + 1));
                tiered.backend.grant(&mut tiered.kv, seat, of, extents);
                oracle.backend.grant(&mut oracle.kv, seat, of, extents);
            }
            let qkv = step.qkv(layer, case.heads.qkv_cols());
            let expected = unified.layer(case, layer, &qkv, &batch, None);
            let got = tiered.layer(case, layer, &qkv, &batch, None);
            assert!(got.selections == expected.selections, "{what} layer {layer}: selections");
            assert_eq!(got.coverage, expected.coverage, "{what} layer {layer}: coverage");
            assert_same_bits(&format!("{what} layer {layer}: tiered"), &got.out, &expected.out);
            oracle.layer(case, layer, &qkv, &batch, Some(&got.selections));
            if number % 8 == 7 && (layer != 1 || case.window.is_none()) {
                tiered.warm(case, layer, &batch);
                oracle.warm(case, layer, &batch);
            }
        }
        covered.duplicates += tiered.backend.tier_state(&tiered.kv).expect("tiers").duplicate_bytes;
        check_state(&tiered, &oracle, &what);
        let overlap = tiered.backend.overlap(&tiered.kv);
        assert_eq!(overlap, unified.backend.overlap(&unified.kv), "{what}: overlap in unified memory");
        assert_eq!(overlap, oracle.backend.overlap(&oracle.kv), "{what}: overlap");
        for seat in (0..SEATS as u32).map(SeatIndex) {
            let set = tiered.backend.working_set(&tiered.kv, seat);
            let in_unified = unified.backend.working_set(&unified.kv, seat);
            assert_eq!(set, in_unified, "{what} {seat:?}: working set in unified memory");
            assert_eq!(set, oracle.backend.working_set(&oracle.kv, seat), "{what} {seat:?}: working set");
            covered.grown += usize::from(set.pages > 0 && set.steps as usize == steps);
        }
        for s in batch.sequences {
            let of = tiered.backend.row_tally(&tiered.kv, s.seat);
            assert_eq!(
                of,
                unified.backend.row_tally(&unified.kv, s.seat),
                "{what} {:?}: its last row",
                s.seat
            );
            assert_eq!(of, oracle.backend.row_tally(&oracle.kv, s.seat), "{what} {:?}: its last row", s.seat);
            covered.loaded += tiered.loaded(s.seat);
        }
        tiered.backend.check_tier(&tiered.kv, &batch);
        oracle.backend.check_tier(&oracle.kv, &batch);
        for request in &mut traffic.requests {
            let seat = request.seat;
            let got = tiered.backend.seat_counters(&tiered.kv, seat);
            let expected = oracle.backend.seat_counters(&oracle.kv, seat);
            assert_eq!(got, expected, "{what} {seat:?}: counters");
            for layer in 0..LAYERS {
                let got = tiered.backend.read_resident(&tiered.kv, seat, layer);
                let expected = oracle.backend.read_resident(&oracle.kv, seat, layer);
                assert_eq!(got, expected, "{what} {seat:?} layer {layer}: resident pages");
            }
            let done = request.done / case.page_tokens * case.page_tokens;
            let saved = tiered.backend.saved_tokens(&mut tiered.kv, seat);
            let is_shared_only = request.done == request.shared * case.page_tokens;
            assert!(saved <= done || is_shared_only, "{what} {seat:?}: {saved} tokens saved of {done}");
            assert!(saved >= request.saved, "{what} {seat:?}: saved tokens stay saved");
            covered.saves += usize::from(saved > request.saved);
            request.saved = saved;
            covered.shared += usize::from(request.shared > 0 && !is_shared_only);
        }
    }
    for request in &traffic.requests {
        covered.count(&tiered, request.seat);
        settle(&mut tiered, &mut oracle, request.seat);
    }
    let state = check_state(&tiered, &oracle, what);
    assert_eq!(state.saving_pages, 0, "{what}: all is saved");
    covered.extra_waves = state.extra_waves;
    covered.repeated = tiered.backend.overlap(&tiered.kv).repeated;
    let loaded: u64 = tiered.digests.iter().map(|d| tiered.backend.digest_state(d).loaded_bytes).sum();
    assert_eq!(covered.loaded, loaded, "{what}: loads of digests are somebody's");
    for seat in (0..SEATS as u32).map(SeatIndex) {
        tiered.backend.release(&mut tiered.kv, seat);
        oracle.backend.release(&mut oracle.kv, seat);
    }
    let state = check_state(&tiered, &oracle, what);
    assert_eq!(state.cache_used, 0, "{what}: who left holds nothing");
    // The oracle has no places.
    let digests = tiered.backend.digest_state(&tiered.digests[0]);
    covered.loads += usize::from(digests.places == 0 || digests.loaded_bytes > 0);
    covered
}

/// Compares what the device says of its tier with the naive model, except for what depends on time and on how it cuts waves and moves pages.
fn check_state<B: Backend>(tiered: &World<B>, oracle: &World<Reference>, what: &str) -> TierState {
    let state = tiered.backend.tier_state(&tiered.kv).expect("tiers");
    let expected = oracle.backend.tier_state(&oracle.kv).expect("tiers");
    let TierState { stall_nanos, extra_waves, saving_pages, link_calls, .. } = state;
    let expected = TierState { stall_nanos, extra_waves, saving_pages, link_calls, ..expected };
    assert_eq!(state, expected, "{what}: what gauges and counters are made of");
    state
}

/// Waits until all full pages of `seat` are saved, which takes no further step; returns their tokens. What happens next would
/// depend on the time that saving takes, did nobody wait.
fn settle<B: Backend>(tiered: &mut World<B>, oracle: &mut World<Reference>, seat: SeatIndex) -> usize {
    let all = oracle.backend.saved_tokens(&mut oracle.kv, seat);
    for _ in 0..60_000 {
        if tiered.backend.saved_tokens(&mut tiered.kv, seat) == all {
            return all;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("{seat:?}: the pages of {all} tokens are not saved after a minute");
}
