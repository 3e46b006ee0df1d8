//! The block table of one sequence.

use ops::{BlockIndex, SeatIndex};

/// Which blocks hold the KV of one sequence. [`crate::KvCache`] changes it; the last thing done to it must be
/// [`crate::KvCache::free`], since a sequence that is dropped with blocks leaks them.
///
/// Who owns what, as half-open ranges of the table:
///
/// ```text
/// [0, num_published)            in the prefix cache, possibly shared with other sequences
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
    pub(crate) seat: Option<SeatIndex>,
}

impl Sequence {
    /// An empty sequence. Only KV of equal `salt` is ever shared; only blocks that lie below position
    /// `shareable_tokens` are (0: nothing of this sequence is). The table never grows beyond `blocks_max`, so it does
    /// not allocate again.
    pub fn new(salt: u64, shareable_tokens: usize, blocks_max: usize) -> Self {
        Sequence {
            blocks: Vec::with_capacity(blocks_max),
            num_published: 0,
            num_tokens: 0,
            salt,
            shareable_tokens,
            seat: None,
        }
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
