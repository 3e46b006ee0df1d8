//! The residency tables against a naive model, under thousands of random operations.

use std::collections::BTreeMap;

use super::*;
use crate::Random;

const SEATS: usize = 3;
const LAYERS: usize = 2;
const PAGES: usize = 100;
const EXTENTS: usize = 8;

fn shape(eviction: EvictionRule) -> ResidencyShape {
    ResidencyShape { seats: SEATS, layers: LAYERS, kv_heads: 2, pages_max: PAGES, extents: EXTENTS, eviction }
}

/// A page in a frame: seat, head, page, and the step in which it was last needed.
type Held = (u32, usize, usize, u64);

/// The frames of a pool in order, and its step.
type Frames = (Vec<Option<Held>>, u64);

/// What the tables should say, by the rules alone: of each pool its frames in order, and its step.
struct Naive {
    rule: EvictionRule,
    /// By seat, if not all share them, and layer.
    pools: BTreeMap<(Option<u32>, usize), Frames>,
    evictions: [u64; SEATS],
    /// Victims of ages that short stamps do not tell.
    old: u64,
    /// Contents of frames, as a device would have them: what was last put there, by frame of the tables.
    bytes: BTreeMap<FrameIndex, (u32, usize, usize, usize)>,
}

impl Naive {
    fn new(rule: EvictionRule) -> Self {
        let mut naive =
            Naive { rule, pools: BTreeMap::new(), evictions: [0; SEATS], old: 0, bytes: BTreeMap::new() };
        if rule == EvictionRule::Global {
            let frames = vec![None; EXTENTS / LAYERS * EXTENT_FRAMES];
            (0..LAYERS).for_each(|layer| *naive.pool(0, layer) = (frames.clone(), 0));
        }
        naive
    }

    fn pool(&mut self, seat: u32, layer: usize) -> &mut Frames {
        let seat = (self.rule != EvictionRule::Global).then_some(seat);
        self.pools.entry((seat, layer)).or_default()
    }

    fn extents(&self) -> usize {
        self.pools.values().map(|(frames, _)| frames.len()).sum::<usize>() / EXTENT_FRAMES
    }

    /// Drops the `count` oldest, of equal age those in the lowest frames.
    fn evict(&mut self, seat: u32, layer: usize, count: usize) -> Vec<(u32, usize, usize)> {
        let most = if self.rule == EvictionRule::Bucketed { 63 } else { u64::MAX };
        let (frames, step) = self.pool(seat, layer);
        let age = |needed: u64| (*step - needed).min(most);
        let mut order: Vec<(u64, usize)> =
            (0..frames.len()).filter_map(|f| frames[f].map(|held| (age(held.3), f))).collect();
        order.sort_by_key(|&(age, frame)| (std::cmp::Reverse(age), frame));
        let old =
            order[..count].iter().filter(|(_, f)| frames[*f].is_some_and(|held| *step - held.3 > 63)).count();
        let gone: Vec<_> = order[..count]
            .iter()
            .map(|&(_, f)| frames[f].take().map(|(seat, head, page, _)| (seat, head, page)))
            .collect::<Option<_>>()
            .expect("held");
        self.old += old as u64;
        gone.iter().for_each(|&(seat, _, _)| self.evictions[seat as usize] += 1);
        gone
    }
}

struct Bench {
    tables: Residency,
    naive: Naive,
    random: Random,
    /// Requests stay long and mostly need what they needed before.
    calm: bool,
}

impl Bench {
    fn new(rule: EvictionRule, seed: u64) -> Self {
        Bench {
            tables: Residency::new(shape(rule)),
            naive: Naive::new(rule),
            random: Random::new(seed),
            calm: seed % 2 == 1,
        }
    }

    /// A step of a pool that needs some pages, now and then more than it holds: near those of the last steps, mostly.
    fn step(&mut self, seat: u32, layer: usize) {
        let quota = self.tables.quota(SeatIndex(seat), layer);
        let mut wanted: Vec<(u32, usize, usize)> = Vec::new();
        // Small steps let other pages grow old.
        let small = self.calm && self.random.below(30) > 0;
        let more = if !small && self.random.below(8) == 0 { 40 } else { 0 };
        let count = if small { 3.min(quota) } else { self.random.below(quota + 1) + more };
        for _ in 0..count {
            let spread = if small { 2 } else { [10, PAGES][self.random.below(2)] };
            let seat = match self.naive.rule {
                EvictionRule::Global => self.random.below(SEATS) as u32,
                _ => seat,
            };
            let page = (seat, self.random.below(2), self.random.below(spread));
            if !wanted.contains(&page) {
                wanted.push(page);
            }
        }
        let (tables, at) = (&mut self.tables, SeatIndex(seat));
        tables.begin(at, layer);
        self.naive.pool(seat, layer).1 += 1;
        let step = self.naive.pool(seat, layer).1;
        let mut missed = Vec::new();
        for &(seat, head, page) in &wanted {
            let (frames, _) = self.naive.pool(seat, layer);
            let found =
                frames.iter_mut().flatten().find(|held| (held.0, held.1, held.2) == (seat, head, page));
            let hit = tables.need(SeatIndex(seat), layer, head, page);
            assert_eq!(hit.is_some(), found.is_some(), "seat {seat} head {head} page {page}");
            match (found, hit) {
                (Some(held), Some(frame)) => {
                    held.3 = step;
                    assert_eq!(
                        self.naive.bytes[&frame],
                        (seat, layer, head, page),
                        "a hit is the right page"
                    );
                }
                _ => missed.push((seat, head, page)),
            }
        }
        let held = self.naive.pool(seat, layer).0.iter().flatten().count();
        // What is needed stays, even if there is more of it than frames.
        let spill = (held + missed.len()).saturating_sub(quota).min(held - (wanted.len() - missed.len()));
        let mut expected = self.naive.evict(seat, layer, spill);
        let mut evicted = Vec::new();
        let bytes = &mut self.naive.bytes;
        tables.fit(at, layer, wanted.len(), missed.len(), &mut |frame| {
            let (seat, _, head, page) = bytes.remove(&frame).expect("a frame that held a page");
            evicted.push((seat, head, page));
        });
        evicted.sort_unstable();
        expected.sort_unstable();
        assert_eq!(evicted, expected, "victims");
        for (seat, head, page) in missed {
            let (frames, _) = self.naive.pool(seat, layer);
            let free = frames.iter().position(Option::is_none);
            assert_eq!(tables.has_room(SeatIndex(seat), layer), free.is_some(), "room");
            let Some(free) = free else { break };
            frames[free] = Some((seat, head, page, step));
            let frame = tables.insert(SeatIndex(seat), layer, head, page);
            let before = self.naive.bytes.insert(frame, (seat, layer, head, page));
            assert_eq!(before, None, "{frame:?} was free");
        }
    }

    /// Another quota.
    fn resize(&mut self, seat: u32, layer: usize) {
        let (wanted, at) = (self.random.below(5), SeatIndex(seat));
        let bytes = &mut self.naive.bytes;
        self.tables.shrink(at, layer, wanted, &mut |from, to| {
            let content = bytes.remove(&from).expect("a frame that held a page");
            if let Some(to) = to {
                assert_eq!(bytes.insert(to, content), None, "{to:?} was free");
            }
        });
        let frames = wanted * EXTENT_FRAMES;
        if self.naive.rule == EvictionRule::Global {
            self.tables.grow(at, layer, wanted);
            return;
        }
        if frames < self.naive.pool(seat, layer).0.len() {
            self.naive.pool(seat, layer).1 += 1;
            let held = self.naive.pool(seat, layer).0.iter().flatten().count();
            self.naive.evict(seat, layer, held.saturating_sub(frames));
            let (all, _) = self.naive.pool(seat, layer);
            for frame in frames..all.len() {
                if let Some(page) = all[frame].take() {
                    let free = all.iter().position(Option::is_none).expect("room for what stays");
                    all[free] = Some(page);
                }
            }
            all.truncate(frames);
        }
        self.tables.grow(at, layer, wanted);
        let spare = EXTENTS - self.naive.extents();
        let (all, _) = self.naive.pool(seat, layer);
        let more = wanted.saturating_sub(all.len() / EXTENT_FRAMES).min(spare);
        all.resize(all.len() + more * EXTENT_FRAMES, None);
    }

    fn release(&mut self, seat: u32) {
        let bytes = &mut self.naive.bytes;
        self.tables.release(SeatIndex(seat), &mut |frame| {
            bytes.remove(&frame).expect("a frame that held a page");
        });
        self.naive.pools.retain(|(owner, _), _| *owner != Some(seat));
        let frames = self.naive.pools.values_mut().flat_map(|(frames, _)| frames);
        frames.filter(|held| held.is_some_and(|held| held.0 == seat)).for_each(|held| *held = None);
        self.naive.evictions[seat as usize] = 0;
    }

    fn check(&self) {
        self.tables.check();
        for seat in 0..SEATS as u32 {
            let at = SeatIndex(seat);
            assert_eq!(self.tables.counters(at).evictions, self.naive.evictions[seat as usize]);
            let mut all = 0;
            for layer in 0..LAYERS {
                let mut found: Vec<(usize, usize)> =
                    self.tables.resident(at, layer).map(|(head, page, _)| (head, page)).collect();
                found.sort_unstable();
                let none = (Vec::new(), 0);
                let owner = (self.naive.rule != EvictionRule::Global).then_some(seat);
                let (frames, _) = self.naive.pools.get(&(owner, layer)).unwrap_or(&none);
                let of_seat = frames.iter().flatten().filter(|held| held.0 == seat);
                let mut expected: Vec<(usize, usize)> = of_seat.map(|held| (held.1, held.2)).collect();
                expected.sort_unstable();
                assert_eq!(found, expected, "seat {seat} layer {layer}");
                assert_eq!(self.tables.quota(at, layer), frames.len());
                all += found.len();
            }
            assert_eq!(self.tables.frames_of(at), all, "frames of seat {seat}");
        }
    }
}

/// Runs operations of one seed, and returns what is left.
fn drive(rule: EvictionRule, seed: u64, operations: usize) -> Bench {
    eprintln!("residency {} seed {seed}", rule.name());
    let mut bench = Bench::new(rule, seed);
    for _ in 0..operations {
        let (seat, layer) = (bench.random.below(3) as u32, bench.random.below(2));
        match bench.random.below(24) {
            0 if !bench.calm || bench.random.below(40) == 0 => bench.release(seat),
            1..=3 if !bench.calm || bench.random.below(10) == 0 => bench.resize(seat, layer),
            _ => bench.step(seat, layer),
        }
        bench.check();
    }
    bench
}

#[test]
fn tables_do_what_the_model_does() {
    for rule in EvictionRule::ALL {
        let (mut all, mut old) = (SeatCounters::default(), 0);
        for seed in 0..6 * crate::conformance::seed_factor() {
            let bench = drive(rule, seed, 2000);
            all.add(&bench.tables.totals());
            old += bench.naive.old;
        }
        let least = all.hits.min(all.misses).min(all.evictions);
        assert!(least > 5000 && old > 100, "{}: {old} victims of great age of {all:?}", rule.name());
    }
}

/// Each kind of damage is noticed, or the check is none.
#[test]
fn damaged_tables_are_noticed() {
    type Damage = fn(&mut Residency);
    let damages: [(&str, Damage); 7] = [
        ("a page leads to another frame", |t| {
            let leaf = t.leaves.iter_mut().find(|l| l.iter().any(|&f| f != NONE)).expect("a leaf");
            *leaf.iter_mut().find(|f| **f != NONE).expect("an entry") ^= 1;
        }),
        ("a frame is forgotten", |t| {
            let extent = t.occupied.iter_mut().find(|o| **o != 0).expect("a frame");
            *extent &= *extent - 1;
        }),
        ("a leaf is lost", |t| *t.directory.iter_mut().find(|d| **d != NONE).expect("a leaf") = NONE),
        ("an extent is lost", |t| {
            t.free_extents.pop().map_or_else(|| t.pools[0].first = NONE, |_| ());
        }),
        ("a count is wrong", |t| t.pools.iter_mut().find(|p| p.held > 0).expect("a pool").held -= 1),
        ("a frame holds another page", |t| {
            let extent = t.occupied.iter().position(|&o| o != 0).expect("a frame");
            let frame = extent * EXTENT_FRAMES + t.occupied[extent].trailing_zeros() as usize;
            t.held[frame] ^= 1;
        }),
        ("a frame is another seat's", |t| {
            let extent = t.occupied.iter().position(|&o| o != 0).expect("a frame");
            let frame = extent * EXTENT_FRAMES + t.occupied[extent].trailing_zeros() as usize;
            t.holders[frame] = (t.holders[frame] + 1) % SEATS as u32;
        }),
    ];
    for rule in EvictionRule::ALL {
        for (what, damage) in damages {
            if what == "a frame is another seat's" && !rule.shares_frames() {
                continue;
            }
            let mut tables = drive(rule, 1, 300).tables;
            damage(&mut tables);
            let noticed = std::panic::catch_unwind(|| tables.check()).is_err();
            assert!(noticed, "{}: {what}, and nobody noticed", rule.name());
        }
    }
}

/// Pages of equal age go in order of frames; a page that is needed always stays.
#[test]
fn the_oldest_go_first() {
    for rule in [EvictionRule::Bucketed, EvictionRule::Exact] {
        let mut tables = Residency::new(shape(rule));
        let seat = SeatIndex(0);
        tables.grow(seat, 0, 1);
        for step in 0..4 {
            tables.begin(seat, 0);
            (0..8).for_each(|i| {
                tables.insert(seat, 0, 0, 8 * step + i);
            });
        }
        tables.begin(seat, 0);
        // Of the oldest eight the first two are needed again.
        assert!(tables.need(seat, 0, 0, 0).is_some() && tables.need(seat, 0, 0, 1).is_some());
        let mut gone = Vec::new();
        tables.fit(seat, 0, 10, 8, &mut |frame| gone.push(frame.0));
        assert_eq!(gone, [2, 3, 4, 5, 6, 7, 8, 9], "{}", rule.name());
        assert_eq!(tables.counters(seat).hits_by_age[4], 2);
    }
}

/// An age that short stamps cannot tell stays the greatest, and does not come round to a young one; exact ones tell it.
#[test]
fn ages_do_not_wrap() {
    for (rule, steps) in
        [(EvictionRule::Bucketed, 65), (EvictionRule::Bucketed, 700), (EvictionRule::Exact, 70_000)]
    {
        let mut tables = Residency::new(shape(rule));
        let seat = SeatIndex(1);
        tables.grow(seat, 1, 1);
        // The first frame is younger than the second, by one step.
        tables.begin(seat, 1);
        tables.insert(seat, 1, 1, 50);
        tables.insert(seat, 1, 0, 7);
        tables.begin(seat, 1);
        assert!(tables.need(seat, 1, 1, 50).is_some());
        for _ in 0..steps {
            tables.begin(seat, 1);
        }
        (0..30).for_each(|page| {
            tables.insert(seat, 1, 1, page);
        });
        tables.begin(seat, 1);
        let mut gone = Vec::new();
        tables.fit(seat, 1, 1, 1, &mut |frame| gone.push(frame.0));
        let expected = if rule == EvictionRule::Exact { 1 } else { 0 };
        assert_eq!(gone, [expected], "{} after {steps} steps", rule.name());
    }
}

/// Whoever's page is the oldest goes, and it is counted for whom it belonged to.
#[test]
fn requests_that_share_frames_evict_each_other() {
    let mut tables = Residency::new(shape(EvictionRule::Global));
    let (idle, busy) = (SeatIndex(0), SeatIndex(2));
    let frames = tables.quota(idle, 0);
    assert_eq!(frames, EXTENTS / LAYERS * EXTENT_FRAMES, "all of a layer");
    tables.begin(idle, 0);
    (0..10).for_each(|page| {
        tables.insert(idle, 0, 0, page);
    });
    tables.begin(busy, 0);
    (0..frames - 10).for_each(|i| {
        tables.insert(busy, 0, i % 2, i / 2);
    });
    tables.begin(busy, 0);
    let mut gone = 0;
    tables.fit(busy, 0, 4, 4, &mut |_| gone += 1);
    assert_eq!((gone, tables.counters(idle).evictions, tables.counters(busy).evictions), (4, 4, 0));
    assert_eq!((tables.frames_of(idle), tables.frames_of(busy)), (6, frames - 10));
    // More than there are frames: all that is not needed goes, and no more.
    assert!(tables.need(idle, 0, 0, 9).is_some());
    tables.fit(busy, 0, 1 + frames, frames, &mut |_| gone += 1);
    assert_eq!((gone, tables.frames_of(idle), tables.frames_of(busy)), (frames - 1, 1, 0));
}

/// Llama-3.1-70B, 32 requests of 128K tokens: the tables of a tier that is full stay below those of the flat design.
#[test]
fn tables_are_small() {
    for eviction in EvictionRule::ALL {
        let shape =
            ResidencyShape { seats: 32, layers: 80, kv_heads: 8, pages_max: 8192, extents: 40_000, eviction };
        assert!(shape.bytes() < 2 << 30, "{} bytes", shape.bytes());
    }
}
