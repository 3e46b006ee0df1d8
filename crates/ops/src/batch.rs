//! The batch of one step, as flat arrays.

use crate::sparse::{Attention, Method, RowPlan};
use crate::{BlockIndex, SeatIndex};

/// The rows of one sequence in a step: `rows.len()` consecutive tokens that start at position `first_position`.
///
/// There is no prefill flag: what a sequence does in a step is how many tokens it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// Its rows in the batch (half-open); never empty.
    pub rows: std::ops::Range<u32>,
    /// Position of the first of them; the rows after it follow one by one.
    pub first_position: u32,
    /// Tokens of its prompt. Positions below it were given, later ones were generated: dynamic NTK scaling rotates the
    /// two differently.
    pub prompt_len: u32,
    /// Its block table: a range of [`Batch::block_tables`], one entry per block from position 0, long enough for the
    /// last row.
    pub blocks: std::ops::Range<u32>,
    /// How rows from `prompt_len` on attend.
    pub attention: Attention,
    /// Its place among the running sequences. Several entries of a batch may have one seat only if they are of one sequence.
    pub seat: SeatIndex,
    /// Extents of cache frames that it may hold per layer, where the device has an HBM tier of its own.
    pub quota: u32,
}

/// A row that attends to a selection, if its budget is below its context.
#[derive(Clone, Copy, Debug)]
pub struct SparseRow<'a> {
    /// Row of the batch.
    pub row: usize,
    /// Its sequence.
    pub sequence: &'a SequenceRows,
    /// Its position; its context is one longer.
    pub position: usize,
    /// How it selects.
    pub method: &'a Method,
    /// Its budget in tokens.
    pub budget: usize,
}

impl SequenceRows {
    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Tokens in context after the last row: the number of slots that it attends to.
    pub fn context_tokens(&self) -> usize {
        self.first_position as usize + self.num_rows()
    }
}

impl SparseRow<'_> {
    /// What the row attends to.
    pub fn plan(&self) -> RowPlan {
        self.method.plan(self.position + 1, self.sequence.prompt_len as usize, self.budget)
    }
}

/// One step's work: rows of several sequences, decode and prefill alike. Borrowed from arrays that the engine
/// allocates once.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Position of each row.
    pub positions: &'a [u32],
    /// The sequences, in row order; their row ranges tile `0..tokens.len()`.
    pub sequences: &'a [SequenceRows],
    /// Block tables, one after the other.
    pub block_tables: &'a [BlockIndex],
    /// Methods of the sequences that attend sparsely.
    pub methods: &'a [Method],
}

impl<'a> Batch<'a> {
    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// The block table of `sequence`.
    pub fn block_table(&self, sequence: &SequenceRows) -> &'a [BlockIndex] {
        &self.block_tables[sequence.blocks.start as usize..sequence.blocks.end as usize]
    }

    /// Whether rows of `sequence` select by digests, once its prompt has ended.
    pub fn reads_digests(&self, sequence: &SequenceRows) -> bool {
        match sequence.attention {
            Attention::Dense => false,
            Attention::Sparse { method, .. } => self.methods[method as usize].reads_digests(),
        }
    }

    /// The rows at positions from `prompt_len` on of sequences that attend sparsely, in order. Their places in this
    /// order are what selections are addressed by.
    pub fn sparse_rows(self) -> impl Iterator<Item = SparseRow<'a>> {
        self.sequences.iter().flat_map(move |s| {
            let (method, budget) = match s.attention {
                Attention::Dense => (None, 0),
                Attention::Sparse { method, budget } => {
                    (Some(&self.methods[method as usize]), budget as usize)
                }
            };
            let first = (s.prompt_len as usize).max(s.first_position as usize);
            method.into_iter().flat_map(move |method| {
                (first..s.context_tokens()).map(move |position| SparseRow {
                    row: s.rows.start as usize + position - s.first_position as usize,
                    sequence: s,
                    position,
                    method,
                    budget,
                })
            })
        })
    }

    /// Panics unless the arrays agree with each other for pages of `page_tokens` slots: a broken batch would write
    /// one user's KV into another's pages.
    pub fn check(&self, page_tokens: usize) {
        assert_eq!(self.tokens.len(), self.positions.len(), "one position per row");
        let mut next_row = 0;
        for s in self.sequences {
            assert_eq!(s.rows.start, next_row, "rows of sequences tile the batch");
            assert!(s.rows.end > s.rows.start, "a sequence in a batch has rows");
            next_row = s.rows.end;
            assert!(s.blocks.end as usize <= self.block_tables.len(), "block table lies in the batch");
            assert!(s.blocks.len() * page_tokens >= s.context_tokens(), "block table covers the context");
            for (i, row) in s.rows.clone().enumerate() {
                assert_eq!(
                    self.positions[row as usize],
                    s.first_position + i as u32,
                    "positions ascend by one"
                );
            }
        }
        assert_eq!(next_row as usize, self.tokens.len(), "every row belongs to a sequence");
    }
}

/// Tokens of a prompt on their way through some layers; they took those before in earlier steps, and will take the others in later
/// ones. Within a layer they go tile by tile, and what comes out is kept in a store of hidden states (SparseServe's layer-segmented
/// prefill).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The sequence. Its rows are these tokens alone, from row 0 on; its block table is a range of the batch's, its method one of
    /// the batch's. Its quota is what stays of a layer once that is done.
    pub sequence: SequenceRows,
    /// Layers, ascending. Several only where the tokens are all that the prompt has left.
    pub layers: std::ops::Range<u32>,
    /// Whether the tokens are the last of the prompt: then they end their layers.
    pub ends: bool,
    /// First position of the prompt that was not known at the start: a layer begins there.
    pub start: u32,
    /// The tokens, as a range of [`Step::prompt_tokens`].
    pub tokens: std::ops::Range<u32>,
    /// Row of the store of hidden states that is `start`'s.
    pub hidden: u32,
    /// Extents of cache frames for the KV of a layer while the prompt is in it, where the device has an HBM tier of its own.
    pub extents: u32,
}

/// All work of one step.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Rows that run through all layers.
    pub batch: Batch<'a>,
    /// Prompts that go layer by layer; the segments of one prompt follow one another.
    pub segments: &'a [Segment],
    /// Tokens of segments.
    pub prompt_tokens: &'a [u32],
    /// Seats that take no part in the step, with the extents of cache frames that each may keep per layer.
    pub resting: &'a [(SeatIndex, u32)],
}

impl<'a> Step<'a> {
    /// A step of `batch` alone.
    pub const fn of(batch: Batch<'a>) -> Self {
        Step { batch, segments: &[], prompt_tokens: &[], resting: &[] }
    }

    /// Segments after which a prompt of `layers` layers is complete: the hidden state of its last token is that of the model.
    pub fn completed(self, layers: usize) -> impl Iterator<Item = &'a Segment> {
        self.segments.iter().filter(move |s| s.ends && s.layers.end as usize == layers)
    }

    /// One segment of each prompt that goes layer by layer.
    pub fn prompts(self) -> impl Iterator<Item = &'a Segment> {
        let seat = |i: usize| self.segments[i].sequence.seat;
        (0..self.segments.len())
            .filter(move |&i| i == 0 || seat(i) != seat(i - 1))
            .map(move |i| &self.segments[i])
    }
}
