//! `sparseserve eval selection`: what a policy selects from given keys and queries, and what attention makes of it.

use std::collections::HashMap;
use std::path::Path;

use model::{GateModel, Rope, RopeConfig, RopeScaling};
use ops::cluster::{self, ClusterLayout};
use ops::sparse::{Attention, DigestSpec, Method, Scope, Score, SelectionLimits};
use ops::{
    Backend, Batch, BlockIndex, DType, Gate, HeadShape, KvGeometry, PAGE_TOKENS_ALLOWED, SeatIndex,
    SequenceRows,
};
use ops_cpu::{CpuBackend, CpuOptions};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sparse::{Budget, Options, Served};

use crate::cli::commands::EvalSelectionArgs;
use crate::cli::failure::Failure;

/// A decode step of one layer.
struct Step {
    heads: HeadShape,
    tokens: usize,
    /// Slots per page.
    page_tokens: usize,
    /// `[tokens, kv_heads, head_dim]`.
    k: Vec<f32>,
    v: Vec<f32>,
    /// `[q_heads, head_dim]`.
    q: Vec<f32>,
    /// Of the policy, if it needs one.
    gate: Option<Gate>,
}

/// Runs the command.
pub fn run(args: &EvalSelectionArgs) -> Result<(), Failure> {
    let bad = |what: String| Failure::input(format!("{}: {what}", args.input.display()));
    let bytes = std::fs::read(&args.input).map_err(|e| bad(e.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    if !PAGE_TOKENS_ALLOWED.contains(&args.page_tokens) {
        return Err(Failure::input(format!("--page-tokens is one of {PAGE_TOKENS_ALLOWED:?}")));
    }
    let mut step = Step::read(&file, args.page_tokens).map_err(bad)?;
    let told = |flag: &Option<String>, key: &str| flag.clone().or_else(|| metadata.get(key).cloned());
    let policy =
        told(&args.policy, "policy").ok_or_else(|| bad("no --policy, nor one in its metadata".into()))?;
    let budget =
        told(&args.budget, "budget").ok_or_else(|| bad("no --budget, nor one in its metadata".into()))?;
    let budget: Budget = budget.parse().map_err(Failure::input)?;
    let prompt_tokens = match metadata.get("prompt_tokens") {
        None => step.tokens - 1,
        Some(text) => text.parse().map_err(|_| bad(format!("prompt_tokens is {text:?}")))?,
    };
    let options = match &args.policy_opt {
        Some(given) => given.join(","),
        None => metadata.get("options").cloned().unwrap_or_default(),
    };
    let options = Options::parse(&options).map_err(Failure::input)?;
    let served = Served::new([policy.as_str()], &options).map_err(Failure::input)?;
    if served.gate().is_some() {
        // Its weights are in the file, beside what they score.
        let theta = metadata.get("rope_theta").and_then(|text| text.parse().ok());
        let theta = theta.ok_or_else(|| bad("a gate needs rope_theta in its metadata".into()))?;
        let head_dim = step.heads.head_dim;
        let scaling = RopeScaling::Default;
        let rope = RopeConfig { theta, head_dim, max_position_embeddings: step.tokens, scaling };
        let model = GateModel { heads: step.heads, windows: &[None], rope: &Rope::new(&rope) };
        step.gate = Some(model::gate_of(&args.input.display().to_string(), &bytes, model)?);
    }
    let choice = served.method(None, &Options::default()).map_err(Failure::input)?;
    let (_, method) = choice.for_prompt(usize::MAX);
    // A token of the prompt would attend to everything.
    let prompt_tokens = prompt_tokens.min(step.tokens - 1);
    let found = step.attend(&served, method, budget.tokens(prompt_tokens), prompt_tokens)?;
    found.write(&args.out, &step)
}

impl Step {
    fn read(file: &SafeTensors, page_tokens: usize) -> Result<Self, String> {
        let tensor = |name: &str, rank: usize| {
            let tensor = file.tensor(name).map_err(|e| format!("{name}: {e}"))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape().len() != rank {
                return Err(format!("{name} must be f32 with {rank} dimensions"));
            }
            let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            Ok((values.collect::<Vec<f32>>(), tensor.shape().to_vec()))
        };
        let ((k, shape), (v, shape_v), (q, shape_q)) = (tensor("k", 3)?, tensor("v", 3)?, tensor("q", 2)?);
        let (tokens, kv_heads, head_dim) = (shape[0], shape[1], shape[2]);
        let q_heads = shape_q[0];
        let fits = shape == shape_v && shape_q[1] == head_dim && tokens > 0 && kv_heads > 0;
        if !fits || q_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
            return Err(format!("k {shape:?}, v {shape_v:?} and q {shape_q:?} do not fit each other"));
        }
        Ok(Step {
            heads: HeadShape { q_heads, kv_heads, head_dim },
            tokens,
            page_tokens,
            k,
            v,
            q,
            gate: None,
        })
    }

    /// Runs the operations of a decode step on the CPU backend in f32.
    fn attend(
        &self,
        served: &Served,
        method: Option<Method>,
        budget: u32,
        prompt_tokens: usize,
    ) -> Result<Found, Failure> {
        let Step { heads, tokens, page_tokens, .. } = *self;
        let HeadShape { kv_heads, head_dim, .. } = heads;
        let geometry = KvGeometry { num_layers: 1, kv_heads, head_dim, page_tokens, dtype: DType::F32 };
        let num_blocks = geometry.blocks(tokens);
        let mut backend = CpuBackend::new(CpuOptions::default())?;
        backend.reserve(heads, 1, 1, tokens, heads.qkv_cols())?;
        let mut kv = backend.kv(geometry, num_blocks, DigestSpec::copies(served.digests()), None)?;
        let table: Vec<BlockIndex> = (0..num_blocks as u32).map(BlockIndex).collect();
        for (i, &block) in table.iter().enumerate() {
            for head in 0..kv_heads {
                let page = |values: &[f32]| -> Vec<f32> {
                    let slot = |p: usize| {
                        (p < tokens).then(|| &values[(p * kv_heads + head) * head_dim..][..head_dim])
                    };
                    let zeros = vec![0.0; head_dim];
                    let positions = i * page_tokens..(i + 1) * page_tokens;
                    positions.flat_map(|p| slot(p).unwrap_or(&zeros).to_vec()).collect()
                };
                backend.write_page(&mut kv, 0, block, head, &page(&self.k), &page(&self.v));
            }
        }
        let position = tokens as u32 - 1;
        let positions = [position];
        let (mut digests, methods) = (Vec::new(), Vec::from_iter(method));
        for spec in served.digests() {
            let spec = spec.with_gate(self.gate.as_ref());
            let mut made = backend.digests(spec, geometry, num_blocks, None, self.gate.as_ref())?;
            let positions: Vec<u32> = (0..=position).collect();
            let prompt = rows(0, tokens, tokens, page_tokens, Attention::Dense);
            let batch = batch(&positions, &positions, std::slice::from_ref(&prompt), &table, &methods);
            backend.digest(&mut made, &mut kv, 0, &batch);
            digests.push(made);
        }
        let mut qkv = backend.tensor(1, heads.qkv_cols())?;
        let mut values = self.q.clone();
        values.resize(heads.qkv_cols(), 0.0);
        backend.upload(&mut qkv, &values);
        let mut out = backend.tensor(1, heads.q_cols())?;
        let mut lse = backend.tensor(1, heads.q_heads)?;
        let dense = rows(position, 1, tokens, page_tokens, Attention::Dense);
        let dense = batch(&[0], &positions, std::slice::from_ref(&dense), &table, &methods);
        backend.attend(&mut out, Some(&mut lse), &kv, 0, &qkv, heads, None, &dense, None, 0);
        let dense = Attended { out: backend.row(&out, 0).to_vec(), lse: backend.row(&lse, 0).to_vec() };
        let everything = || (0..tokens).collect::<Vec<usize>>();
        let all = vec![everything(); kv_heads];
        let Some(method) = method else {
            return Ok(Found { indices: all, sparse: dense.clone(), dense });
        };
        let limits = SelectionLimits::new(&[method], heads, page_tokens, 1, tokens);
        let (mut selection, _) = backend.selection(limits)?;
        let sparse = rows(position, 1, prompt_tokens, page_tokens, Attention::Sparse { method: 0, budget });
        let sparse = batch(&[0], &positions, std::slice::from_ref(&sparse), &table, &methods);
        backend.score(&mut selection, &digests, &kv, 0, &qkv, heads, &sparse);
        backend.select(&mut selection, &digests, 0, heads, &sparse);
        backend.attend(&mut out, Some(&mut lse), &kv, 0, &qkv, heads, None, &sparse, Some(&selection), 0);
        let ordered = method.plan(tokens, prompt_tokens, budget as usize).ordered;
        let mut indices = Vec::with_capacity(kv_heads);
        for head in 0..kv_heads {
            let Some(bits) = backend.read_selection(&selection, 0, head) else {
                indices.push(everything());
                continue;
            };
            let slots = (0..tokens).filter(|slot| bits[slot / 64] >> (slot % 64) & 1 == 1);
            let first_tokens = match method.score {
                Score::Digest { digests: index } if ordered.end > 0 => {
                    let (spec, digests) = (served.digests()[index as usize], &digests[index as usize]);
                    let read = |block| backend.read_digests(digests, 0, block, head);
                    in_order_of_clusters(spec, geometry, &table, ordered.end, read)
                }
                _ => Vec::new(),
            };
            let mut tokens: Vec<usize> =
                slots.map(|slot| first_tokens.get(slot).copied().unwrap_or(slot)).collect();
            tokens.sort_unstable();
            indices.push(tokens);
            if method.scope == Scope::Layer {
                break;
            }
        }
        let sparse = Attended { out: backend.row(&out, 0).to_vec(), lse: backend.row(&lse, 0).to_vec() };
        Ok(Found { indices, sparse, dense })
    }
}

/// The token in each of the first `end` slots of the copy in the order of clusters; `digests` reads those of a block.
fn in_order_of_clusters(
    spec: DigestSpec,
    geometry: KvGeometry,
    table: &[BlockIndex],
    end: usize,
    mut digests: impl FnMut(BlockIndex) -> Vec<f32>,
) -> Vec<usize> {
    let KvGeometry { head_dim, page_tokens, .. } = geometry;
    let (length, width, span) = (spec.partition_tokens, spec.width(head_dim), spec.made_together());
    let ids_at = ClusterLayout { head_dim }.ids_at();
    let mut ids = Vec::with_capacity(end);
    for last in (length - 1..end).step_by(length) {
        let of_block = digests(table[last / page_tokens]);
        let within = if length < page_tokens { last % page_tokens / length } else { 0 };
        ids.extend(of_block[within * width + ids_at..][..length].iter().map(|&id| id as u16));
    }
    let (mut tokens, mut of_span) = (Vec::with_capacity(end), vec![0; span]);
    for (i, ids) in ids.chunks_exact(span).enumerate() {
        cluster::order(ids, span / length, &mut of_span);
        tokens.extend(of_span.iter().map(|&token| i * span + usize::from(token)));
    }
    tokens
}

fn rows(
    first_position: u32,
    count: usize,
    prompt_tokens: usize,
    page_tokens: usize,
    attention: Attention,
) -> SequenceRows {
    let prompt_len = prompt_tokens as u32;
    let blocks = 0..(first_position + count as u32).div_ceil(page_tokens as u32);
    SequenceRows {
        rows: 0..count as u32,
        first_position,
        prompt_len,
        blocks,
        attention,
        seat: SeatIndex(0),
        quota: 0,
    }
}

fn batch<'a>(
    tokens: &'a [u32],
    positions: &'a [u32],
    sequences: &'a [SequenceRows],
    block_tables: &'a [BlockIndex],
    methods: &'a [Method],
) -> Batch<'a> {
    Batch { tokens, positions, sequences, block_tables, methods }
}

/// What attention made of a query.
#[derive(Clone)]
struct Attended {
    /// `[q_heads, head_dim]`.
    out: Vec<f32>,
    /// `ln sum exp(q . k / sqrt(head_dim))` of each query head over all that it attends to.
    lse: Vec<f32>,
}

/// What came out.
struct Found {
    /// Attended positions of each KV head, or of all of them where they share a selection, ascending.
    indices: Vec<Vec<usize>>,
    sparse: Attended,
    dense: Attended,
}

impl Found {
    fn write(&self, path: &Path, step: &Step) -> Result<(), Failure> {
        let HeadShape { q_heads, head_dim, .. } = step.heads;
        let mut indptr = vec![0i64];
        for indices in &self.indices {
            indptr.push(indptr[indptr.len() - 1] + indices.len() as i64);
        }
        let indices: Vec<i64> = self.indices.iter().flatten().map(|&p| p as i64).collect();
        let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let ints = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let (indptr_bytes, indices_bytes) = (ints(&indptr), ints(&indices));
        let (out, out_dense) = (floats(&self.sparse.out), floats(&self.dense.out));
        let (lse, lse_dense) = (floats(&self.sparse.lse), floats(&self.dense.lse));
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes);
        let heads = [q_heads, head_dim];
        let tensors = [
            ("indptr", view(Dtype::I64, &[indptr.len()], &indptr_bytes)),
            ("indices", view(Dtype::I64, &[indices.len()], &indices_bytes)),
            ("out", view(Dtype::F32, &heads, &out)),
            ("out_dense", view(Dtype::F32, &heads, &out_dense)),
            ("lse", view(Dtype::F32, &[q_heads], &lse)),
            ("lse_dense", view(Dtype::F32, &[q_heads], &lse_dense)),
        ];
        let mut views = HashMap::new();
        for (name, tensor) in tensors {
            views.insert(name, tensor.map_err(Failure::runtime)?);
        }
        safetensors::serialize_to_file(views, None, path)
            .map_err(|e| Failure::input(format!("{}: {e}", path.display())))
    }
}
