//! What one step runs, as flat arrays that are allocated once.

use std::ops::Range;

use ops::coverage::{Inspection, Inspections};
use ops::sparse::{Attention, Method};
use ops::{Batch, BlockIndex, SeatIndex, Segment, SequenceRows, Step};

use crate::config::{Config, Prefill};
use crate::flights::{LEGS_MAX, Leg};
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
    /// One per entry of `sequences`, then one for each prompt that went layer by layer and has been through all.
    pub(crate) parts: Vec<Part>,
    /// What prompts do that go layer by layer, and whose each of these is: a place in `Engine::running`.
    pub(crate) segments: Vec<Segment>,
    pub(crate) owners: Vec<usize>,
    prompt_tokens: Vec<u32>,
    /// Seats that take no part, with what each may keep of HBM.
    resting: Vec<(SeatIndex, u32)>,
}

impl StepRows {
    pub(crate) fn new(config: &Config) -> Self {
        let (rows, sequences) = (config.rows_max(), config.max_num_seqs);
        let (prompts, hidden_rows) = match config.prefill {
            Prefill::Chunked => (0, 0),
            Prefill::Segmented(segments) => (segments.prompts, segments.hidden_rows),
        };
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
            segments: Vec::with_capacity(LEGS_MAX * prompts),
            owners: Vec::with_capacity(LEGS_MAX * prompts),
            prompt_tokens: Vec::with_capacity(hidden_rows),
            resting: Vec::with_capacity(sequences),
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
        self.segments.clear();
        self.owners.clear();
        self.prompt_tokens.clear();
        self.resting.clear();
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Adds the next `num_tokens` tokens of `sequence`, which is `running[owner]`; those of its answer have one budget.
    pub(crate) fn push(&mut self, owner: usize, sequence: &Sequence, num_tokens: usize) {
        assert!(num_tokens > 0, "a part of a step has rows");
        let first = sequence.kv.num_tokens();
        let positions = first..first + num_tokens;
        let first_row = self.tokens.len();
        self.tokens.extend_from_slice(&sequence.tokens[positions.clone()]);
        self.positions.extend(positions.clone().map(|p| p as u32));
        let rows = first_row as u32..self.tokens.len() as u32;
        let sequence = self.describe(sequence, rows, positions.clone());
        self.sequences.push(sequence);
        self.parts.push(Part { owner, positions, first_row, samples: 0..0, draws: false });
    }

    /// `sequence` as a device knows it, with its block table and its method.
    fn describe(&mut self, sequence: &Sequence, rows: Range<u32>, positions: Range<usize>) -> SequenceRows {
        let first_block = self.block_tables.len();
        let num_blocks = positions.end.div_ceil(self.page_tokens);
        self.block_tables.extend_from_slice(&sequence.kv.blocks()[..num_blocks]);
        let attention = match sequence.next_attention() {
            None => Attention::Dense,
            Some(Sparse { method, budget }) => {
                self.methods.push(method);
                Attention::Sparse { method: (self.methods.len() - 1) as u16, budget }
            }
        };
        SequenceRows {
            rows,
            first_position: positions.start as u32,
            prompt_len: sequence.prompt_len as u32,
            blocks: first_block as u32..self.block_tables.len() as u32,
            attention,
            seat: sequence.kv.seat().expect("who runs has a seat"),
            quota: 0,
        }
    }

    /// Adds what `sequence`, which is `running[owner]`, was granted of its way through `layers` layers.
    pub(crate) fn push_flight(&mut self, owner: usize, sequence: &mut Sequence, layers: usize) {
        let mut flight = sequence.flight.take().expect("it goes layer by layer");
        let work = std::mem::take(&mut flight.granted);
        if work > 0 {
            let (start, end) = (flight.start, flight.end);
            let whole = self.describe(sequence, 0..0, start..end);
            let first_token = self.prompt_tokens.len();
            self.prompt_tokens.extend_from_slice(&sequence.tokens[start..end]);
            let hidden = flight.hidden.start as u32;
            flight.fly(work, layers, |leg| {
                let Leg { layers, positions } = leg;
                let tokens = first_token + positions.start - start..first_token + positions.end - start;
                self.segments.push(Segment {
                    sequence: SequenceRows {
                        rows: 0..positions.len() as u32,
                        first_position: positions.start as u32,
                        ..whole.clone()
                    },
                    layers: layers.start as u32..layers.end as u32,
                    ends: positions.end == end,
                    start: start as u32,
                    tokens: tokens.start as u32..tokens.end as u32,
                    hidden,
                    extents: 0,
                });
                self.owners.push(owner);
            });
        }
        sequence.flight = Some(flight);
    }

    /// Adds a part for each prompt that has been through all of `layers` layers: its last token is the last of its rows.
    pub(crate) fn land(&mut self, layers: usize) {
        for (segment, &owner) in self.segments.iter().zip(&self.owners) {
            if segment.ends && segment.layers.end as usize == layers {
                let end = segment.sequence.context_tokens();
                let first_row = self.tokens.len() + self.parts.len() - self.sequences.len();
                let positions = end - 1..end;
                self.parts.push(Part { owner, positions, first_row, samples: 0..0, draws: false });
            }
        }
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
        for (segment, &owner) in self.segments.iter_mut().zip(&self.owners) {
            segment.sequence.quota = running[owner].quota;
            segment.extents = running[owner].layer_extents;
        }
        let resting = running.iter().filter(|s| !s.takes_part && s.flight.is_none());
        self.resting.extend(resting.map(|s| (s.kv.seat().expect("who runs has a seat"), s.quota)));
    }

    pub(crate) fn step(&self) -> Step<'_> {
        Step {
            batch: Batch {
                tokens: &self.tokens,
                positions: &self.positions,
                sequences: &self.sequences,
                block_tables: &self.block_tables,
                methods: &self.methods,
            },
            segments: &self.segments,
            prompt_tokens: &self.prompt_tokens,
            resting: &self.resting,
        }
    }
}
