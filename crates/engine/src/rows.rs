//! What one step runs, as flat arrays that are allocated once.

use std::ops::Range;

use ops::coverage::{Inspection, Inspections};
use ops::sparse::{Attention, Method};
use ops::{Batch, BlockIndex, SeatIndex, SequenceRows};

use crate::config::Config;
use crate::request::Sparse;
use crate::sequence::Sequence;

/// The part of one sequence in a step.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Its place in `Engine::running`.
    pub(crate) owner: usize,
    /// Tokens that it runs, as positions in the sequence.
    pub(crate) positions: Range<usize>,
    /// First of its rows in the batch.
    pub(crate) first_row: usize,
    /// Its part of what is sampled; set by run.
    pub(crate) samples: Range<usize>,
    /// Whether the last sample is a new token; set by run.
    pub(crate) draws: bool,
}

/// The rows of a step and whose they are.
pub(crate) struct StepRows {
    page_tokens: usize,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
    block_tables: Vec<BlockIndex>,
    methods: Vec<Method>,
    /// Selections to check, and what that found.
    pub(crate) inspections: Inspections,
    /// One per entry of `sequences`.
    pub(crate) parts: Vec<Part>,
}

impl StepRows {
    pub(crate) fn new(config: &Config) -> Self {
        let (rows, sequences) = (config.rows_max(), config.max_num_seqs);
        StepRows {
            page_tokens: config.page_tokens,
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            sequences: Vec::with_capacity(sequences),
            block_tables: Vec::with_capacity(sequences * config.table_blocks_max()),
            methods: Vec::with_capacity(sequences),
            inspections: Inspections {
                asked: Vec::with_capacity(sequences),
                found: Vec::with_capacity(sequences),
            },
            parts: Vec::with_capacity(sequences),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.block_tables.clear();
        self.methods.clear();
        self.inspections.asked.clear();
        self.inspections.found.clear();
        self.parts.clear();
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Adds the next `num_tokens` tokens of `sequence`, which is `running[owner]`; those of its answer have one budget.
    pub(crate) fn push(&mut self, owner: usize, sequence: &Sequence, num_tokens: usize) {
        assert!(num_tokens > 0, "a part of a step has rows");
        let first = sequence.kv.num_tokens();
        let positions = first..first + num_tokens;
        let (first_row, first_block) = (self.tokens.len(), self.block_tables.len());
        self.tokens.extend_from_slice(&sequence.tokens[positions.clone()]);
        self.positions.extend(positions.clone().map(|p| p as u32));
        let num_blocks = positions.end.div_ceil(self.page_tokens);
        self.block_tables.extend_from_slice(&sequence.kv.blocks()[..num_blocks]);
        let attention = match sequence.next_attention() {
            None => Attention::Dense,
            Some(Sparse { method, budget }) => {
                self.methods.push(method);
                Attention::Sparse { method: (self.methods.len() - 1) as u16, budget }
            }
        };
        self.sequences.push(SequenceRows {
            rows: first_row as u32..self.tokens.len() as u32,
            first_position: first as u32,
            prompt_len: sequence.prompt_len as u32,
            blocks: first_block as u32..self.block_tables.len() as u32,
            attention,
            seat: sequence.kv.seat().expect("who runs has a seat"),
            quota: 0,
        });
        self.parts.push(Part { owner, positions, first_row, samples: 0..0, draws: false });
    }

    /// Has the last row of the sequence in `seat` checked in `layer`.
    pub(crate) fn inspect(&mut self, seat: SeatIndex, layer: u32) {
        self.inspections.asked.push(Inspection { seat, layer });
    }

    /// Takes over the quotas of `running`, once everybody is known who runs.
    pub(crate) fn set_quotas(&mut self, running: &[Sequence]) {
        for (sequence, part) in self.sequences.iter_mut().zip(&self.parts) {
            sequence.quota = running[part.owner].quota;
        }
    }

    pub(crate) fn batch(&self) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            sequences: &self.sequences,
            block_tables: &self.block_tables,
            methods: &self.methods,
        }
    }
}
