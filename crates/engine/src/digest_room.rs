//! For how many blocks HBM has digests in a step. Blocks that sequences share count once.

use ops::BlockIndex;

/// What the sparse sequences of a step take of the places for digests; nothing in unified memory.
pub(crate) struct DigestRoom {
    places: usize,
    left: usize,
    /// `[block]`: the last step that took it; empty in unified memory.
    taken: Vec<u32>,
    step: u32,
}

impl DigestRoom {
    /// `places` for those of `num_blocks` blocks; `None` in unified memory.
    pub(crate) fn new(places: Option<usize>, num_blocks: usize) -> Self {
        let taken = places.map_or(Vec::new(), |_| vec![0; num_blocks]);
        DigestRoom { places: places.unwrap_or(usize::MAX), left: 0, taken, step: 0 }
    }

    /// Begins a step, in which nothing is taken yet.
    pub(crate) fn begin(&mut self) {
        if self.step == u32::MAX {
            self.taken.fill(0);
            self.step = 0;
        }
        self.step += 1;
        self.left = self.places;
    }

    /// Places that those of `blocks`, a block table, would take: as many of them as have none yet.
    pub(crate) fn wanted(&self, blocks: &[BlockIndex]) -> usize {
        match self.taken.is_empty() {
            true => 0,
            false => blocks.iter().filter(|block| self.taken[block.at()] != self.step).count(),
        }
    }

    /// Takes them, if there are so many; returns whether there are.
    pub(crate) fn take(&mut self, blocks: &[BlockIndex]) -> bool {
        let wanted = self.wanted(blocks);
        if wanted > self.left {
            return false;
        }
        if wanted > 0 {
            blocks.iter().for_each(|block| self.taken[block.at()] = self.step);
            self.left -= wanted;
        }
        true
    }

    /// Whether nobody has taken a place in this step.
    pub(crate) fn is_untouched(&self) -> bool {
        self.left == self.places
    }

    /// Places that are left.
    pub(crate) fn left(&self) -> usize {
        self.left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_blocks_count_once() {
        let blocks = |range: std::ops::Range<u32>| range.map(BlockIndex).collect::<Vec<_>>();
        let mut room = DigestRoom::new(Some(10), 100);
        for step in [1, u32::MAX, 2] {
            room.step = step - 1;
            room.begin();
            assert!(room.is_untouched() && room.take(&blocks(0..6)));
            assert_eq!((room.wanted(&blocks(0..9)), room.left()), (3, 4));
            assert!(room.take(&blocks(0..9)) && !room.take(&blocks(50..52)));
            assert!(room.take(&blocks(3..10)));
            assert_eq!((room.left(), room.is_untouched()), (0, false));
        }
        let mut unified = DigestRoom::new(None, 100);
        unified.begin();
        assert!(unified.take(&blocks(0..90)) && unified.wanted(&blocks(0..90)) == 0);
    }
}
