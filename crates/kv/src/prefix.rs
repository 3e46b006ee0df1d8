//! The prefix cache, a tree: sealed blocks by what they hold and what precedes them.

use std::hash::{DefaultHasher, Hash, Hasher};

use hashbrown::HashTable;
use ops::BlockIndex;

/// What precedes a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Nothing: it starts a sequence of this salt.
    Start(u64),
    /// A block of the tree. Its index identifies the whole prefix for as long as it has a child, since it cannot leave
    /// the tree before them.
    Block(BlockIndex),
}

struct Entry {
    /// Hash of this block's tokens, of everything before them, and of whose it is.
    hash: u64,
    parent: Parent,
    /// The only sequence that may find it; 0 for all.
    owner: u64,
    num_children: u32,
}

pub(crate) struct PrefixCache {
    page_tokens: usize,
    /// Finds entries by hash; equality is decided by parent and tokens.
    index: HashTable<BlockIndex>,
    /// By block; `None` when it is not in the tree.
    entries: Vec<Option<Entry>>,
    /// `[num_blocks, page_tokens]`: the tokens of blocks in the tree.
    tokens: Vec<u32>,
    /// Bits of a hash that count: all of them, except in tests that want collisions.
    hash_mask: u64,
}

impl PrefixCache {
    pub(crate) fn new(num_blocks: usize, page_tokens: usize) -> Self {
        assert!(page_tokens > 0, "a page has slots");
        PrefixCache {
            page_tokens,
            // Room for twice the entries: a table at most half full is cleaned of tombstones in place, never grown.
            index: HashTable::with_capacity(2 * num_blocks),
            entries: (0..num_blocks).map(|_| None).collect(),
            tokens: vec![0; num_blocks * page_tokens],
            hash_mask: u64::MAX,
        }
    }

    #[cfg(test)]
    pub(crate) fn weaken_hash(&mut self, mask: u64) {
        assert!(self.index.is_empty(), "entries keep the hash they came with");
        self.hash_mask = mask;
    }

    /// The block that holds `tokens` after `parent`, for everybody (`owner` 0) or for one sequence.
    pub(crate) fn find(&self, parent: Parent, tokens: &[u32], owner: u64) -> Option<BlockIndex> {
        assert_eq!(tokens.len(), self.page_tokens, "only sealed blocks are in the tree");
        let same = |&block: &BlockIndex| {
            let entry = self.entry(block);
            (entry.parent, entry.owner) == (parent, owner) && self.tokens_of(block) == tokens
        };
        self.index.find(self.hash(parent, tokens, owner), same).copied()
    }

    /// Adds a sealed block. Its content must not be in the tree yet.
    pub(crate) fn insert(&mut self, block: BlockIndex, parent: Parent, tokens: &[u32], owner: u64) {
        assert!(self.entries[block.at()].is_none(), "{block:?} is in the tree once");
        assert!(self.find(parent, tokens, owner).is_none(), "the tree holds each prefix once");
        let hash = self.hash(parent, tokens, owner);
        if let Parent::Block(parent) = parent {
            self.entry_mut(parent).num_children += 1;
        }
        self.tokens[block.at() * self.page_tokens..][..self.page_tokens].copy_from_slice(tokens);
        self.entries[block.at()] = Some(Entry { hash, parent, owner, num_children: 0 });
        let Self { index, entries, .. } = self;
        index.insert_unique(hash, block, |b| entries[b.at()].as_ref().expect("the index lists entries").hash);
    }

    /// Forgets a block that is evicted or discarded.
    pub(crate) fn remove(&mut self, block: BlockIndex) {
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
        self.entries[block.at()].is_some()
    }

    /// Whether blocks of the tree continue this one.
    pub(crate) fn has_children(&self, block: BlockIndex) -> bool {
        self.entry(block).num_children > 0
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

    fn hash(&self, parent: Parent, tokens: &[u32], owner: u64) -> u64 {
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
        let mut num_entries = 0;
        for (i, entry) in self.entries.iter().enumerate() {
            let Some(entry) = entry else { continue };
            num_entries += 1;
            let block = BlockIndex(i as u32);
            if let Parent::Block(parent) = entry.parent {
                assert!(self.contains(parent), "the parent of {block:?} is in the tree");
                num_children[parent.at()] += 1;
            }
            let found = self.find(entry.parent, self.tokens_of(block), entry.owner);
            assert_eq!(found, Some(block), "a block is found by its content");
        }
        assert_eq!(self.index.len(), num_entries, "the index lists every entry once");
        for (i, entry) in self.entries.iter().enumerate() {
            assert_eq!(
                entry.as_ref().map_or(0, |e| e.num_children),
                num_children[i],
                "children of block {i}"
            );
        }
        // Taking victims in order must always take leaves.
        for block in cached {
            assert_eq!(num_children[block.at()], 0, "children of {block:?} are evicted before it");
            if let Parent::Block(parent) = self.entry(block).parent {
                num_children[parent.at()] -= 1;
            }
        }
    }

    /// Panics unless `blocks` are a path of the tree from its start under `salt`.
    pub(crate) fn check_path(&self, salt: u64, blocks: &[BlockIndex]) {
        let mut parent = Parent::Start(salt);
        for &block in blocks {
            assert_eq!(self.entry(block).parent, parent, "published blocks form a path");
            parent = Parent::Block(block);
        }
    }
}
