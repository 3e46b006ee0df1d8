//! The verbs of the KV cache.

use ops::{BlockIndex, SeatIndex};

use crate::pool::{Counts, Pool};
use crate::prefix::{Owner, Parent, PrefixCache};
use crate::sequence::Sequence;

/// There are fewer free and cached blocks than asked for; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} KV blocks are needed and {available} are free or cached")]
pub struct OutOfBlocks {
    /// Blocks asked for beyond those that the sequence has.
    pub wanted: usize,
    /// Blocks that could be had.
    pub available: usize,
}

/// How a sequence lets go of its blocks.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Free,
    Suspend,
    Discard,
}

/// The state of all blocks.
///
/// ```
/// use sparseserve_kv::{KvCache, Sequence};
///
/// let mut kv = KvCache::new(10, 4, 1, 2);
/// let prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9];
///
/// let mut first = Sequence::new(0, usize::MAX, 1, 10);
/// assert_eq!(kv.match_prefix(&mut first, &prompt), 0);
/// kv.reserve(&mut first, prompt.len())?; // three blocks
/// kv.advance(&mut first, &prompt, usize::MAX); // two of them are sealed
/// kv.free(&mut first);
///
/// let mut second = Sequence::new(0, usize::MAX, 2, 10);
/// assert_eq!(kv.match_prefix(&mut second, &prompt), 8);
/// kv.free(&mut second);
/// # Ok::<(), sparseserve_kv::OutOfBlocks>(())
/// ```
pub struct KvCache {
    page_tokens: usize,
    shared_blocks: usize,
    pool: Pool,
    tree: PrefixCache,
    num_evictions: u64,
    num_seats: usize,
    /// The lowest last.
    free_seats: Vec<SeatIndex>,
    /// Left since somebody asked.
    left_seats: Vec<SeatIndex>,
}

impl KvCache {
    /// A pool of `num_blocks` free blocks of `page_tokens` tokens, and `num_seats` free seats; allocates all the memory that
    /// it will ever use. Sequences share prefixes in runs of `shared_blocks`, each as a whole or not at all.
    ///
    /// # Panics
    /// When one is 0 or an index would not fit in a u32.
    pub fn new(num_blocks: usize, page_tokens: usize, shared_blocks: usize, num_seats: usize) -> Self {
        let seats = u32::try_from(num_seats).expect("seats are u32");
        assert!(seats > 0, "a cache has seats");
        KvCache {
            page_tokens,
            shared_blocks,
            pool: Pool::new(num_blocks),
            tree: PrefixCache::new(num_blocks, page_tokens, shared_blocks),
            num_evictions: 0,
            num_seats,
            free_seats: (0..seats).rev().map(SeatIndex).collect(),
            left_seats: Vec::with_capacity(num_seats),
        }
    }

    /// Gives `sequence`, which is about to run, the lowest free seat.
    ///
    /// # Panics
    /// When it has one, or none is free.
    pub fn take_seat(&mut self, sequence: &mut Sequence) -> SeatIndex {
        assert!(sequence.seat.is_none(), "a sequence has one seat");
        let seat = self.free_seats.pop().expect("a seat for each sequence that runs");
        sequence.seat = Some(seat);
        seat
    }

    /// Has `sequence` leave its seat and keep its blocks: it will go on later, in another one. What its device holds alone must
    /// be in its blocks by then.
    ///
    /// # Panics
    /// When it has no seat.
    pub fn park(&mut self, sequence: &mut Sequence) {
        assert!(sequence.seat.is_some(), "who parks has run");
        self.leave_seat(sequence);
    }

    /// Seats that were left since this was last asked. A device must forget what it holds for them before the next step:
    /// their blocks may be others' by then.
    pub fn left_seats(&mut self) -> impl Iterator<Item = SeatIndex> {
        self.left_seats.drain(..)
    }

    fn leave_seat(&mut self, sequence: &mut Sequence) {
        if let Some(seat) = sequence.seat.take() {
            let place = self.free_seats.partition_point(|free| *free > seat);
            self.free_seats.insert(place, seat);
            if self.left_seats.last() != Some(&seat) && !self.left_seats.contains(&seat) {
                self.left_seats.push(seat);
            }
        }
    }

    /// Blocks by state.
    pub fn counts(&self) -> Counts {
        self.pool.counts()
    }

    /// Blocks that could be reserved now: free + cached.
    pub fn num_available(&self) -> usize {
        self.pool.num_available()
    }

    /// Cached blocks whose content was given up for new tokens, since the start.
    pub fn num_evictions(&self) -> u64 {
        self.num_evictions
    }

    /// Gives an empty `sequence` the longest cached prefix of `tokens`, in whole runs, and returns its length in
    /// tokens. At least one token is left over, because only running a token yields the logits after it.
    ///
    /// A prefix is made of what everybody may find, then of what its kind may, then of its own. Of those of one length it gets that
    /// of which everybody may find most.
    ///
    /// # Panics
    /// When the sequence has blocks already.
    pub fn match_prefix(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> usize {
        assert!(sequence.blocks.is_empty(), "a prefix is matched before anything is reserved");
        let known = &tokens[..tokens.len().saturating_sub(1)];
        let mut common = 0;
        while self.extend(sequence, known, true) {
            common += 1;
        }
        // What a kind may find can branch off anywhere. No block is in two branches, so all of them are no longer than the pool.
        let first = if sequence.kind.is_some() { 0 } else { common };
        let mut best = (common, 0);
        for branch in (first..=common).rev() {
            sequence.blocks.truncate(branch * self.shared_blocks);
            while self.extend(sequence, known, false) {}
            if sequence.blocks.len() > best.1 {
                best = (branch, sequence.blocks.len());
            }
        }
        if best.0 != first {
            sequence.blocks.clear();
            while sequence.blocks.len() < best.0 * self.shared_blocks && self.extend(sequence, known, true) {}
            while self.extend(sequence, known, false) {}
        }
        for &block in &sequence.blocks {
            self.pool.share(block);
        }
        let run_tokens = self.shared_blocks * self.page_tokens;
        let others = sequence.blocks.len() > best.0 * self.shared_blocks;
        sequence.common_tokens = if others {
            sequence.shareable_tokens.min(best.0 * run_tokens)
        } else {
            sequence.shareable_tokens
        };
        sequence.num_published = sequence.blocks.len();
        sequence.num_tokens = sequence.blocks.len() * self.page_tokens;
        sequence.num_tokens
    }

    /// Appends to the table of `sequence` the run that continues it with `tokens`: one for everybody if `common`, else one of its
    /// kind or its own. Returns whether there is one.
    fn extend(&self, sequence: &mut Sequence, tokens: &[u32], common: bool) -> bool {
        let run_tokens = self.shared_blocks * self.page_tokens;
        let start = sequence.blocks.len() * self.page_tokens;
        let Some(run) = tokens.get(start..start + run_tokens) else { return false };
        let shareable = start + run_tokens <= sequence.shareable_tokens;
        let (parent, last) = match sequence.blocks.last() {
            None => (Parent::Start(sequence.salt), Owner::All),
            Some(&block) => {
                let first = self.tree.first_of(block);
                (Parent::Block(first), self.tree.owner(first))
            }
        };
        let find = |owner| self.tree.find(parent, run, owner);
        let found = if common {
            shareable.then(|| find(Owner::All)).flatten()
        } else {
            let own = (last != Owner::All || !shareable).then_some(Owner::One(sequence.owner));
            let kind = sequence.kind.map(|(kind, _)| Owner::Kind(kind));
            let kind = kind.filter(|_| shareable && !matches!(last, Owner::One(_)));
            // Its own first: what it computed itself, and all that follows.
            own.and_then(find).or_else(|| kind.and_then(find))
        };
        let Some(first) = found else { return false };
        for block in self.tree.blocks_of(first) {
            push(&mut sequence.blocks, block);
        }
        true
    }

    /// Makes the block table of `sequence` long enough for `num_tokens` tokens in all, evicting cached blocks, the
    /// longest unused first, where no free ones are left. All or nothing.
    pub fn reserve(&mut self, sequence: &mut Sequence, num_tokens: usize) -> Result<(), OutOfBlocks> {
        let wanted = num_tokens.div_ceil(self.page_tokens).saturating_sub(sequence.blocks.len());
        let available = self.pool.num_available();
        if wanted > available {
            return Err(OutOfBlocks { wanted, available });
        }
        for _ in 0..wanted {
            let block = self.take_block();
            push(&mut sequence.blocks, block);
        }
        Ok(())
    }

    fn take_block(&mut self) -> BlockIndex {
        if let Some(block) = self.pool.take_free() {
            assert!(!self.tree.contains(block), "a free block holds nothing");
            return block;
        }
        let block = self.pool.take_oldest().expect("the caller counted the available blocks");
        // Whoever uses a block of a run uses all of it, so nobody uses the others either; and nobody could without this one.
        let first = self.tree.first_of(block);
        for other in self.tree.blocks_of(first).filter(|other| *other != block) {
            self.pool.forget(other);
        }
        self.tree.remove(first);
        self.num_evictions += self.shared_blocks as u64;
        block
    }

    /// Notes that the KV of all `tokens` of `sequence` is written now, and publishes the blocks that this sealed, as far as
    /// that of the first `saved_tokens` is in DRAM in all layers. Where
    /// the tree holds the same content already, that block stays and takes the place of the new one, which becomes
    /// free: so whoever uses a block of the tree uses those before it, too.
    ///
    /// # Panics
    /// When tokens disappear, or were written beyond what is reserved.
    pub fn advance(&mut self, sequence: &mut Sequence, tokens: &[u32], saved_tokens: usize) {
        assert!(tokens.len() >= sequence.num_tokens, "written tokens stay written");
        assert!(
            tokens.len() <= sequence.blocks.len() * self.page_tokens,
            "tokens are written to reserved slots"
        );
        sequence.num_tokens = tokens.len();
        let run_tokens = self.shared_blocks * self.page_tokens;
        let num_sealed = tokens.len().min(saved_tokens) / run_tokens;
        for i in sequence.num_published / self.shared_blocks..num_sealed {
            let owner = sequence.owner_of((i + 1) * run_tokens);
            self.publish(sequence, i, &tokens[i * run_tokens..][..run_tokens], owner);
        }
    }

    /// Leaves to its kind what `sequence`, of these `tokens`, alone may find; comes before [`KvCache::free`]. Until then no KV of
    /// others takes the place of its own.
    pub fn hand_on(&mut self, sequence: &mut Sequence, tokens: &[u32]) {
        let Some((kind, kind_tokens)) = sequence.kind else { return };
        let run_tokens = self.shared_blocks * self.page_tokens;
        let num_runs = sequence.num_published / self.shared_blocks;
        let is_own = |i: usize| {
            let first = sequence.blocks[i * self.shared_blocks];
            matches!(self.tree.owner(first), Owner::One(_)).then_some(first)
        };
        let start = num_runs - (0..num_runs).rev().map_while(is_own).count();
        let last = (start < num_runs).then(|| sequence.blocks[(num_runs - 1) * self.shared_blocks]);
        // When it went on it may have left a last run aside, which nobody will find and which has to follow its parent.
        if last.is_none_or(|last| self.tree.has_children(last)) {
            return;
        }
        for i in (start..num_runs).rev() {
            self.tree.remove(sequence.blocks[i * self.shared_blocks]);
        }
        sequence.num_published = start * self.shared_blocks;
        for i in start..num_runs.min(kind_tokens / run_tokens) {
            self.publish(sequence, i, &tokens[i * run_tokens..][..run_tokens], Owner::Kind(kind));
        }
    }

    /// Run `i` of `sequence` enters the tree as `owner`'s, or gives way to its twin there.
    fn publish(&mut self, sequence: &mut Sequence, i: usize, tokens: &[u32], owner: Owner) {
        let start = i * self.shared_blocks;
        assert_eq!(start, sequence.num_published, "blocks are published in order");
        let parent = match i {
            0 => Parent::Start(sequence.salt),
            _ => Parent::Block(sequence.blocks[start - self.shared_blocks]),
        };
        let blocks = &mut sequence.blocks[start..start + self.shared_blocks];
        match self.tree.find(parent, tokens, owner) {
            None => self.tree.insert(blocks, parent, tokens, owner),
            Some(first) => {
                for (block, twin) in blocks.iter_mut().zip(self.tree.blocks_of(first)) {
                    assert_ne!(twin, *block, "{block:?} is published once");
                    self.pool.share(twin);
                    self.pool.release(*block, false);
                    *block = twin;
                }
            }
        }
        sequence.num_published += self.shared_blocks;
    }

    /// Releases all blocks of `sequence`, which will not come back, and empties it. Published blocks that others may find
    /// stay cached until their place is needed.
    pub fn free(&mut self, sequence: &mut Sequence) {
        self.release(sequence, End::Free);
    }

    /// Releases all blocks of `sequence`, which will go on later, and empties it. What it alone may find stays cached, too.
    pub fn suspend(&mut self, sequence: &mut Sequence) {
        self.release(sequence, End::Suspend);
    }

    /// Releases all blocks of `sequence` and empties it, and forgets their content wherever nobody else depends on it:
    /// for KV that turned out to be worthless.
    pub fn discard(&mut self, sequence: &mut Sequence) {
        self.release(sequence, End::Discard);
    }

    /// The last block goes first, so that in order of release children come before parents.
    fn release(&mut self, sequence: &mut Sequence, end: End) {
        while let Some(block) = sequence.blocks.pop() {
            let i = sequence.blocks.len();
            if i >= sequence.num_published {
                assert!(!self.tree.contains(block), "published blocks, and no others, are in the tree");
                self.pool.release(block, false);
                continue;
            }
            let first = self.tree.first_of(block);
            // What it found of its own when it went on may have more behind it, which it did not take.
            let forget = !self.tree.has_children(first)
                && match end {
                    End::Free => matches!(self.tree.owner(first), Owner::One(_)),
                    End::Suspend => false,
                    End::Discard => self.pool.owners(block) == 1,
                };
            if forget {
                self.tree.remove(first);
            }
            self.pool.release(block, !forget);
            for _ in 1..self.shared_blocks {
                let block = sequence.blocks.pop().expect("published blocks are whole runs");
                self.pool.release(block, !forget);
            }
        }
        sequence.num_published = 0;
        sequence.num_tokens = 0;
        sequence.common_tokens = sequence.shareable_tokens;
        self.leave_seat(sequence);
    }

    /// Panics unless all states agree: each block has one state, owners are exactly the tables in `owners`, the tree is
    /// whole, and children are evicted before their parents. Slow: for tests and dumps.
    pub fn check<'a>(&self, owners: impl Iterator<Item = &'a Sequence>) {
        let counts = self.counts();
        let num_blocks = counts.free + counts.in_use + counts.cached;
        let mut num_owners = vec![0; num_blocks];
        let mut seats: Vec<SeatIndex> = self.free_seats.clone();
        for sequence in owners {
            seats.extend(sequence.seat);
            assert!(sequence.num_tokens <= sequence.blocks.len() * self.page_tokens, "tokens lie in blocks");
            assert!(
                sequence.num_published * self.page_tokens <= sequence.num_tokens,
                "published blocks are sealed"
            );
            self.tree.check_path(sequence.salt, &sequence.blocks[..sequence.num_published]);
            for (i, &block) in sequence.blocks.iter().enumerate() {
                num_owners[block.at()] += 1;
                assert_eq!(
                    i < sequence.num_published,
                    self.tree.contains(block),
                    "private blocks are private"
                );
            }
        }
        seats.sort_unstable();
        assert!(
            seats.is_sorted_by(|a, b| a < b) && seats.len() <= self.num_seats,
            "a seat has one owner or none"
        );
        self.pool.check(&num_owners);
        self.tree.check(self.pool.cached());
        for (i, &owners) in num_owners.iter().enumerate() {
            let block = BlockIndex(i as u32);
            let in_tree = self.tree.contains(block);
            assert!(owners <= 1 || in_tree, "{block:?} is shared only through the tree");
            assert!(
                owners > 0 || in_tree == self.pool.is_cached(block),
                "{block:?} is cached exactly if in the tree"
            );
        }
    }

    #[cfg(test)]
    pub(crate) fn weaken_hash(&mut self, mask: u64) {
        self.tree.weaken_hash(mask);
    }
}

fn push(blocks: &mut Vec<BlockIndex>, block: BlockIndex) {
    assert!(blocks.len() < blocks.capacity(), "a block table stays within the length it was made for");
    blocks.push(block);
}
