//! The DRAM pool as bookkeeping: every block is free, in use or cached.
//!
//! ```text
//!           take_free                release, not kept
//!   free ------------> in use (owners) --------------> free
//!                      ^   |  release, kept
//!                share |   v
//!                      cached --------------> in use    (take_oldest: its content is forgotten)
//!                      |
//!                      | forget
//!                      v
//!                     free
//! ```

use ops::BlockIndex;

/// Blocks by state; they add up to the size of the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Hold nothing.
    pub free: usize,
    /// In the block table of at least one sequence.
    pub in_use: usize,
    /// Used by nobody, but hold KV that a later prompt can share; evicted when blocks are needed.
    pub cached: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    InUse {
        owners: u32,
    },
    /// Linked in order of release.
    Cached {
        older: Option<BlockIndex>,
        newer: Option<BlockIndex>,
    },
}

pub(crate) struct Pool {
    states: Vec<State>,
    /// A stack: blocks released in reverse order come back ascending, so a prompt's blocks tend to lie side by side.
    free: Vec<BlockIndex>,
    num_cached: usize,
    oldest: Option<BlockIndex>,
    newest: Option<BlockIndex>,
}

impl Pool {
    pub(crate) fn new(num_blocks: usize) -> Self {
        assert!(num_blocks > 0, "a pool has blocks");
        let num_blocks = u32::try_from(num_blocks).expect("block indices are u32");
        Pool {
            states: vec![State::Free; num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockIndex).collect(),
            num_cached: 0,
            oldest: None,
            newest: None,
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        let (free, cached) = (self.free.len(), self.num_cached);
        Counts { free, in_use: self.states.len() - free - cached, cached }
    }

    /// Free + cached: what can be had without preempting anyone.
    pub(crate) fn num_available(&self) -> usize {
        self.free.len() + self.num_cached
    }

    pub(crate) fn is_cached(&self, block: BlockIndex) -> bool {
        matches!(self.states[block.at()], State::Cached { .. })
    }

    /// Block tables that `block` is in.
    pub(crate) fn owners(&self, block: BlockIndex) -> u32 {
        match self.states[block.at()] {
            State::InUse { owners } => owners,
            State::Free | State::Cached { .. } => 0,
        }
    }

    /// Free -> in use, with one owner.
    pub(crate) fn take_free(&mut self) -> Option<BlockIndex> {
        let block = self.free.pop()?;
        assert_eq!(self.states[block.at()], State::Free, "{block:?} is on the free list");
        self.states[block.at()] = State::InUse { owners: 1 };
        Some(block)
    }

    /// Cached -> in use, with one owner: the block that was released first. The caller forgets its content.
    pub(crate) fn take_oldest(&mut self) -> Option<BlockIndex> {
        let block = self.oldest?;
        self.unlink(block);
        self.states[block.at()] = State::InUse { owners: 1 };
        Some(block)
    }

    /// Cached -> free: its content is forgotten.
    pub(crate) fn forget(&mut self, block: BlockIndex) {
        self.unlink(block);
        self.states[block.at()] = State::Free;
        self.free.push(block);
    }

    /// One owner more, of a block that is in use or cached.
    pub(crate) fn share(&mut self, block: BlockIndex) {
        let owners = match self.states[block.at()] {
            State::Free => panic!("{block:?} is free and holds nothing to share"),
            State::InUse { owners } => owners,
            State::Cached { .. } => {
                self.unlink(block);
                0
            }
        };
        self.states[block.at()] = State::InUse { owners: owners + 1 };
    }

    /// One owner less. The last one leaves the block cached if `keep`, else free.
    pub(crate) fn release(&mut self, block: BlockIndex, keep: bool) {
        let State::InUse { owners } = self.states[block.at()] else {
            panic!("{block:?} is released and in use by nobody");
        };
        assert!(owners > 0, "a block in use has an owner");
        if owners > 1 {
            self.states[block.at()] = State::InUse { owners: owners - 1 };
        } else if keep {
            self.link_newest(block);
        } else {
            self.states[block.at()] = State::Free;
            self.free.push(block);
        }
    }

    fn link_newest(&mut self, block: BlockIndex) {
        self.states[block.at()] = State::Cached { older: self.newest, newer: None };
        match self.newest {
            Some(before) => *self.newer_of(before) = Some(block),
            None => self.oldest = Some(block),
        }
        self.newest = Some(block);
        self.num_cached += 1;
    }

    fn unlink(&mut self, block: BlockIndex) {
        let State::Cached { older, newer } = self.states[block.at()] else {
            panic!("{block:?} is not cached");
        };
        match older {
            Some(older) => *self.newer_of(older) = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => *self.older_of(newer) = older,
            None => self.newest = older,
        }
        self.num_cached -= 1;
    }

    fn newer_of(&mut self, block: BlockIndex) -> &mut Option<BlockIndex> {
        match &mut self.states[block.at()] {
            State::Cached { newer, .. } => newer,
            other => panic!("{block:?} is linked as cached but is {other:?}"),
        }
    }

    fn older_of(&mut self, block: BlockIndex) -> &mut Option<BlockIndex> {
        match &mut self.states[block.at()] {
            State::Cached { older, .. } => older,
            other => panic!("{block:?} is linked as cached but is {other:?}"),
        }
    }

    /// Cached blocks, the next victim first.
    pub(crate) fn cached(&self) -> impl Iterator<Item = BlockIndex> {
        std::iter::successors(self.oldest, |block| match self.states[block.at()] {
            State::Cached { newer, .. } => newer,
            other => panic!("{block:?} is linked as cached but is {other:?}"),
        })
    }

    /// Panics unless every block is in exactly one state and has as many owners as `owners` says.
    pub(crate) fn check(&self, owners: &[u32]) {
        let mut seen = vec![false; self.states.len()];
        for &block in &self.free {
            assert!(!std::mem::replace(&mut seen[block.at()], true), "{block:?} is free once");
            assert_eq!(self.states[block.at()], State::Free, "{block:?} is on the free list");
        }
        let mut before = None;
        for block in self.cached() {
            assert!(!std::mem::replace(&mut seen[block.at()], true), "{block:?} is cached once and not free");
            let State::Cached { older, .. } = self.states[block.at()] else {
                unreachable!("cached() checks it")
            };
            assert_eq!(older, before, "links of {block:?} agree");
            before = Some(block);
        }
        assert_eq!(self.newest, before, "the list ends with the newest");
        assert_eq!(seen.iter().filter(|&&s| s).count(), self.num_available(), "free and cached are counted");
        for (i, state) in self.states.iter().enumerate() {
            match *state {
                State::InUse { owners: counted } => {
                    assert!(!seen[i], "block {i} is in one state");
                    assert_eq!(counted, owners[i], "owners of block {i}");
                    assert!(counted > 0, "block {i} in use has an owner");
                }
                State::Free | State::Cached { .. } => {
                    assert!(seen[i], "block {i} is in the list of its state");
                    assert_eq!(owners[i], 0, "block {i} is in no block table");
                }
            }
        }
    }
}
