//! A step allocates nothing once its memory is reserved. Alone in its binary: the allocator counts for all threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use ops::sample::{SampleOutput, SampleRow, SamplingParams};
use ops::{Backend, Batch, BlockIndex, DType, HeadShape, KvGeometry, SequenceRows, WeightView};
use sparseserve_ops_cpu::{CpuBackend, CpuOptions};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HEADS: HeadShape = HeadShape { q_heads: 8, kv_heads: 2, head_dim: 64 };
const HIDDEN: usize = 256;
const VOCAB: usize = 500;

fn linear(backend: &mut CpuBackend, rows: usize, cols: usize) -> <CpuBackend as Backend>::Linear {
    let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| ((i % 17) as f32 * 0.01).to_le_bytes()).collect();
    let view = WeightView { dtype: DType::F32, rows, cols, bytes: &bytes };
    backend.linear(&[view], &[], DType::Bf16).expect("memory")
}

#[test]
fn a_mixed_step_allocates_nothing() {
    let mut backend = CpuBackend::new(CpuOptions { threads: Some(4), isa: None }).expect("a backend");
    let geometry =
        KvGeometry { num_layers: 1, kv_heads: 2, head_dim: 64, page_tokens: 16, dtype: DType::Bf16 };
    // A decode at 1500 tokens and a chunk of a prompt.
    let blocks = geometry.blocks(1500) as u32;
    let sequences = [
        SequenceRows {
            rows: 0..1,
            first_position: 1499,
            prompt_len: 10,
            blocks: 0..blocks,
            attention: Default::default(),
            seat: ops::SeatIndex(0),
            quota: 0,
        },
        SequenceRows {
            rows: 1..41,
            first_position: 600,
            prompt_len: 640,
            blocks: blocks..blocks + 40,
            attention: Default::default(),
            seat: ops::SeatIndex(0),
            quota: 0,
        },
    ];
    let tables: Vec<BlockIndex> = (0..blocks + 40).map(BlockIndex).collect();
    let positions: Vec<u32> = [1499].into_iter().chain(600..640).collect();
    let tokens = vec![7u32; positions.len()];
    let rows = tokens.len();
    let batch = Batch {
        tokens: &tokens,
        positions: &positions,
        sequences: &sequences,
        block_tables: &tables,
        methods: &[],
    };

    let held = |backend: &mut CpuBackend| backend.reserve(HEADS, rows, 2, 1600, 1024).expect("memory");
    let reserved = held(&mut backend);
    let mut kv = backend.kv(geometry, tables.len(), 0, None).expect("memory");
    let embedding = linear(&mut backend, VOCAB, HIDDEN);
    let qkv_weights = linear(&mut backend, HEADS.qkv_cols(), HIDDEN);
    let output_weights = linear(&mut backend, HIDDEN, HEADS.q_cols());
    let gate_up_weights = linear(&mut backend, 2048, HIDDEN);
    let down_weights = linear(&mut backend, HIDDEN, 1024);
    let ones: Vec<u8> = (0..HIDDEN).flat_map(|_| 1f32.to_le_bytes()).collect();
    let view = WeightView { dtype: DType::F32, rows: 1, cols: HIDDEN, bytes: &ones };
    let norm = backend.vector(view).expect("memory");
    let head_norm = backend.vector(WeightView { cols: 64, bytes: &ones[..256], ..view }).expect("memory");
    let mut tensor = |cols| backend.tensor(rows, cols).expect("memory");
    let (mut x, mut normed, mut attended) = (tensor(HIDDEN), tensor(HIDDEN), tensor(HEADS.q_cols()));
    let (mut qkv, mut angles) = (tensor(HEADS.qkv_cols()), tensor(64));
    let (mut gate_up, mut hidden) = (tensor(2048), tensor(1024));
    let (mut chosen, mut logits) = (tensor(HIDDEN), tensor(VOCAB));
    let params = SamplingParams { top_p: 0.9, repetition_penalty: 1.1, ..Default::default() };
    let row = |row| SampleRow {
        row,
        params: &params,
        prompt: &[1, 2],
        generated: &[3],
        banned: &[],
        position: 5,
        top_logprobs: Some(3),
        forced: None,
    };
    let sample_rows = [row(0), row(1)];
    let mut sampled = SampleOutput::default();
    let sets = vec![0u32; rows];

    // The first step warms up sampling, which sees the size of the vocabulary only then.
    for step in 0..20 {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        backend.embed(&mut x, &embedding, &tokens);
        backend.rope_angles(&mut angles, &positions, &[0.1; 32], &sets, 1.0);
        backend.rms_norm(&mut normed, &x, &norm, 1e-6);
        backend.linear_forward(&mut qkv, &normed, &qkv_weights);
        let qk_norm = Some((&head_norm, &head_norm, 1e-6));
        backend.append(&mut kv, 0, &mut qkv, HEADS, qk_norm, &angles, &batch);
        backend.attend(&mut attended, None, &kv, 0, &qkv, HEADS, None, &batch, None, 0);
        backend.linear_add(&mut x, &attended, &output_weights);
        backend.rms_norm(&mut normed, &x, &norm, 1e-6);
        backend.linear_forward(&mut gate_up, &normed, &gate_up_weights);
        backend.swiglu(&mut hidden, &gate_up);
        backend.linear_add(&mut x, &hidden, &down_weights);
        backend.select_rows(&mut chosen, &x, &[0, 40]);
        backend.linear_forward(&mut logits, &chosen, &embedding);
        backend.sample(&mut sampled, &logits, &sample_rows);
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert!(step == 0 || allocations == 0, "step {step} allocates {allocations} times");
    }
    assert_eq!(held(&mut backend), reserved, "scratch was reserved in full");
}
