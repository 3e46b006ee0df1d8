//! Sampling, a row per task.

use ops::Tensor;
use ops::sample::{SampleOutput, SampleRow, SampleScratch, sample};

use crate::memory::{PerThread, Shared};
use crate::pool::Pool;
use crate::tensor::CpuTensor;

/// Memory of sampling.
#[derive(Debug)]
pub struct Scratch {
    threads: PerThread<SampleScratch>,
    /// What the threads have room for.
    vocab: usize,
    /// One output per row: tasks finish in any order.
    outputs: Vec<SampleOutput>,
}

impl Scratch {
    /// Scratch for `threads` threads that grows when first used.
    pub fn new(threads: usize) -> Self {
        Scratch { threads: PerThread::new(threads, SampleScratch::default), vocab: 0, outputs: Vec::new() }
    }

    /// Makes room for `rows` rows.
    pub fn reserve(&mut self, rows: usize) {
        if self.outputs.len() < rows {
            self.outputs.resize_with(rows, SampleOutput::default);
        }
    }
}

/// Draws one token per row, in order, into `out`.
pub fn sample_rows(
    pool: &mut Pool,
    scratch: &mut Scratch,
    out: &mut SampleOutput,
    logits: &CpuTensor,
    rows: &[SampleRow],
) {
    out.clear();
    scratch.reserve(rows.len());
    if scratch.vocab < logits.cols() {
        // For all threads at once: which of them draws first is a matter of chance.
        scratch.vocab = logits.cols();
        scratch.threads.iter_mut().for_each(|t| *t = SampleScratch::with_vocab(scratch.vocab));
    }
    let outputs = Shared(scratch.outputs.as_mut_ptr());
    let threads = &scratch.threads;
    pool.run(rows.len(), &|task, thread| {
        // SAFETY: output `task` is this task's alone, and there are as many as rows; the scratch is this thread's.
        let (output, scratch) = unsafe { (&mut *outputs.at(task), &mut *threads.get(thread)) };
        output.clear();
        sample(output, logits.row(rows[task].row), &rows[task], scratch);
    });
    for output in &mut scratch.outputs[..rows.len()] {
        let shift = out.top.len() as u32;
        for mut sampled in output.sampled.drain(..) {
            if !sampled.top.is_empty() {
                sampled.top = sampled.top.start + shift..sampled.top.end + shift;
            }
            out.sampled.push(sampled);
        }
        out.top.append(&mut output.top);
    }
}
