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

    /// Takes places for those of `blocks`, a block table, that have none yet, if there are so many and `ahead` more. Else takes none
    /// and says how many would do.
    pub(crate) fn take(&mut self, blocks: &[BlockIndex], ahead: usize) -> Result<(), usize> {
        if self.taken.is_empty() {
            return Ok(());
        }
        let new = blocks.iter().filter(|b| self.taken[b.at()] != self.step).count();
        if new + ahead > self.left {
            return Err(new + ahead);
        }
        blocks.iter().for_each(|b| self.taken[b.at()] = self.step);
        self.left -= new;
        Ok(())
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
            assert_eq!(room.take(&blocks(0..6), 0), Ok(()));
            assert_eq!(room.take(&blocks(0..9), 2), Err(5));
            assert_eq!((room.take(&blocks(0..9), 1), room.left()), (Ok(()), 1));
            assert_eq!(room.take(&blocks(50..52), 0), Err(2));
            assert_eq!((room.take(&blocks(3..10), 0), room.left()), (Ok(()), 0));
        }
        let mut unified = DigestRoom::new(None, 100);
        unified.begin();
        assert_eq!(unified.take(&blocks(0..90), 4), Ok(()));
    }
}
