//! The runner of a server: a model on a device.

use model::{DeviceKv, Model, Workspace};
use ops::coverage::Inspections;
use ops::places::DigestState;
use ops::residency::SeatCounters;
use ops::sample::{SampleOutput, SampleRow, Sampled};
use ops::tally::{Overlap, RowTally, WorkingSet};
use ops::tier::TierState;
use ops::{Backend, BlockIndex, SeatIndex, Step};

use crate::Runner;
use crate::run::recycle;

/// A model, its activations and its KV pool on one device.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Model<B>,
    workspace: Workspace<B>,
    kv: DeviceKv<B>,
    /// Rows of the batch that are sampled from, ascending.
    logit_rows: Vec<u32>,
    /// What is sampled from the logits at hand, empty between calls.
    chunk_samples: Vec<SampleRow<'static>>,
    chunk_output: SampleOutput,
}

impl<B: Backend> ModelRunner<B> {
    /// Takes the parts, all made for `backend`.
    pub fn new(backend: B, model: Model<B>, workspace: Workspace<B>, kv: DeviceKv<B>) -> Self {
        let limits = workspace.limits();
        ModelRunner {
            backend,
            model,
            workspace,
            kv,
            logit_rows: Vec::with_capacity(limits.rows_max),
            chunk_samples: Vec::with_capacity(limits.logits_rows_max),
            chunk_output: SampleOutput::default(),
        }
    }

    /// The device.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    /// Computes logits for the sampled rows only, at most `logits_rows_max` at a time: log-probabilities of a whole
    /// prompt would otherwise need a row of the vocabulary for each of its tokens.
    ///
    /// # Panics
    /// When the rows of `samples` do not ascend, or the step exceeds the limits of the workspace.
    fn run(
        &mut self,
        step: &Step,
        samples: &[SampleRow],
        inspections: &mut Inspections,
        out: &mut SampleOutput,
    ) {
        out.clear();
        self.logit_rows.clear();
        self.logit_rows.extend(samples.iter().map(|s| s.row as u32));
        self.logit_rows.dedup();
        let ModelRunner { backend, model, workspace, kv, logit_rows, .. } = self;
        let num_rows = step.batch.num_rows() as u32;
        let of_batch = logit_rows.partition_point(|&row| row < num_rows);
        let (of_batch, of_prompts) = logit_rows.split_at(of_batch);
        model.forward(backend, workspace, kv, step, of_batch, inspections);

        let rows_max = workspace.limits().logits_rows_max;
        let mut chunk_samples = recycle(std::mem::take(&mut self.chunk_samples));
        let mut rest = samples;
        let batch_chunks = of_batch.chunks(rows_max).map(|rows| (rows, true));
        let mut done = 0;
        for (rows, in_batch) in batch_chunks.chain(of_prompts.chunks(rows_max).map(|rows| (rows, false))) {
            let logits = if in_batch {
                model.logits(backend, workspace, done..done + rows.len())
            } else {
                let first = (rows[0] - num_rows) as usize;
                model.logits_of_prompts(backend, workspace, step, first..first + rows.len())
            };
            done += rows.len();
            let in_chunk =
                rest.iter().take_while(|s| rows.last().is_some_and(|&last| s.row as u32 <= last)).count();
            let (chunk, after) = rest.split_at(in_chunk);
            rest = after;
            chunk_samples.clear();
            chunk_samples.extend(chunk.iter().map(|s| {
                let row = rows.partition_point(|&row| row < s.row as u32);
                SampleRow { row, ..*s }
            }));
            backend.sample(&mut self.chunk_output, logits, &chunk_samples);
            append(out, &mut self.chunk_output);
        }
        self.chunk_samples = recycle(chunk_samples);
    }

    fn park(&mut self, seat: SeatIndex, table: &[BlockIndex]) {
        self.kv.park(&mut self.backend, seat, table);
    }

    fn digest_state(&self) -> DigestState {
        self.kv.digest_state(&self.backend)
    }

    fn release(&mut self, seat: SeatIndex) {
        self.kv.release(&mut self.backend, seat);
    }

    fn saved_tokens(&mut self, seat: SeatIndex) -> usize {
        self.kv.saved_tokens(&mut self.backend, seat)
    }

    fn tier_state(&self) -> Option<TierState> {
        self.kv.tier_state(&self.backend)
    }

    fn seat_counters(&self, seat: SeatIndex) -> (SeatCounters, usize) {
        self.kv.seat_counters(&self.backend, seat)
    }

    fn digest_loads(&self, seat: SeatIndex) -> u64 {
        self.kv.digest_loads(&self.backend, seat)
    }

    fn overlap(&self) -> Overlap {
        self.kv.overlap(&self.backend)
    }

    fn row_tally(&self, seat: SeatIndex) -> RowTally {
        self.kv.row_tally(&self.backend, seat)
    }

    fn working_set(&self, seat: SeatIndex) -> WorkingSet {
        self.kv.working_set(&self.backend, seat)
    }
}

/// Moves what was sampled to the end of `out`.
fn append(out: &mut SampleOutput, chunk: &mut SampleOutput) {
    let shift = out.top.len() as u32;
    out.top.append(&mut chunk.top);
    out.sampled.extend(chunk.sampled.drain(..).map(|sampled| {
        let top = sampled.top.start + shift..sampled.top.end + shift;
        Sampled { top, ..sampled }
    }));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use model::{KvSpec, Limits, Source, kv_geometry};
    use ops::reference::Reference;
    use ops::sample::SamplingParams;
    use ops::{Batch, DType, SequenceRows};

    use super::*;
    use crate::TokenLogprobs;

    const PAGE_TOKENS: usize = 16;
    /// From `golden.json` of the demo model: what is the key of Alice, what of Barin?
    const FACTS: [u32; 53] = [
        1, 501, 741, 817, 638, 759, 25, 584, 784, 740, 378, 87, 84, 363, 569, 232, 432, 442, 460, 25, 567,
        842, 779, 717, 716, 25, 584, 784, 740, 602, 569, 232, 428, 419, 429, 25, 584, 837, 740, 617, 569,
        602, 25, 584, 745, 740, 617, 569, 232, 417, 419, 404, 25,
    ];
    const ASKS_ALICE: [u32; 11] = [210, 358, 569, 717, 784, 740, 378, 87, 84, 363, 42];
    const ASKS_BARIN: [u32; 8] = [210, 358, 569, 717, 784, 740, 602, 42];
    const ALICE: [u32; 6] = [232, 432, 442, 460, 25, 2];
    const BARIN: [u32; 6] = [232, 428, 419, 429, 25, 2];

    fn runner(logits_rows_max: usize) -> ModelRunner<Reference> {
        let mut backend = Reference::default();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo-model");
        let model = Model::load(&mut backend, &Source::Directory(demo), None, &mut |_, _| {}).unwrap();
        let limits = Limits {
            rows_max: 128,
            logits_rows_max,
            sequences_max: 2,
            context_max: 128,
            tile_rows: 0,
            hidden_rows: 0,
        };
        let workspace = Workspace::new(&mut backend, model.config(), limits).unwrap();
        let geometry = kv_geometry(model.config(), PAGE_TOKENS, DType::F32);
        let kv = DeviceKv::new(&mut backend, &KvSpec::dense(geometry, 16)).unwrap();
        ModelRunner::new(backend, model, workspace, kv)
    }

    /// Rows of one sequence: tokens, their first position, and the sequence's place in the pool.
    struct Part<'a>(&'a [u32], u32, u32);

    /// Runs `parts` as one batch and samples as `samples` say.
    fn step(runner: &mut ModelRunner<Reference>, parts: &[Part], samples: &[SampleRow]) -> SampleOutput {
        let (mut tokens, mut positions, mut sequences, mut block_tables) = (vec![], vec![], vec![], vec![]);
        for &Part(own, first_position, place) in parts {
            let rows = tokens.len() as u32..(tokens.len() + own.len()) as u32;
            let blocks = block_tables.len() as u32..block_tables.len() as u32 + 8;
            tokens.extend_from_slice(own);
            positions.extend(first_position..first_position + own.len() as u32);
            block_tables.extend((0..8).map(|i| BlockIndex(2 * i + place)));
            sequences.push(SequenceRows {
                rows,
                first_position,
                prompt_len: 64,
                blocks,
                attention: Default::default(),
                seat: SeatIndex(0),
                quota: 0,
            });
        }
        let batch = Batch {
            tokens: &tokens,
            positions: &positions,
            sequences: &sequences,
            block_tables: &block_tables,
            methods: &[],
        };
        let mut out = SampleOutput::default();
        runner.run(&Step::of(batch), samples, &mut Inspections::default(), &mut out);
        out
    }

    fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..Default::default() }
    }

    fn sample(params: &SamplingParams, row: usize) -> SampleRow<'_> {
        SampleRow {
            row,
            params,
            prompt: &[],
            generated: &[],
            banned: &[],
            position: 0,
            top_logprobs: None,
            forced: None,
        }
    }

    fn told(out: &SampleOutput) -> Vec<TokenLogprobs> {
        let told = |s: &Sampled| TokenLogprobs {
            token: s.token,
            logprob: s.logprob,
            rank: s.rank,
            top: out.top[s.top.start as usize..s.top.end as usize].to_vec(),
        };
        out.sampled.iter().map(told).collect()
    }

    #[test]
    fn two_requests_in_one_batch() {
        let greedy = greedy();
        let alice = [&FACTS[..], &ASKS_ALICE].concat();
        let barin = [&FACTS[..], &ASKS_BARIN].concat();
        let mut runner = runner(2);
        // Alice's prompt in two chunks, Barin's beside the second; nobody samples from the first.
        step(&mut runner, &[Part(&alice[..30], 0, 0)], &[]);
        let parts = [Part(&alice[30..], 30, 0), Part(&barin, 0, 1)];
        let (end_alice, end_barin) = (alice.len() - 30, alice.len() - 30 + barin.len());
        let mut out =
            step(&mut runner, &parts, &[sample(&greedy, end_alice - 1), sample(&greedy, end_barin - 1)]);
        for i in 0..ALICE.len() {
            let drawn: Vec<u32> = out.sampled.iter().map(|s| s.token).collect();
            assert_eq!(drawn, [ALICE[i], BARIN[i]], "token {i}");
            let (at_alice, at_barin) = ((alice.len() + i) as u32, (barin.len() + i) as u32);
            let parts = [Part(&ALICE[i..=i], at_alice, 0), Part(&BARIN[i..=i], at_barin, 1)];
            out = step(&mut runner, &parts, &[sample(&greedy, 0), sample(&greedy, 1)]);
        }
    }

    #[test]
    fn many_rows_go_in_chunks() {
        let greedy = greedy();
        let prompt = [&FACTS[..], &ASKS_ALICE].concat();
        // The log-probability of every token after the first, then a draw; one row is asked twice.
        let mut samples: Vec<SampleRow> = (0..prompt.len() - 1)
            .map(|row| SampleRow {
                top_logprobs: Some(row as u32 % 3),
                forced: Some(prompt[row + 1]),
                ..sample(&greedy, row)
            })
            .collect();
        samples.push(SampleRow { top_logprobs: Some(2), ..sample(&greedy, prompt.len() - 1) });
        samples.push(sample(&greedy, prompt.len() - 1));
        let at_once = step(&mut runner(prompt.len()), &[Part(&prompt, 0, 0)], &samples);
        assert_eq!(at_once.sampled.len(), samples.len());
        for logits_rows_max in [1, 5] {
            let out = step(&mut runner(logits_rows_max), &[Part(&prompt, 0, 0)], &samples);
            assert_eq!(told(&out), told(&at_once), "{logits_rows_max} rows at a time");
        }
        let [.., scored, draw, again] = &at_once.sampled[..] else { panic!() };
        assert_eq!((scored.token, draw.token, again.token), (42, ALICE[0], ALICE[0]));
        assert_eq!(at_once.top[draw.top.start as usize].0, ALICE[0]);
    }
}
