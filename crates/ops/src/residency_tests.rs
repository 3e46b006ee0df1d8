//! The residency tables against a naive model, under thousands of random operations.

use std::collections::BTreeMap;

use super::*;
use crate::Random;

const SHAPE: ResidencyShape = ResidencyShape { seats: 3, layers: 2, kv_heads: 2, pages_max: 100, extents: 8 };

/// A page in a frame: head, page, and the step in which it was last needed.
type Held = (usize, usize, u64);

/// The frames of a (seat, layer) in order, and its step.
type Frames = (Vec<Option<Held>>, u64);

/// What the tables should say, by the rules alone: of each (seat, layer) its frames in order, and its step.
#[derive(Default)]
struct Naive {
    owners: BTreeMap<(u32, usize), Frames>,
    /// Contents of frames, as a device would have them: what was last put there, by frame of the tables.
    bytes: BTreeMap<FrameIndex, (u32, usize, usize, usize)>,
}

impl Naive {
    fn owner(&mut self, seat: u32, layer: usize) -> &mut Frames {
        self.owners.entry((seat, layer)).or_default()
    }

    fn extents(&self) -> usize {
        self.owners.values().map(|(frames, _)| frames.len()).sum::<usize>() / EXTENT_FRAMES
    }

    /// Drops the `count` oldest, of equal age those in the lowest frames.
    fn evict(&mut self, seat: u32, layer: usize, count: usize) -> Vec<(usize, usize)> {
        let (frames, step) = self.owner(seat, layer);
        let age = |needed: u64| (*step - needed).min(STAMPS as u64 - 1);
        let mut order: Vec<(u64, usize)> =
            (0..frames.len()).filter_map(|f| frames[f].map(|(_, _, needed)| (age(needed), f))).collect();
        order.sort_by_key(|&(age, frame)| (std::cmp::Reverse(age), frame));
        order[..count]
            .iter()
            .map(|&(_, f)| frames[f].take().map(|(head, page, _)| (head, page)))
            .collect::<Option<_>>()
            .expect("held")
    }
}

struct Bench {
    tables: Residency,
    naive: Naive,
    random: Random,
}

impl Bench {
    fn new(seed: u64) -> Self {
        Bench { tables: Residency::new(SHAPE), naive: Naive::default(), random: Random::new(seed) }
    }

    /// A step of (seat, layer) that needs some pages: near those of the last steps, mostly.
    fn step(&mut self, seat: u32, layer: usize) {
        let quota = self.tables.quota(SeatIndex(seat), layer);
        let mut wanted: Vec<(usize, usize)> = Vec::new();
        for _ in 0..self.random.below(quota + 1) {
            let spread = [10, SHAPE.pages_max][self.random.below(2)];
            let page = (self.random.below(2), self.random.below(spread));
            if !wanted.contains(&page) {
                wanted.push(page);
            }
        }
        let (tables, at) = (&mut self.tables, SeatIndex(seat));
        tables.begin(at, layer);
        self.naive.owner(seat, layer).1 += 1;
        let step = self.naive.owner(seat, layer).1;
        let mut missed = Vec::new();
        for &(head, page) in &wanted {
            let (frames, _) = self.naive.owner(seat, layer);
            let found = frames.iter_mut().flatten().find(|(h, p, _)| (*h, *p) == (head, page));
            let hit = tables.need(at, layer, head, page);
            assert_eq!(hit.is_some(), found.is_some(), "head {head} page {page}");
            match (found, hit) {
                (Some(held), Some(frame)) => {
                    held.2 = step;
                    assert_eq!(
                        self.naive.bytes[&frame],
                        (seat, layer, head, page),
                        "a hit is the right page"
                    );
                }
                _ => missed.push((head, page)),
            }
        }
        let held = self.naive.owner(seat, layer).0.iter().flatten().count();
        let spill = (held + missed.len()).saturating_sub(quota);
        let expected = self.naive.evict(seat, layer, spill);
        let mut evicted = Vec::new();
        let bytes = &mut self.naive.bytes;
        tables.fit(at, layer, missed.len(), &mut |frame| {
            let (_, _, head, page) = bytes.remove(&frame).expect("a frame that held a page");
            evicted.push((head, page));
        });
        evicted.sort_unstable();
        let mut sorted = expected;
        sorted.sort_unstable();
        assert_eq!(evicted, sorted, "victims");
        for (head, page) in missed {
            let frame = tables.insert(at, layer, head, page);
            let before = self.naive.bytes.insert(frame, (seat, layer, head, page));
            assert_eq!(before, None, "{frame:?} was free");
            let (frames, _) = self.naive.owner(seat, layer);
            let free = frames.iter().position(Option::is_none).expect("a free frame");
            frames[free] = Some((head, page, step));
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
        if frames < self.naive.owner(seat, layer).0.len() {
            self.naive.owner(seat, layer).1 += 1;
            let held = self.naive.owner(seat, layer).0.iter().flatten().count();
            self.naive.evict(seat, layer, held.saturating_sub(frames));
            let (all, _) = self.naive.owner(seat, layer);
            for frame in frames..all.len() {
                if let Some(page) = all[frame].take() {
                    let free = all.iter().position(Option::is_none).expect("room for what stays");
                    all[free] = Some(page);
                }
            }
            all.truncate(frames);
        }
        self.tables.grow(at, layer, wanted);
        let spare = SHAPE.extents - self.naive.extents();
        let (all, _) = self.naive.owner(seat, layer);
        let more = wanted.saturating_sub(all.len() / EXTENT_FRAMES).min(spare);
        all.resize(all.len() + more * EXTENT_FRAMES, None);
    }

    fn release(&mut self, seat: u32) {
        let bytes = &mut self.naive.bytes;
        self.tables.release(SeatIndex(seat), &mut |frame| {
            bytes.remove(&frame).expect("a frame that held a page");
        });
        self.naive.owners.retain(|(s, _), _| *s != seat);
    }

    fn check(&self) {
        self.tables.check();
        for seat in 0..SHAPE.seats as u32 {
            for layer in 0..SHAPE.layers {
                let mut found: Vec<(usize, usize)> = self
                    .tables
                    .resident(SeatIndex(seat), layer)
                    .map(|(head, page, _)| (head, page))
                    .collect();
                found.sort_unstable();
                let none = (Vec::new(), 0);
                let (frames, _) = self.naive.owners.get(&(seat, layer)).unwrap_or(&none);
                let mut expected: Vec<(usize, usize)> = frames.iter().flatten().map(|r| (r.0, r.1)).collect();
                expected.sort_unstable();
                assert_eq!(found, expected, "seat {seat} layer {layer}");
                assert_eq!(self.tables.quota(SeatIndex(seat), layer), frames.len());
            }
        }
    }
}

/// Runs operations of one seed, and returns what is left.
fn drive(seed: u64, operations: usize) -> Bench {
    eprintln!("residency seed {seed}");
    let mut bench = Bench::new(seed);
    for _ in 0..operations {
        let (seat, layer) = (bench.random.below(3) as u32, bench.random.below(2));
        match bench.random.below(24) {
            0 => bench.release(seat),
            1..=3 => bench.resize(seat, layer),
            _ => bench.step(seat, layer),
        }
        bench.check();
    }
    bench
}

#[test]
fn tables_do_what_the_model_does() {
    for seed in 0..8 * crate::conformance::seed_factor() {
        let totals = drive(seed, 2000).tables.totals();
        assert!(totals.hits.min(totals.misses).min(totals.evictions) > 1000, "seed {seed}: {totals:?}");
    }
}

/// Each kind of damage is noticed, or the check is none.
#[test]
fn damaged_tables_are_noticed() {
    type Damage = fn(&mut Residency);
    let damages: [(&str, Damage); 6] = [
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
            t.free_extents.pop().map_or_else(|| t.owners[0].first = NONE, |_| ());
        }),
        ("a count is wrong", |t| t.owners.iter_mut().find(|o| o.held > 0).expect("an owner").held -= 1),
        ("a frame holds another page", |t| {
            let extent = t.occupied.iter().position(|&o| o != 0).expect("a frame");
            let frame = extent * EXTENT_FRAMES + t.occupied[extent].trailing_zeros() as usize;
            t.held[frame] ^= 1;
        }),
    ];
    for (what, damage) in damages {
        let mut tables = drive(1, 300).tables;
        damage(&mut tables);
        let noticed = std::panic::catch_unwind(|| tables.check()).is_err();
        assert!(noticed, "{what}, and nobody noticed");
    }
}

/// Pages of equal age go in order of frames; a page that is needed always stays.
#[test]
fn the_oldest_go_first() {
    let mut tables = Residency::new(SHAPE);
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
    tables.fit(seat, 0, 8, &mut |frame| gone.push(frame.0));
    assert_eq!(gone, [2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(tables.counters(seat).hits_by_age[4], 2);
}

/// An age that stamps cannot tell stays the greatest, and does not come round to a young one.
#[test]
fn ages_do_not_wrap() {
    let mut tables = Residency::new(SHAPE);
    let seat = SeatIndex(1);
    tables.grow(seat, 1, 1);
    tables.begin(seat, 1);
    tables.insert(seat, 1, 0, 7);
    for _ in 0..STAMPS + 1 {
        tables.begin(seat, 1);
    }
    (0..31).for_each(|page| {
        tables.insert(seat, 1, 1, page);
    });
    tables.begin(seat, 1);
    let mut gone = 0;
    tables.fit(seat, 1, 1, &mut |_| gone += 1);
    assert_eq!((gone, tables.find(seat, 1, 0, 7)), (1, None));
}

/// Llama-3.1-70B, 32 requests of 128K tokens: the tables of a tier that is full stay below those of the flat design.
#[test]
fn tables_are_small() {
    let shape = ResidencyShape { seats: 32, layers: 80, kv_heads: 8, pages_max: 8192, extents: 40_000 };
    assert!(shape.bytes() < 2 << 30, "{} bytes", shape.bytes());
}
