//! A model on a backend with one sequence, fed as a test likes.

use std::path::PathBuf;

use ops::coverage::Inspections;
use ops::{Backend, Batch, BlockIndex, DType, SequenceRows, Step};
use sparseserve_model::{DeviceKv, KvSpec, Limits, Model, Source, Workspace, kv_geometry};

const PAGE_TOKENS: usize = 16;

/// A folder of the repository.
pub fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

pub fn load<B: Backend>(backend: B, source: &Source, dtype: DType) -> (B, Model<B>) {
    let mut backend = backend;
    let model = Model::load(&mut backend, source, Some(dtype), &mut |_, _| {});
    (backend, model.unwrap_or_else(|e| panic!("{}: {e}", source.describe())))
}

/// One sequence of a model.
pub struct Sequence<'a, B: Backend> {
    backend: &'a mut B,
    model: &'a Model<B>,
    workspace: Workspace<B>,
    kv: DeviceKv<B>,
    blocks: Vec<BlockIndex>,
    prompt_len: u32,
    length: u32,
}

impl<'a, B: Backend> Sequence<'a, B> {
    pub fn new(backend: &'a mut B, model: &'a Model<B>, prompt_len: usize, context_max: usize) -> Self {
        let limits = Limits {
            rows_max: context_max,
            logits_rows_max: 5,
            sequences_max: 8,
            context_max,
            tile_rows: 0,
            hidden_rows: 0,
        };
        let workspace = Workspace::new(backend, model.config(), limits).unwrap();
        let geometry = kv_geometry(model.config(), PAGE_TOKENS, model.dtype());
        let num_blocks = geometry.blocks(context_max);
        // Neighbours in the sequence are not neighbours in the pool.
        let blocks = (0..num_blocks as u32).rev().map(|i| BlockIndex(i ^ 1)).collect();
        let kv = DeviceKv::new(backend, &KvSpec::dense(geometry, num_blocks + 1)).unwrap();
        Sequence { backend, model, workspace, kv, blocks, prompt_len: prompt_len as u32, length: 0 }
    }

    /// Appends `tokens` in one step; gives the logits of `rows` of them.
    pub fn feed(&mut self, tokens: &[u32], rows: &[u32]) -> Vec<Vec<f32>> {
        let first = self.length;
        self.length += tokens.len() as u32;
        let positions: Vec<u32> = (first..self.length).collect();
        let sequences = [SequenceRows {
            rows: 0..tokens.len() as u32,
            first_position: first,
            prompt_len: self.prompt_len,
            blocks: 0..self.blocks.len() as u32,
            attention: Default::default(),
            seat: ops::SeatIndex(0),
            quota: 0,
        }];
        let batch = Batch {
            tokens,
            positions: &positions,
            sequences: &sequences,
            block_tables: &self.blocks,
            methods: &[],
        };
        batch.check(PAGE_TOKENS);
        self.model.forward(
            self.backend,
            &mut self.workspace,
            &mut self.kv,
            &Step::of(batch),
            rows,
            &mut Inspections::default(),
        );
        let mut logits = Vec::new();
        let chunk = self.workspace.limits().logits_rows_max;
        for start in (0..rows.len()).step_by(chunk) {
            let end = rows.len().min(start + chunk);
            let tensor = self.model.logits(self.backend, &mut self.workspace, start..end);
            logits.extend((0..end - start).map(|row| self.backend.row(tensor, row).to_vec()));
        }
        logits
    }
}

/// Index of the largest logit.
pub fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).fold(0, better) as u32
}
