//! Prompts that go through the model layer by layer (SparseServe's layer-segmented prefill).
//!
//! A prompt runs whole through some layers in each step, in tiles of tokens within a layer; the hidden states that come out of a layer
//! wait for the next one in a store. So HBM holds the KV of one layer of a prompt, whatever its length: a layer is granted frames when the
//! prompt enters it, later tiles find earlier ones there, and it gives them back when the prompt leaves it, all but what the first
//! step of the answer will need. The prefix that a prompt found in the cache comes back layer by layer, too, with the first tile.
//!
//! Tiles are chunks of one layer, so the bits are those of a prompt that is chunked, whatever the tiles.

use ops::coverage::Inspections;
use ops::{Backend, Batch, Segment, SequenceRows, Step, Tensor};

use crate::{DeviceKv, Model, Workspace};

impl<B: Backend> Model<B> {
    /// Runs the tokens of `segment` through its layers.
    pub(crate) fn run_segment(
        &self,
        backend: &mut B,
        workspace: &mut Workspace<B>,
        kv: &mut DeviceKv<B>,
        step: &Step,
        segment: &Segment,
    ) {
        let (first, rows) = (segment.sequence.first_position, segment.sequence.num_rows() as u32);
        let tile_rows = workspace.limits().tile_rows as u32;
        for layer in segment.layers.clone() {
            let mut at = 0;
            while at < rows {
                let end = rows.min(at + tile_rows);
                let tokens = segment.tokens.start as usize;
                let tile = Tile {
                    segment,
                    layer: layer as usize,
                    sequence: SequenceRows {
                        rows: 0..end - at,
                        first_position: first + at,
                        ..segment.sequence.clone()
                    },
                    tokens: &step.prompt_tokens[tokens + at as usize..tokens + end as usize],
                    begins: first + at == segment.start,
                    ends: segment.ends && end == rows,
                };
                self.run_tile(backend, workspace, kv, &step.batch, &tile);
                at = end;
            }
        }
    }

    /// Runs a tile through its layer: from the store of hidden states, into which it goes back.
    fn run_tile(
        &self,
        backend: &mut B,
        workspace: &mut Workspace<B>,
        kv: &mut DeviceKv<B>,
        tables: &Batch,
        tile: &Tile,
    ) {
        let Tile { segment, layer, ref sequence, tokens, begins, ends } = *tile;
        let rows = tokens.len();
        let mut positions = std::mem::take(&mut workspace.tile_positions);
        positions.clear();
        positions.extend(sequence.first_position..sequence.first_position + rows as u32);
        let sequences = std::slice::from_ref(sequence);
        let batch = Batch { tokens, positions: &positions, sequences, ..*tables };
        let (seat, last_layer) = (sequence.seat, layer + 1 == self.layers.len());
        if begins {
            kv.grant(backend, seat, layer, segment.extents);
        }
        let place = segment.hidden as usize + (sequence.first_position - segment.start) as usize;
        if layer == 0 {
            backend.embed(&mut workspace.residual, &self.embed, tokens);
        } else {
            workspace.residual.set_rows(rows);
            backend.copy_rows(&mut workspace.residual, 0, &workspace.hidden, place..place + rows);
        }
        self.rotations(backend, workspace, &batch);
        let last_row = [rows as u32 - 1];
        // Of the last layer only what comes out of the last token is needed.
        let wanted = if last_layer && ends { &last_row[..] } else { &[] };
        self.layer(backend, workspace, kv, layer, &batch, wanted, &mut Inspections::default());
        if !last_layer {
            backend.copy_rows(&mut workspace.hidden, place, &workspace.residual, 0..rows);
        } else if ends {
            // Nothing else of the prompt is needed any more.
            backend.copy_rows(&mut workspace.hidden, segment.hidden as usize, &workspace.residual, 0..1);
        }
        if ends {
            kv.grant(backend, seat, layer, sequence.quota);
        }
        workspace.tile_positions = positions;
    }

    /// Logits `[prompts, vocab]` of the prompts that `step`, the last one that ran, completed: of those in `prompts`, counted in
    /// order. What [`Model::logits`] may be asked for is gone after this.
    ///
    /// # Panics
    /// When there are more than `logits_rows_max`.
    pub fn logits_of_prompts<'w>(
        &self,
        backend: &mut B,
        workspace: &'w mut Workspace<B>,
        step: &Step,
        prompts: std::ops::Range<usize>,
    ) -> &'w B::Tensor {
        let Workspace { residual, normed, hidden, logits, .. } = workspace;
        residual.set_rows(prompts.len());
        let completed = step.completed(self.layers.len()).skip(prompts.start).take(prompts.len());
        for (row, segment) in completed.enumerate() {
            let place = segment.hidden as usize;
            backend.copy_rows(residual, row, hidden, place..place + 1);
        }
        backend.rms_norm(normed, residual, &self.norm, self.config.rms_norm_eps);
        backend.linear_forward(logits, normed, self.lm_head.as_ref().unwrap_or(&self.embed));
        logits
    }
}

/// Tokens of a segment that run through a layer at once.
struct Tile<'a> {
    segment: &'a Segment,
    layer: usize,
    /// The tokens as the only rows of a batch.
    sequence: SequenceRows,
    tokens: &'a [u32],
    /// Whether the prompt enters the layer with it.
    begins: bool,
    /// Whether the prompt leaves the layer with it.
    ends: bool,
}
