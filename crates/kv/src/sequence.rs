//! The block table of one sequence.

use ops::{BlockIndex, SeatIndex};

use crate::prefix::Owner;

/// Which blocks hold the KV of one sequence. [`crate::KvCache`] changes it; the last thing done to it must be
/// [`crate::KvCache::free`], since a sequence that is dropped with blocks leaks them.
///
/// Who owns what, as half-open ranges of the table:
///
/// ```text
/// [0, num_published)            in the prefix cache: up to shareable_tokens possibly shared with other sequences, its kind's among
///                              them, then its own
/// [num_published, blocks.len()) this sequence's alone
/// ```
///
/// and of tokens: KV of `[0, num_tokens)` is written, slots up to `blocks.len() * page_tokens` are reserved.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) blocks: Vec<BlockIndex>,
    pub(crate) num_published: usize,
    pub(crate) num_tokens: usize,
    pub(crate) salt: u64,
    pub(crate) shareable_tokens: usize,
    /// Blocks that it makes are everybody's below this; lower than `shareable_tokens` where it goes on from KV of its kind.
    pub(crate) common_tokens: usize,
    pub(crate) owner: u64,
    /// Its kind, and below which position it leaves its own blocks to it.
    pub(crate) kind: Option<(u64, usize)>,
    pub(crate) seat: Option<SeatIndex>,
}

impl Sequence {
    /// An empty sequence. Only KV of equal `salt` is ever shared; only blocks that lie below position
    /// `shareable_tokens` are (0: nothing of this sequence is). Later ones are found again by a sequence of the same `owner`,
    /// which is not 0 and nobody else's. The table never grows beyond `blocks_max`, so it does not allocate again.
    pub fn new(salt: u64, shareable_tokens: usize, owner: u64, blocks_max: usize) -> Self {
        assert!(owner != 0, "0 is everybody");
        Sequence {
            blocks: Vec::with_capacity(blocks_max),
            num_published: 0,
            num_tokens: 0,
            salt,
            shareable_tokens,
            common_tokens: shareable_tokens,
            owner,
            kind: None,
            seat: None,
        }
    }

    /// The same, and one of a `kind`: below `shareable_tokens` it goes on from blocks that others of the kind left
    /// ([`crate::KvCache::hand_on`]), and it leaves its own below `kind_tokens` to them. What follows from such KV is not for everybody.
    pub fn of_kind(self, kind: u64, kind_tokens: usize) -> Self {
        Sequence { kind: Some((kind, kind_tokens)), ..self }
    }

    /// Who may find a run that ends at `end`, once it is sealed.
    pub(crate) fn owner_of(&self, end: usize) -> Owner {
        if end <= self.common_tokens { Owner::All } else { Owner::One(self.owner) }
    }

    /// The block table, one entry per block from position 0.
    pub fn blocks(&self) -> &[BlockIndex] {
        &self.blocks
    }

    /// Its seat, while it runs.
    pub fn seat(&self) -> Option<SeatIndex> {
        self.seat
    }

    /// Tokens whose KV is written.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}
