//! What a running model writes to a trace.

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};

use ops::{Backend, Batch, BlockIndex, SparseRow};

use super::{Header, TraceWriter};

/// Bytes that are collected before the system is asked to write them; a step that selects more is written in parts.
const BUFFER_BYTES: usize = 1 << 20;

type Complain = Box<dyn FnOnce(io::Error) + Send>;

/// Writes the selections of a model's steps to a trace. It reads them back from the device, which costs time and memory in
/// every step: a server records to be studied, not to be fast.
///
/// A batch carries no ids of requests. So a request is known by continuity: a row goes on with the request whose last row
/// was one position before it in the same place, which is the block of its previous token. Blocks with generated tokens are
/// nobody else's, so no two requests are taken for one. A request that is preempted and computed anew gets a new number.
pub struct Recorder {
    /// `None` after an error.
    writer: Option<TraceWriter<BufWriter<Box<dyn Write + Send>>>>,
    complain: Option<Complain>,
    page_tokens: usize,
    kv_heads: usize,
    step: u64,
    /// The last layer seen; `None` before the first.
    layer: Option<usize>,
    requests: Requests,
    pages: Vec<u32>,
}

impl Recorder {
    /// Writes the header to `out`. The first error after this one goes to `complain` and ends the recording, and nothing
    /// else.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(out: Box<dyn Write + Send>, header: &Header, complain: Complain) -> io::Result<Self> {
        let mut writer = TraceWriter::new(BufWriter::with_capacity(BUFFER_BYTES, out), header)?;
        writer.flush()?;
        Ok(Recorder {
            writer: Some(writer),
            complain: Some(complain),
            page_tokens: header.page_tokens as usize,
            kv_heads: header.kv_heads as usize,
            step: 0,
            layer: None,
            requests: Requests::default(),
            pages: Vec::new(),
        })
    }

    /// Records what the sparse rows of `batch` selected in `layer`. Layers of a step come in ascending order.
    pub fn record<B: Backend>(
        &mut self,
        backend: &mut B,
        selection: &B::Selection,
        layer: usize,
        batch: &Batch,
    ) {
        let result = self.try_record(backend, selection, layer, batch);
        self.check(result);
    }

    fn try_record<B: Backend>(
        &mut self,
        backend: &mut B,
        selection: &B::Selection,
        layer: usize,
        batch: &Batch,
    ) -> io::Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if self.layer.is_some_and(|last| layer <= last) {
            self.step += 1;
            // Whole steps are in the file whenever the process ends.
            writer.flush()?;
        }
        self.layer = Some(layer);
        writer.begin(self.step, layer as u32);
        let mut any = false;
        for (place, row) in batch.sparse_rows().enumerate() {
            let request =
                self.requests.number(&row, batch.block_table(row.sequence), self.page_tokens, self.step);
            for head in 0..self.kv_heads {
                let Some(bits) = backend.read_selection(selection, place, head) else { break };
                if head == 0 {
                    let prompt_tokens = row.sequence.prompt_len;
                    writer.row(request, prompt_tokens, row.position as u32, row.budget as u32);
                    any = true;
                }
                let tokens = pages_of(&bits, self.page_tokens, &mut self.pages);
                writer.head(tokens, &self.pages);
            }
        }
        if any { writer.end() } else { Ok(()) }
    }

    fn check(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.writer = None;
            if let Some(complain) = self.complain.take() {
                complain(error);
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let result = self.writer.as_mut().map_or(Ok(()), TraceWriter::flush);
        self.check(result);
    }
}

/// Puts the pages with a bit in `bits` into `pages`, and counts the bits.
fn pages_of(bits: &[u64], page_tokens: usize, pages: &mut Vec<u32>) -> u32 {
    pages.clear();
    let mut tokens = 0;
    for (index, &word) in bits.iter().enumerate() {
        tokens += word.count_ones();
        let mut rest = word;
        while rest != 0 {
            let slot = index * 64 + rest.trailing_zeros() as usize;
            let page = (slot / page_tokens) as u32;
            if pages.last() != Some(&page) {
                pages.push(page);
            }
            // On to the next page of the word.
            let end = (page as usize + 1) * page_tokens - index * 64;
            rest = if end < 64 { rest >> end << end } else { 0 };
        }
    }
    tokens
}

/// Who is who: see [`Recorder`].
#[derive(Debug, Default)]
pub(super) struct Requests {
    next: u64,
    /// By the block of its last row.
    by_block: HashMap<BlockIndex, Seen>,
}

/// Rows of a request in a block.
#[derive(Clone, Copy, Debug)]
struct Seen {
    request: u64,
    prompt_tokens: u32,
    /// The last step with rows, and the positions of these.
    step: u64,
    first: usize,
    last: usize,
}

impl Requests {
    /// The number of the request of `row`. Every layer of a step asks for the same rows, or for some of them.
    pub(super) fn number(
        &mut self,
        row: &SparseRow,
        table: &[BlockIndex],
        page_tokens: usize,
        step: u64,
    ) -> u64 {
        let (position, prompt_tokens) = (row.position, row.sequence.prompt_len);
        let own = table[position / page_tokens];
        let here = self.by_block.get(&own).filter(|seen| seen.prompt_tokens == prompt_tokens).copied();
        if let Some(seen) = here
            && seen.step == step
            && (seen.first..=seen.last).contains(&position)
        {
            return seen.request;
        }
        // The token before the first generated one may lie in a block that others share.
        let before = (position > prompt_tokens as usize)
            .then(|| self.by_block.get(&table[(position - 1) / page_tokens]))
            .flatten()
            .filter(|seen| seen.prompt_tokens == prompt_tokens && seen.last + 1 == position);
        let request = before.map_or(self.next, |seen| seen.request);
        self.next = self.next.max(request + 1);
        let same = here.filter(|seen| seen.request == request && seen.step == step);
        let first = same.map_or(position, |seen| seen.first);
        self.by_block.insert(own, Seen { request, prompt_tokens, step, first, last: position });
        request
    }
}
