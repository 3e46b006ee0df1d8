//! Warm start: when a prompt ends, HBM is filled with what its last token would select.
//!
//! The prompt attends to everything, page by page in passing, and leaves nothing behind that the answer needs; without this
//! its first step would miss every page at once. What is selected here is attended to by nobody, so no answer depends on it.

use ops::residency::EXTENT_FRAMES;
use ops::sparse::Attention;
use ops::{Backend, Batch, HeadShape, SequenceRows};

use crate::DeviceKv;

/// The batches of a warm start, kept for their memory.
pub(crate) struct WarmStart {
    /// The rows of a step, of which only the last ones of prompts select.
    scored: Vec<SequenceRows>,
    /// Those rows alone.
    resolved: Vec<SequenceRows>,
}

impl WarmStart {
    pub(crate) fn new(sequences_max: usize) -> Self {
        WarmStart { scored: Vec::with_capacity(sequences_max), resolved: Vec::with_capacity(sequences_max) }
    }

    /// Fetches what the last rows of prompts in `rows` select in `layer`. Comes after attention.
    pub(crate) fn run<B: Backend>(
        &mut self,
        backend: &mut B,
        kv: &mut DeviceKv<B>,
        layer: usize,
        qkv: &B::Tensor,
        heads: HeadShape,
        rows: &Batch,
    ) {
        let page_tokens = kv.page_tokens;
        let Some(selection) = &mut kv.selection else { return };
        self.scored.clear();
        self.resolved.clear();
        for sequence in rows.sequences {
            let ends = sequence.context_tokens() == sequence.prompt_len as usize;
            let mut scored = sequence.clone();
            if ends && fits(sequence, rows, heads, page_tokens) {
                // As if its last token were the first of the answer.
                scored.prompt_len -= 1;
                let row = self.resolved.len() as u32;
                self.resolved.push(SequenceRows {
                    rows: row..row + 1,
                    first_position: scored.prompt_len,
                    ..scored.clone()
                });
            } else {
                scored.attention = Attention::Dense;
            }
            self.scored.push(scored);
        }
        if self.resolved.is_empty() {
            return;
        }
        let scored = Batch { sequences: &self.scored, ..*rows };
        backend.score(selection, &kv.digests, &kv.pages, layer, qkv, heads, &scored);
        backend.select(selection, &kv.digests, layer, heads, &scored);
        let resolved = Batch { sequences: &self.resolved, ..*rows };
        backend.settle(&mut kv.pages, &resolved);
        backend.resolve(&mut kv.pages, layer, heads, None, &resolved, Some(selection));
        backend.gather(&mut kv.pages, 0);
    }
}

/// Whether the quota holds all that the last token would select: what does not stay is fetched for nobody.
fn fits(sequence: &SequenceRows, rows: &Batch, heads: HeadShape, page_tokens: usize) -> bool {
    let Attention::Sparse { method, budget } = sequence.attention else { return false };
    let method = &rows.methods[method as usize];
    let context = sequence.context_tokens();
    let plan = method.plan(context, sequence.prompt_len as usize - 1, budget as usize);
    let pages = plan.pages_max(context, method.partition_tokens, page_tokens);
    pages * heads.kv_heads <= sequence.quota as usize * EXTENT_FRAMES
}
