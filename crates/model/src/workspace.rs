//! The activations of a step.

use ops::{Backend, Batch, SequenceRows, Tensor};

use crate::warm::WarmStart;
use crate::{Error, ModelConfig, Rope};

/// What a step may hold at most: everything is allocated for it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a batch.
    pub rows_max: usize,
    /// Rows whose logits are computed at a time; a step with more goes in chunks.
    pub logits_rows_max: usize,
    /// Sequences of a batch.
    pub sequences_max: usize,
    /// Tokens of a context.
    pub context_max: usize,
    /// Tokens of a prompt that go through a layer at once, where prompts go layer by layer; at most `rows_max`.
    pub tile_rows: usize,
    /// Tokens of such prompts whose hidden states are kept, of all of them together; 0 where none do.
    pub hidden_rows: usize,
}

impl Limits {
    /// Bytes of the activations of `config`'s model, without the scratch memory of the backend.
    pub fn activation_bytes(&self, config: &ModelConfig) -> u64 {
        let widths = activation_cols(config);
        let values = self.rows_max as u64 * widths.per_row as u64
            + self.logits_rows_max as u64 * widths.per_logits_row as u64
            + self.hidden_rows as u64 * config.hidden_size as u64;
        values * size_of::<f32>() as u64
    }
}

struct Cols {
    per_row: usize,
    per_logits_row: usize,
}

fn activation_cols(config: &ModelConfig) -> Cols {
    let heads = config.heads;
    let attention = 2 * heads.qkv_cols() + heads.head_dim + heads.q_cols();
    Cols {
        per_row: 2 * config.hidden_size + attention + 3 * config.intermediate_size,
        per_logits_row: config.hidden_size + config.vocab_size,
    }
}

/// Activations and index arrays for the steps of one model, allocated once.
pub struct Workspace<B: Backend> {
    /// `[rows, hidden]`: the sum of the embedding and of what the layers added.
    pub(crate) residual: B::Tensor,
    /// `[rows, hidden]`.
    pub(crate) normed: B::Tensor,
    /// `[rows, q_cols + 2 kv_cols]`.
    pub(crate) qkv: B::Tensor,
    /// The same of the rows that go on in the last layer.
    pub(crate) qkv_selected: B::Tensor,
    /// `[rows, head_dim]`.
    pub(crate) angles: B::Tensor,
    /// `[rows, q_cols]`.
    pub(crate) attention: B::Tensor,
    /// `[rows, 2 intermediate]`.
    pub(crate) gate_up: B::Tensor,
    /// `[rows, intermediate]`.
    pub(crate) activated: B::Tensor,
    /// `[hidden rows, hidden]`: the residual rows of prompts between two layers.
    pub(crate) hidden: B::Tensor,
    /// `[logits rows, hidden]`.
    pub(crate) logits_input: B::Tensor,
    /// `[logits rows, vocab]`.
    pub(crate) logits: B::Tensor,
    /// RoPE frequencies of the batch, and the set of them that each row uses.
    pub(crate) inv_freq: Vec<f32>,
    pub(crate) frequency_sets: Vec<u32>,
    /// The sequences of a step.
    pub(crate) placed: Vec<SequenceRows>,
    /// Positions of a tile.
    pub(crate) tile_positions: Vec<u32>,
    pub(crate) selected: SelectedRows,
    pub(crate) warm_start: WarmStart,
    /// Of a chunk of logits.
    pub(crate) chunk_rows: Vec<u32>,
    limits: Limits,
    bytes: u64,
}

impl<B: Backend> Workspace<B> {
    /// Allocates for `limits`, and has the backend reserve its scratch memory.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(backend: &mut B, config: &ModelConfig, limits: Limits) -> Result<Self, Error> {
        let Limits { rows_max, logits_rows_max, sequences_max, context_max, tile_rows, hidden_rows } = limits;
        assert!(tile_rows <= rows_max && (hidden_rows == 0 || tile_rows > 0), "a tile is part of a step");
        let (hidden, intermediate, heads) = (config.hidden_size, config.intermediate_size, config.heads);
        let cols_max =
            [hidden, heads.qkv_cols(), 2 * intermediate, config.vocab_size].into_iter().fold(0, usize::max);
        let scratch_bytes = backend.reserve(heads, rows_max, sequences_max, context_max, cols_max)?;
        Ok(Workspace {
            residual: backend.tensor(rows_max, hidden)?,
            normed: backend.tensor(rows_max, hidden)?,
            qkv: backend.tensor(rows_max, heads.qkv_cols())?,
            qkv_selected: backend.tensor(rows_max, heads.qkv_cols())?,
            angles: backend.tensor(rows_max, heads.head_dim)?,
            attention: backend.tensor(rows_max, heads.q_cols())?,
            gate_up: backend.tensor(rows_max, 2 * intermediate)?,
            activated: backend.tensor(rows_max, intermediate)?,
            hidden: {
                let mut hidden = backend.tensor(hidden_rows, hidden)?;
                hidden.set_rows(hidden_rows);
                hidden
            },
            logits_input: backend.tensor(logits_rows_max, hidden)?,
            logits: backend.tensor(logits_rows_max, config.vocab_size)?,
            inv_freq: Vec::with_capacity(Rope::new(&config.rope).inv_freq_len_max(rows_max)),
            frequency_sets: Vec::with_capacity(rows_max),
            placed: Vec::with_capacity(sequences_max),
            tile_positions: Vec::with_capacity(tile_rows),
            selected: SelectedRows::with_capacity(rows_max, sequences_max),
            warm_start: WarmStart::new(sequences_max),
            chunk_rows: Vec::with_capacity(logits_rows_max),
            limits,
            bytes: limits.activation_bytes(config) + scratch_bytes,
        })
    }

    /// What it was allocated for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Bytes that it and the backend's scratch memory take.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Some rows of a batch as a batch of their own.
#[derive(Debug)]
pub(crate) struct SelectedRows {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
    sequences_max: usize,
}

impl SelectedRows {
    fn with_capacity(rows_max: usize, sequences_max: usize) -> Self {
        SelectedRows {
            tokens: Vec::with_capacity(rows_max),
            positions: Vec::with_capacity(rows_max),
            sequences: Vec::with_capacity(sequences_max),
            sequences_max,
        }
    }

    /// Takes `rows` of `batch`, ascending. Rows that follow one another in a sequence stay together; a gap begins
    /// what a backend must treat as one more sequence.
    pub(crate) fn select<'a>(&'a mut self, batch: &Batch<'a>, rows: &[u32]) -> Batch<'a> {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        let mut of = batch.sequences.iter();
        let mut sequence = of.next();
        let mut previous = None;
        for (place, &row) in (0..).zip(rows) {
            while sequence.is_some_and(|s| s.rows.end <= row) {
                (sequence, previous) = (of.next(), None);
            }
            let source = sequence.expect("a selected row belongs to a sequence of the batch");
            let position = batch.positions[row as usize];
            self.tokens.push(batch.tokens[row as usize]);
            self.positions.push(position);
            match self.sequences.last_mut() {
                Some(last) if previous.is_some_and(|p| p + 1 == row) => last.rows.end = place + 1,
                _ => {
                    let rows = place..place + 1;
                    self.sequences.push(SequenceRows { rows, first_position: position, ..source.clone() });
                }
            }
            previous = Some(row);
        }
        assert!(
            self.sequences.len() <= self.sequences_max,
            "the backend reserved memory for this many sequences"
        );
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            sequences: &self.sequences,
            block_tables: batch.block_tables,
            methods: batch.methods,
        }
    }
}

#[cfg(test)]
mod tests {
    use ops::BlockIndex;

    use super::*;

    #[test]
    fn selected_rows_form_a_batch() {
        let sequence = |rows: std::ops::Range<u32>, first_position, blocks| SequenceRows {
            rows,
            first_position,
            prompt_len: 9,
            blocks,
            attention: Default::default(),
            seat: ops::SeatIndex(0),
            quota: 0,
        };
        let sequences = [sequence(0..3, 5, 0..1), sequence(3..4, 0, 1..2), sequence(4..8, 2, 2..3)];
        let batch = Batch {
            tokens: &[10, 11, 12, 13, 14, 15, 16, 17],
            positions: &[5, 6, 7, 0, 2, 3, 4, 5],
            sequences: &sequences,
            block_tables: &[BlockIndex(4), BlockIndex(2), BlockIndex(0)],
            methods: &[],
        };
        batch.check(8);
        let mut selected = SelectedRows::with_capacity(8, 3);
        let part = selected.select(&batch, &[2, 4, 5, 7]);
        part.check(8);
        assert_eq!(part.tokens, [12, 14, 15, 17]);
        assert_eq!(
            part.sequences,
            [sequence(0..1, 7, 0..1), sequence(1..3, 2, 2..3), sequence(3..4, 5, 2..3)]
        );
        assert_eq!(
            selected.select(&batch, &[2, 3]).sequences.len(),
            2,
            "neighbours of two sequences stay apart"
        );
        assert_eq!(selected.select(&batch, &[0, 1, 2, 3, 4, 5, 6, 7]).sequences, batch.sequences);
    }
}
