//! A trace played back: what was selected once takes the place of what a policy selects.

use std::collections::HashMap;
use std::io::Read;

use ops::sparse::{bitmap_words, mark};
use ops::{Backend, Batch};

use super::recorder::Requests;
use super::{HeadSelection, Header, TraceError, TraceReader};

/// Puts the selections of a trace in the place of those that were made, so that a bench has a real demand on its caches
/// whatever values its KV holds.
///
/// The `i`-th request gets the selections of request `i` of the trace, modulo their number, token by token from the first
/// generated one on; when they end they begin again. Pages are selected whole, and with them the row's own. Rows that attend
/// to everything go on doing so.
pub struct Player {
    page_tokens: usize,
    prompt_tokens: u32,
    /// By request, generated tokens before the row, and layer.
    rows: HashMap<(u64, u32, u32), Vec<HeadSelection>>,
    /// Generated tokens of each request; never 0.
    lengths: Vec<u32>,
    step: u64,
    layer: Option<usize>,
    requests: Requests,
}

impl Player {
    /// Reads a trace whose shape must be that of `expected`, apart from the note.
    ///
    /// # Errors
    /// A trace that cannot be read, of another shape, or with nothing in it.
    pub fn new<R: Read>(trace: &mut TraceReader<R>, expected: &Header) -> Result<Self, TraceError> {
        let found = trace.header().clone();
        if (Header { note: String::new(), ..found.clone() })
            != (Header { note: String::new(), ..expected.clone() })
        {
            return Err(TraceError::OtherModel { found: found.shape(), expected: expected.shape() });
        }
        let (mut rows, mut lengths, mut prompt_tokens) = (HashMap::new(), HashMap::new(), 0);
        while let Some(record) = trace.read()? {
            for row in record.rows {
                let generated = row.position - row.prompt_tokens;
                let length = lengths.entry(row.request).or_insert(0);
                *length = generated.saturating_add(1).max(*length);
                prompt_tokens = row.prompt_tokens.max(prompt_tokens);
                rows.insert((row.request, generated, record.layer), row.heads);
            }
        }
        if lengths.is_empty() {
            return Err(TraceError::Empty);
        }
        // A trace may have been cut at its front.
        let mut numbers: Vec<u64> = lengths.keys().copied().collect();
        numbers.sort_unstable();
        let place: HashMap<u64, u64> = numbers.iter().copied().zip(0..).collect();
        Ok(Player {
            page_tokens: found.page_tokens as usize,
            prompt_tokens,
            rows: rows.into_iter().map(|((r, g, l), heads)| ((place[&r], g, l), heads)).collect(),
            lengths: numbers.iter().map(|number| lengths[number]).collect(),
            step: 0,
            layer: None,
            requests: Requests::default(),
        })
    }

    /// Tokens of the longest prompt: no page of the trace lies beyond the context of a request with as many.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens as usize
    }

    /// Replaces the selections of the sparse rows of `batch` in `layer`. Layers of a step come in ascending order.
    pub fn play<B: Backend>(
        &mut self,
        backend: &mut B,
        selection: &mut B::Selection,
        layer: usize,
        batch: &Batch,
    ) {
        self.step += u64::from(self.layer.is_some_and(|last| layer <= last));
        self.layer = Some(layer);
        for (place, row) in batch.sparse_rows().enumerate() {
            let table = batch.block_table(row.sequence);
            let request = self.requests.number(&row, table, self.page_tokens, self.step);
            let from = request % self.lengths.len() as u64;
            let generated = row.position as u32 - row.sequence.prompt_len;
            let generated = generated % self.lengths[from as usize];
            let Some(heads) = self.rows.get(&(from, generated, layer as u32)) else { continue };
            let context = row.position + 1;
            for (head, selected) in heads.iter().enumerate() {
                if backend.read_selection(selection, place, head).is_none() {
                    continue;
                }
                let mut bits = vec![0; bitmap_words(context)];
                let own = (row.position / self.page_tokens) as u32;
                for &page in selected.pages.iter().chain([&own]) {
                    let start = page as usize * self.page_tokens;
                    mark(&mut bits, start.min(context)..(start + self.page_tokens).min(context));
                }
                backend.write_selection(selection, place, head, &bits);
            }
        }
    }
}
