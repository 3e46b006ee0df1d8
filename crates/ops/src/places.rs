//! Which blocks have their digests in HBM: from a block to a *place*, which holds what all policies of a server keep of one block.
//!
//! DRAM holds the digests of every block. A step needs those of the blocks of its sparse sequences in HBM; what others left there
//! gives way, the longest unused first, for DRAM has it, too. Tables are flat arrays of integers, and every choice is
//! deterministic: blocks are placed as they are named, in the lowest free place, and of equally old places the lowest goes first.

use crate::BlockIndex;

/// No place, no block: tables start as zeros, so everything else is stored plus one.
const NONE: u32 = 0;

/// A block that gets a place in this step.
const PENDING: u32 = u32::MAX;

/// How much of its digests a device has in HBM; zeros in unified memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DigestState {
    /// Places.
    pub places: u64,
    /// Those that hold the digests of a block.
    pub used: u64,
    /// Bytes copied from DRAM to HBM, since the start.
    pub loaded_bytes: u64,
}

/// Places and who has them.
#[derive(Clone, Debug)]
pub struct Places {
    /// `[block]`: place, plus one.
    of_block: Vec<u32>,
    /// `[place]`: block, plus one.
    blocks: Vec<u32>,
    /// `[place]`: step in which it was last needed.
    stamps: Vec<u32>,
    now: u32,
    used: usize,
    /// Blocks that are to be placed, and places that may give way; kept for their memory.
    missing: Vec<BlockIndex>,
    old: Vec<u32>,
}

impl Places {
    /// `places` places for the digests of `num_blocks` blocks.
    ///
    /// # Panics
    /// When an index would not fit in 32 bits.
    pub fn new(num_blocks: usize, places: usize) -> Self {
        assert!(num_blocks.max(places) < u32::MAX as usize, "blocks and places are u32");
        Places {
            of_block: vec![NONE; num_blocks],
            blocks: vec![NONE; places],
            stamps: vec![0; places],
            now: 0,
            used: 0,
            missing: Vec::with_capacity(places),
            old: Vec::with_capacity(places),
        }
    }

    /// Places in all, and those that hold something.
    pub fn counts(&self) -> (usize, usize) {
        (self.blocks.len(), self.used)
    }

    /// Bytes of the tables, and of a list of what a step loads.
    pub fn bytes(num_blocks: usize, places: usize) -> u64 {
        (4 * (num_blocks + 4 * places) + size_of::<(BlockIndex, usize)>() * places) as u64
    }

    /// Where the digests of a block are, if they are in HBM.
    #[inline(always)]
    pub fn of(&self, block: BlockIndex) -> Option<usize> {
        match self.of_block[block.at()] {
            NONE => None,
            place => Some(place as usize - 1),
        }
    }

    /// Begins a step that needs the digests of `blocks`, some of them perhaps named twice. Calls `load` for each that has to
    /// come from DRAM, with its place.
    ///
    /// # Panics
    /// When there are more blocks than places.
    pub fn hold(
        &mut self,
        blocks: impl Iterator<Item = BlockIndex>,
        mut load: impl FnMut(BlockIndex, usize),
    ) {
        self.begin();
        self.missing.clear();
        for block in blocks {
            match self.of_block[block.at()] {
                NONE => {
                    assert!(
                        self.missing.len() < self.blocks.len(),
                        "a step has no more blocks than there are places: {}",
                        self.blocks.len()
                    );
                    self.missing.push(block);
                    self.of_block[block.at()] = PENDING;
                }
                PENDING => {}
                place => self.stamps[place as usize - 1] = self.now,
            }
        }
        if self.missing.is_empty() {
            return;
        }
        self.find_old(self.missing.len());
        for i in 0..self.missing.len() {
            let (block, place) = (self.missing[i], self.old[i] as usize);
            match self.blocks[place] {
                NONE => self.used += 1,
                before => self.of_block[before as usize - 1] = NONE,
            }
            self.of_block[block.at()] = place as u32 + 1;
            self.blocks[place] = block.0 + 1;
            self.stamps[place] = self.now;
            load(block, place);
        }
    }

    /// The next step. Stamps that would not fit any more begin anew, all equally old.
    fn begin(&mut self) {
        if self.now == u32::MAX {
            self.stamps.fill(0);
            self.now = 0;
        }
        self.now += 1;
    }

    /// The `count` places that are to be taken, empty ones first, then by age, then by number: in that order.
    fn find_old(&mut self, count: usize) {
        self.old.clear();
        let (now, stamps, blocks) = (self.now, &self.stamps, &self.blocks);
        self.old.extend((0..blocks.len() as u32).filter(|&p| stamps[p as usize] != now));
        assert!(
            self.old.len() >= count,
            "a step has no more blocks than there are places: {}",
            self.blocks.len()
        );
        let age = |place: &u32| {
            let place = *place as usize;
            (blocks[place] != NONE, stamps[place], place)
        };
        if count < self.old.len() {
            self.old.select_nth_unstable_by_key(count, age);
        }
        self.old.truncate(count);
        self.old.sort_unstable_by_key(age);
    }

    /// Panics unless blocks and places agree. Slow: for tests.
    pub fn check(&self) {
        let placed = self.of_block.iter().enumerate().filter(|(_, place)| **place != NONE);
        let mut count = 0;
        for (block, &place) in placed {
            assert_eq!(
                self.blocks[place as usize - 1],
                block as u32 + 1,
                "a place holds what is said to be there"
            );
            count += 1;
        }
        assert_eq!(
            self.blocks.iter().filter(|block| **block != NONE).count(),
            count,
            "a block has one place"
        );
        assert_eq!(self.used, count, "places in use are counted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Random;

    /// A list of blocks by age, and the step in which each was last needed.
    #[derive(Default)]
    struct Naive(Vec<(BlockIndex, u32)>);

    #[test]
    fn places_hold_what_a_step_needs() {
        for seed in 0..20 {
            let mut random = Random::new(seed);
            let (num_blocks, count) = (1 + random.below(60), 1 + random.below(30));
            let mut places = Places::new(num_blocks, count);
            if random.below(4) == 0 {
                places.now = u32::MAX - 40;
            }
            let mut naive = Naive::default();
            for step in 1..200 {
                let wanted = random.below(count.min(num_blocks) + 1);
                let mut blocks: Vec<BlockIndex> = Vec::new();
                while blocks.len() < wanted {
                    let block = BlockIndex(random.below(num_blocks) as u32);
                    if !blocks.contains(&block) {
                        blocks.push(block);
                    }
                }
                let twice: Vec<BlockIndex> = blocks.iter().chain(&blocks).copied().collect();
                let mut loaded = Vec::new();
                places.hold(twice.into_iter(), |block, place| loaded.push((block, place)));
                places.check();
                let expected = blocks.iter().filter(|b| naive.0.iter().all(|(held, _)| held != *b));
                let expected: Vec<BlockIndex> = expected.copied().collect();
                assert_eq!(
                    loaded.iter().map(|l| l.0).collect::<Vec<_>>(),
                    expected,
                    "seed {seed} step {step}"
                );
                naive.0.retain(|(held, _)| !blocks.contains(held));
                naive.0.extend(blocks.iter().map(|block| (*block, step)));
                // Who had to give way was not younger than who stayed.
                let gone: Vec<u32> =
                    naive.0.iter().filter(|(b, _)| places.of(*b).is_none()).map(|(_, s)| *s).collect();
                naive.0.retain(|(block, _)| places.of(*block).is_some());
                let stayed = naive.0.iter().filter(|(b, _)| !blocks.contains(b)).map(|(_, s)| *s).min();
                let oldest_gone = gone.iter().max().copied();
                let wrapped = places.now < step;
                assert!(
                    wrapped || oldest_gone.is_none_or(|gone| stayed.is_none_or(|stayed| gone <= stayed)),
                    "seed {seed} step {step}"
                );
                let (_, used) = places.counts();
                assert!(
                    gone.is_empty() || used == count,
                    "seed {seed} step {step}: nobody goes while there is room"
                );
            }
        }
    }

    #[test]
    fn a_block_that_is_named_twice_takes_one_place() {
        let mut places = Places::new(9, 3);
        let mut loaded = 0;
        places.hold([4, 1, 2, 4, 1, 2].into_iter().map(BlockIndex), |_, _| loaded += 1);
        places.check();
        assert_eq!((loaded, places.counts()), (3, (3, 3)));
        assert_eq!([4, 1, 2].map(|block| places.of(BlockIndex(block))), [Some(0), Some(1), Some(2)]);
    }

    #[test]
    #[should_panic(expected = "no more blocks than there are places")]
    fn a_step_with_too_many_blocks_is_a_bug() {
        Places::new(9, 3).hold((0..4).map(BlockIndex), |_, _| {});
    }
}
