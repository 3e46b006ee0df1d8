//! The prefix cache, a tree: sealed blocks by what they hold and what precedes them.
//!
//! Its nodes are *runs* of as many blocks as are shared together, which is one where nothing asks for more. A run is known by its
//! first block.

use std::hash::{DefaultHasher, Hash, Hasher};

use hashbrown::HashTable;
use ops::BlockIndex;

/// What precedes a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Nothing: it starts a sequence of this salt.
    Start(u64),
    /// The first block of a run of the tree. Its index identifies the whole prefix for as long as it has a child, since it
    /// cannot leave the tree before them.
    Block(BlockIndex),
}

/// Who may find a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Owner {
    /// Everybody: its KV follows from its tokens.
    All,
    /// Sequences of this kind.
    Kind(u64),
    /// One sequence.
    One(u64),
}

struct Entry {
    /// Hash of this run's tokens, of everything before them, and of whose it is.
    hash: u64,
    parent: Parent,
    owner: Owner,
    num_children: u32,
}

pub(crate) struct PrefixCache {
    page_tokens: usize,
    run_blocks: usize,
    /// Finds entries by hash; equality is decided by parent and tokens.
    index: HashTable<BlockIndex>,
    /// By first block; `None` for the others, and when it is not in the tree.
    entries: Vec<Option<Entry>>,
    /// By block: the first one of its run and the one after it, itself after the last; `None` when it is not in the tree.
    runs: Vec<Option<(BlockIndex, BlockIndex)>>,
    /// `[num_blocks, page_tokens]`: the tokens of blocks in the tree.
    tokens: Vec<u32>,
    /// Bits of a hash that count: all of them, except in tests that want collisions.
    hash_mask: u64,
}

impl PrefixCache {
    pub(crate) fn new(num_blocks: usize, page_tokens: usize, run_blocks: usize) -> Self {
        assert!(page_tokens > 0, "a page has slots");
        assert!(run_blocks > 0, "a run has blocks");
        PrefixCache {
            page_tokens,
            run_blocks,
            // Room for twice the entries: a table at most half full is cleaned of tombstones in place, never grown.
            index: HashTable::with_capacity(2 * num_blocks),
            entries: (0..num_blocks).map(|_| None).collect(),
            runs: vec![None; num_blocks],
            tokens: vec![0; num_blocks * page_tokens],
            hash_mask: u64::MAX,
        }
    }

    #[cfg(test)]
    pub(crate) fn weaken_hash(&mut self, mask: u64) {
        assert!(self.index.is_empty(), "entries keep the hash they came with");
        self.hash_mask = mask;
    }

    /// The run that holds `tokens` after `parent` and is `owner`'s.
    pub(crate) fn find(&self, parent: Parent, tokens: &[u32], owner: Owner) -> Option<BlockIndex> {
        assert_eq!(tokens.len(), self.run_blocks * self.page_tokens, "only sealed blocks are in the tree");
        let holds = |first: BlockIndex| {
            let mut pages = tokens.chunks_exact(self.page_tokens);
            self.blocks_of(first).all(|block| pages.next() == Some(self.tokens_of(block)))
        };
        let same = |&block: &BlockIndex| {
            let entry = self.entry(block);
            (entry.parent, entry.owner) == (parent, owner) && holds(block)
        };
        self.index.find(self.hash(parent, tokens, owner), same).copied()
    }

    /// The first block of the run that `block` is in.
    pub(crate) fn first_of(&self, block: BlockIndex) -> BlockIndex {
        self.runs[block.at()].expect("a block of the tree").0
    }

    /// The blocks of the run that begins with `first`, in order.
    pub(crate) fn blocks_of(&self, first: BlockIndex) -> impl Iterator<Item = BlockIndex> {
        std::iter::successors(Some(first), |block| {
            let (_, next) = self.runs[block.at()].expect("a block of the tree");
            (next != *block).then_some(next)
        })
    }

    /// Adds a run of sealed blocks. Its content must not be in the tree yet.
    pub(crate) fn insert(&mut self, blocks: &[BlockIndex], parent: Parent, tokens: &[u32], owner: Owner) {
        assert_eq!(blocks.len(), self.run_blocks, "runs are whole");
        let in_tree = blocks.iter().find(|block| self.contains(**block));
        assert_eq!(in_tree, None, "a block is in the tree once");
        assert!(self.find(parent, tokens, owner).is_none(), "the tree holds each prefix once");
        let hash = self.hash(parent, tokens, owner);
        if let Parent::Block(parent) = parent {
            self.entry_mut(parent).num_children += 1;
        }
        let block = blocks[0];
        for (i, (own, page)) in blocks.iter().zip(tokens.chunks_exact(self.page_tokens)).enumerate() {
            self.tokens[own.at() * self.page_tokens..][..self.page_tokens].copy_from_slice(page);
            self.runs[own.at()] = Some((block, *blocks.get(i + 1).unwrap_or(own)));
        }
        self.entries[block.at()] = Some(Entry { hash, parent, owner, num_children: 0 });
        let Self { index, entries, .. } = self;
        index.insert_unique(hash, block, |b| entries[b.at()].as_ref().expect("the index lists entries").hash);
    }

    /// Forgets the run that begins with `block`, which is evicted or discarded.
    pub(crate) fn remove(&mut self, block: BlockIndex) {
        let mut next = block;
        while let Some((_, after)) = self.runs[next.at()].take() {
            next = after;
        }
        let entry = self.entries[block.at()].take().expect("only blocks of the tree leave it");
        assert_eq!(entry.num_children, 0, "a child leaves the tree before its parent");
        if let Parent::Block(parent) = entry.parent {
            self.entry_mut(parent).num_children -= 1;
        }
        match self.index.find_entry(entry.hash, |&b| b == block) {
            Ok(found) => drop(found.remove()),
            Err(_) => panic!("the index lists {block:?}"),
        }
    }

    pub(crate) fn contains(&self, block: BlockIndex) -> bool {
        self.runs[block.at()].is_some()
    }

    /// Whether blocks of the tree continue the run that begins with `block`.
    pub(crate) fn has_children(&self, block: BlockIndex) -> bool {
        self.entry(block).num_children > 0
    }

    /// Who may find the run that begins with `block`.
    pub(crate) fn owner(&self, block: BlockIndex) -> Owner {
        self.entry(block).owner
    }

    fn entry(&self, block: BlockIndex) -> &Entry {
        self.entries[block.at()].as_ref().expect("a block of the tree")
    }

    fn entry_mut(&mut self, block: BlockIndex) -> &mut Entry {
        self.entries[block.at()].as_mut().expect("a block of the tree")
    }

    fn tokens_of(&self, block: BlockIndex) -> &[u32] {
        &self.tokens[block.at() * self.page_tokens..][..self.page_tokens]
    }

    fn hash(&self, parent: Parent, tokens: &[u32], owner: Owner) -> u64 {
        let mut hasher = DefaultHasher::new();
        match parent {
            Parent::Start(salt) => salt.hash(&mut hasher),
            Parent::Block(parent) => self.entry(parent).hash.hash(&mut hasher),
        }
        (owner, tokens).hash(&mut hasher);
        hasher.finish() & self.hash_mask
    }

    /// Panics unless the tree is whole: parents present, children counted, every entry found by its content, and
    /// `cached` (next victim first) lists children before parents.
    pub(crate) fn check(&self, cached: impl Iterator<Item = BlockIndex>) {
        let mut num_children = vec![0; self.entries.len()];
        let (mut num_entries, mut in_runs) = (0, 0);
        for (i, entry) in self.entries.iter().enumerate() {
            let Some(entry) = entry else { continue };
            num_entries += 1;
            let block = BlockIndex(i as u32);
            if let Parent::Block(parent) = entry.parent {
                assert!(self.contains(parent), "the parent of {block:?} is in the tree");
                num_children[parent.at()] += 1;
            }
            let blocks: Vec<BlockIndex> = self.blocks_of(block).collect();
            assert_eq!(blocks.len(), self.run_blocks, "runs are whole");
            assert!(blocks.iter().all(|b| self.first_of(*b) == block), "blocks know their run");
            in_runs += blocks.len();
            let tokens: Vec<u32> = blocks.iter().flat_map(|b| self.tokens_of(*b)).copied().collect();
            assert_eq!(
                self.find(entry.parent, &tokens, entry.owner),
                Some(block),
                "a run is found by its content"
            );
        }
        assert_eq!(self.runs.iter().flatten().count(), in_runs, "every block is in a run");
        assert_eq!(self.index.len(), num_entries, "the index lists every entry once");
        for (i, entry) in self.entries.iter().enumerate() {
            assert_eq!(
                entry.as_ref().map_or(0, |e| e.num_children),
                num_children[i],
                "children of block {i}"
            );
        }
        // Taking victims in order must always take leaves. A run goes with the first of its blocks that does.
        let mut taken = vec![false; self.entries.len()];
        for block in cached {
            let block = self.first_of(block);
            if std::mem::replace(&mut taken[block.at()], true) {
                continue;
            }
            assert_eq!(num_children[block.at()], 0, "children of {block:?} are evicted before it");
            if let Parent::Block(parent) = self.entry(block).parent {
                num_children[parent.at()] -= 1;
            }
        }
    }

    /// Panics unless `blocks` are a path of the tree from its start under `salt`.
    pub(crate) fn check_path(&self, salt: u64, blocks: &[BlockIndex]) {
        let mut parent = Parent::Start(salt);
        for run in blocks.chunks(self.run_blocks) {
            assert!(self.blocks_of(run[0]).eq(run.iter().copied()), "published blocks are whole runs");
            assert_eq!(self.entry(run[0]).parent, parent, "published blocks form a path");
            parent = Parent::Block(run[0]);
        }
    }
}
