//! A model on a device as the engine sees it: rows in, tokens out.

use engine::Runner;
use model::{Model, Workspace};
use ops::sample::{SampleOutput, SampleRow};
use ops::{Backend, Batch};

/// Rows whose logits are computed together. Logits of a large vocabulary take 600 KB a row, so a step that wants more
/// goes in chunks.
pub const LOGITS_ROWS: usize = 64;

/// Runs steps of one model.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Model<B>,
    workspace: Workspace<B>,
    kv: B::Kv,
    logit_rows: Vec<u32>,
    chunk_output: SampleOutput,
}

impl<B: Backend> ModelRunner<B> {
    /// A runner of `model` with its memory.
    pub fn new(backend: B, model: Model<B>, workspace: Workspace<B>, kv: B::Kv) -> Self {
        let rows_max = workspace.limits().rows_max;
        ModelRunner {
            backend,
            model,
            workspace,
            kv,
            logit_rows: Vec::with_capacity(rows_max),
            chunk_output: SampleOutput::default(),
        }
    }

    /// The device and the KV pool, for benches that write pages themselves.
    pub fn kv_mut(&mut self) -> (&mut B, &mut B::Kv) {
        (&mut self.backend, &mut self.kv)
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn run(&mut self, batch: &Batch, samples: &[SampleRow], out: &mut SampleOutput) {
        out.clear();
        self.logit_rows.clear();
        self.logit_rows.extend(samples.iter().map(|sample| sample.row as u32));
        self.model.forward(&mut self.backend, &mut self.workspace, &mut self.kv, batch, &self.logit_rows);
        for (index, chunk) in samples.chunks(LOGITS_ROWS).enumerate() {
            let start = index * LOGITS_ROWS;
            let logits =
                self.model.logits(&mut self.backend, &mut self.workspace, start..start + chunk.len());
            // On the stack, since the rows borrow from the requests of this step alone.
            let mut rows = [chunk[0]; LOGITS_ROWS];
            for (row, sample) in chunk.iter().enumerate() {
                rows[row] = SampleRow { row, ..*sample };
            }
            self.backend.sample(&mut self.chunk_output, logits, &rows[..chunk.len()]);
            append(out, &self.chunk_output);
        }
    }
}

fn append(out: &mut SampleOutput, chunk: &SampleOutput) {
    let offset = out.top.len() as u32;
    out.top.extend_from_slice(&chunk.top);
    out.sampled.extend(chunk.sampled.iter().cloned().map(|sampled| {
        let top = sampled.top.start + offset..sampled.top.end + offset;
        ops::sample::Sampled { top, ..sampled }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::sample::Sampled;

    #[test]
    fn chunks_keep_their_alternatives() {
        let sampled = |token, top| Sampled { token, logprob: 0.0, rank: 1, top };
        let mut out = SampleOutput { sampled: vec![sampled(1, 0..2)], top: vec![(1, -0.1), (2, -0.2)] };
        let chunk = SampleOutput { sampled: vec![sampled(3, 0..0), sampled(4, 0..1)], top: vec![(4, -0.4)] };
        append(&mut out, &chunk);
        assert_eq!(out.sampled, [sampled(1, 0..2), sampled(3, 2..2), sampled(4, 2..3)]);
        assert_eq!(out.top[2], (4, -0.4));
    }
}
