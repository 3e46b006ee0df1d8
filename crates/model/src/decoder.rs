//! The loop over the layers.

use std::mem::swap;
use std::ops::Range;

use ops::coverage::Inspections;
use ops::{Backend, Batch, DType, Step};

use crate::{DeviceKv, ModelConfig, Rope, Workspace};

/// A model on a device: configuration and packed weights.
pub struct Model<B: Backend> {
    pub(crate) config: ModelConfig,
    pub(crate) rope: Rope,
    pub(crate) dtype: DType,
    pub(crate) embed: B::Linear,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) norm: B::Vector,
    /// `None` when tied to the embedding.
    pub(crate) lm_head: Option<B::Linear>,
}

/// The weights of a decoder layer.
pub(crate) struct Layer<B: Backend> {
    pub input_norm: B::Vector,
    /// `[q; k; v]`.
    pub qkv: B::Linear,
    /// Of q and k, per head.
    pub qk_norm: Option<(B::Vector, B::Vector)>,
    pub output: B::Linear,
    pub post_attention_norm: B::Vector,
    /// `[gate; up]`.
    pub gate_up: B::Linear,
    pub down: B::Linear,
}

impl<B: Backend> Model<B> {
    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Element type of its packed weights, which its KV follows.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// See [`Rope::prefix_limit`].
    pub fn prefix_limit(&self) -> Option<usize> {
        self.rope.prefix_limit()
    }

    /// Runs `step`: the prompts that go layer by layer, then the batch through all layers, writing their KV and digests. Keeps the final
    /// hidden states of `logit_rows`, rows of the batch in ascending order, for [`Model::logits`], and those of prompts that are
    /// complete for [`Model::logits_of_prompts`]. A row that `inspections` ask for is one of `logit_rows`.
    ///
    /// # Panics
    /// When the step exceeds the limits of `workspace`, where each run of consecutive `logit_rows` within a sequence
    /// counts as one.
    pub fn forward(
        &self,
        backend: &mut B,
        workspace: &mut Workspace<B>,
        kv: &mut DeviceKv<B>,
        step: &Step,
        logit_rows: &[u32],
        inspections: &mut Inspections,
    ) {
        assert!(logit_rows.is_sorted_by(|a, b| a < b), "rows for logits ascend");
        kv.begin(backend, step, &mut workspace.placed);
        for segment in step.segments {
            self.run_segment(backend, workspace, kv, step, segment);
        }
        let batch = &step.batch;
        if batch.num_rows() == 0 {
            return;
        }
        self.rotations(backend, workspace, batch);
        backend.embed(&mut workspace.residual, &self.embed, batch.tokens);
        for index in 0..self.layers.len() {
            self.layer(backend, workspace, kv, index, batch, logit_rows, inspections);
        }
        backend.rms_norm(&mut workspace.normed, &workspace.residual, &self.norm, self.config.rms_norm_eps);
    }

    /// Sets the rotation angles of the rows of `batch`.
    pub(crate) fn rotations(&self, backend: &mut B, workspace: &mut Workspace<B>, batch: &Batch) {
        let Workspace { angles, inv_freq, frequency_sets, .. } = workspace;
        self.rope.frequencies(batch, inv_freq, frequency_sets);
        backend.rope_angles(angles, batch.positions, inv_freq, frequency_sets, self.rope.scale());
    }

    /// Runs `batch`, whose residual rows and angles are those of the workspace, through layer `index`. In the last one all KV is
    /// written, and only `logit_rows` go on: they are the residual rows then, where there are any.
    pub(crate) fn layer(
        &self,
        backend: &mut B,
        workspace: &mut Workspace<B>,
        kv: &mut DeviceKv<B>,
        index: usize,
        batch: &Batch,
        logit_rows: &[u32],
        inspections: &mut Inspections,
    ) {
        let layer = &self.layers[index];
        let Workspace { residual, normed, qkv, qkv_selected, angles, attention, gate_up, activated, .. } =
            workspace;
        let (heads, eps) = (self.config.heads, self.config.rms_norm_eps);

        backend.rms_norm(normed, residual, &layer.input_norm, eps);
        backend.linear_forward(qkv, normed, &layer.qkv);
        let qk_norm = layer.qk_norm.as_ref().map(|(q, k)| (q, k, eps));
        backend.append(&mut kv.pages, index, qkv, heads, qk_norm, angles, batch);
        // A window bounds what is read already.
        let window = self.config.windows[index];
        if window.is_none() {
            kv.digest(backend, index, batch);
        }
        backend.save(&mut kv.pages, index, batch);

        // All KV is written; from here on only the rows whose logits somebody wants matter.
        let narrow = index + 1 == self.layers.len() && logit_rows.len() < batch.num_rows();
        if narrow && logit_rows.is_empty() {
            return;
        }
        let rows = if narrow {
            backend.select_rows(qkv_selected, qkv, logit_rows);
            swap(qkv, qkv_selected);
            backend.select_rows(normed, residual, logit_rows);
            swap(residual, normed);
            workspace.selected.select(batch, logit_rows)
        } else {
            *batch
        };

        let selection = match &mut kv.selection {
            Some(selection) if window.is_none() && rows.sparse_rows().next().is_some() => {
                backend.score(selection, &kv.digests, &kv.pages, index, qkv, heads, &rows);
                backend.select(selection, &kv.digests, index, heads, &rows);
                if let Some(player) = &mut kv.player {
                    player.play(backend, selection, index, &rows);
                }
                if let Some(recorder) = &mut kv.recorder {
                    recorder.record(backend, selection, index, &rows);
                }
                backend.tally(&mut kv.pages, index, &rows, selection);
                Some(&*selection)
            }
            _ => None,
        };
        let waves = backend.resolve(&mut kv.pages, index, heads, window, &rows, selection);
        for wave in 0..waves {
            backend.gather(&mut kv.pages, wave);
            backend.attend(attention, None, &kv.pages, index, qkv, heads, window, &rows, selection, wave);
        }
        if let Some(selection) = selection
            && inspections.asked.iter().any(|i| i.layer as usize == index)
        {
            backend.cover(inspections, &mut kv.pages, index, qkv, heads, &rows, selection);
        }
        if kv.tiered && window.is_none() {
            workspace.warm_start.run(backend, kv, index, qkv, heads, &rows);
        }
        backend.linear_add(residual, attention, &layer.output);

        backend.rms_norm(normed, residual, &layer.post_attention_norm, eps);
        backend.linear_forward(gate_up, normed, &layer.gate_up);
        backend.swiglu(activated, gate_up);
        backend.linear_add(residual, activated, &layer.down);
    }

    /// Logits `[rows, vocab]` of the given range of the last [`Model::forward`]'s `logit_rows`.
    ///
    /// # Panics
    /// When the range is longer than `logits_rows_max` or not one of that step's.
    pub fn logits<'w>(
        &self,
        backend: &mut B,
        workspace: &'w mut Workspace<B>,
        rows: Range<usize>,
    ) -> &'w B::Tensor {
        let Workspace { normed, logits_input, logits, chunk_rows, .. } = workspace;
        chunk_rows.clear();
        chunk_rows.extend(rows.start as u32..rows.end as u32);
        backend.select_rows(logits_input, normed, chunk_rows);
        backend.linear_forward(logits, logits_input, self.lm_head.as_ref().unwrap_or(&self.embed));
        logits
    }
}
