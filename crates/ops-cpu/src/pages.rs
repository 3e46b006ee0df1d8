//! KV pages: their layout, and writing to them.
//!
//! A page holds K, then V, of `page_tokens` slots, each in *runs* of 8 slots. Both are right operands of the register tile, so
//! they lie as packed weights do: a run of K with slots as outputs, `[head_dim / 2][8][2]` in bf16 and `[head_dim][8]` otherwise;
//! one of V with channels as outputs, `[4][head_dim][2]` and `[8][head_dim]`. One instruction then scores two runs, with no sum
//! across lanes; they need not lie side by side, so what is not selected is not read.

use std::marker::PhantomData;

use half::{bf16, f16};
use ops::cluster::OrderedCopy;
use ops::tier::TierSpec;
use ops::{
    Batch, BlockIndex, DType, Error, HeadShape, KvGeometry, PAGE_TOKENS_ALLOWED, SeatIndex, SequenceRows,
    Tensor,
};

use crate::isa::{Isa, Kernel};
use crate::memory::{Buffer, Shared};
use crate::pack::{Vector, k_per_step};
use crate::pool::Pool;
use crate::rows::rms_norm_row;
use crate::simd::{LANES, Simd};
use crate::tally::Tally;
use crate::tensor::CpuTensor;
use crate::tier::Tier;
use crate::tile::{Bf16, Element, F16, F32};

/// Slots that are read or left alone together: those of the smallest page.
pub const RUN: usize = 8;

/// Widest head.
pub const HEAD_DIM_MAX: usize = 256;

/// The KV cache: the pool in DRAM, and an HBM tier where there is one apart from it.
#[derive(Debug)]
pub struct Kv {
    /// Before the pool, so that it is dropped first: its saver writes to the pool.
    pub(crate) tier: Option<Box<Tier>>,
    pub(crate) dram: Layers,
    /// What selections come to, where they are counted.
    pub(crate) tally: Option<Tally>,
}

/// The pages of all layers in DRAM: one allocation per layer, then block, then head. Copies in the order of clusters lie behind those
/// of the pool.
#[derive(Debug)]
pub struct Layers {
    geometry: KvGeometry,
    /// With those of copies.
    num_blocks: usize,
    pool_blocks: usize,
    layers: Vec<Buffer<u8>>,
}

impl Kv {
    /// A pool of `num_blocks` blocks, all zero, and as many in each of the `copies`, with an HBM tier if `tier` says so.
    ///
    /// # Errors
    /// Pages or heads that are not supported; too small a tier; memory.
    pub fn new(
        geometry: KvGeometry,
        num_blocks: usize,
        copies: usize,
        tier: Option<TierSpec>,
    ) -> Result<Self, Error> {
        let dram = Layers::new(geometry, num_blocks, copies)?;
        assert!(tier.is_none_or(|spec| spec.copies == copies), "a tier for the copies of the pool");
        let tier = tier.map(|spec| Tier::new(spec, geometry, num_blocks).map(Box::new)).transpose()?;
        Ok(Kv { tier, dram, tally: None })
    }

    /// Shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.dram.geometry
    }

    /// The bytes of a page from which digests are made: its local copy, or that in DRAM.
    pub fn digest_page(&self, layer: usize, of: Pages, page: usize, head: usize) -> &[u8] {
        let local = self.tier.as_ref().and_then(|tier| tier.local_page(of.seat, layer, page, head));
        local.unwrap_or_else(|| {
            if let Some(tier) = &self.tier {
                tier.check_clean(of.seat, layer, page);
            }
            self.dram.page_bytes(layer, of.table[page], head)
        })
    }

    /// Offset of the pages of `page` of a sequence, head by head, in what [`Kv::shared`] points to.
    fn write_offset(&self, layer: usize, of: Pages, page: usize) -> usize {
        match &self.tier {
            Some(tier) => tier.local_offset(of.seat, layer, page),
            None => self.dram.offset(of.table[page], 0),
        }
    }

    /// Where tokens of a layer are written, for the tasks of a fork.
    fn shared(&mut self, layer: usize) -> Shared<u8> {
        match &mut self.tier {
            Some(tier) => tier.shared(),
            None => self.dram.shared(layer),
        }
    }
}

/// The pages of a sequence: where they lie in DRAM, and its seat.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    /// Block table.
    pub table: &'a [BlockIndex],
    /// Seat.
    pub seat: SeatIndex,
}

impl<'a> Pages<'a> {
    /// Those of `sequence`.
    pub fn of(batch: &Batch<'a>, sequence: &SequenceRows) -> Self {
        Pages { table: batch.block_table(sequence), seat: sequence.seat }
    }
}

impl Layers {
    fn new(geometry: KvGeometry, pool_blocks: usize, copies: usize) -> Result<Self, Error> {
        let KvGeometry { head_dim, page_tokens, .. } = geometry;
        if !PAGE_TOKENS_ALLOWED.contains(&page_tokens) {
            return Err(Error::Unsupported(format!(
                "pages of {page_tokens} tokens; 8, 16, 32 and 64 are possible"
            )));
        }
        if head_dim == 0 || head_dim > HEAD_DIM_MAX || !head_dim.is_multiple_of(2) {
            return Err(Error::Unsupported(format!(
                "a head of {head_dim} channels; even numbers up to {HEAD_DIM_MAX} are possible"
            )));
        }
        let num_blocks = pool_blocks.saturating_mul(1 + copies);
        if num_blocks > u32::MAX as usize {
            return Err(Error::Unsupported(format!("{num_blocks} blocks; a --dram of fewer is possible")));
        }
        let layer_bytes = num_blocks.saturating_mul(geometry.kv_heads * geometry.page_bytes());
        let layers = (0..geometry.num_layers).map(|_| Buffer::zeroed(layer_bytes, "KV cache"));
        Ok(Layers { geometry, num_blocks, pool_blocks, layers: layers.collect::<Result<_, _>>()? })
    }

    /// Offset of a page in its layer.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    pub fn offset(&self, block: BlockIndex, head: usize) -> usize {
        assert!(
            block.at() < self.num_blocks && head < self.geometry.kv_heads,
            "{block:?} of {}",
            self.num_blocks
        );
        (block.at() * self.geometry.kv_heads + head) * self.geometry.page_bytes()
    }

    /// `block`, or its place in `copy`.
    #[inline(always)]
    pub fn block_in(&self, copy: Option<OrderedCopy>, block: BlockIndex) -> BlockIndex {
        copy.map_or(block, |copy| copy.block(block, self.pool_blocks))
    }

    /// Start of a page.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    pub fn page(&self, layer: usize, block: BlockIndex, head: usize) -> *const u8 {
        // SAFETY: `offset` checked that the page lies in the layer.
        unsafe { self.layers[layer].as_ptr().add(self.offset(block, head)) }
    }

    /// The start of a layer, for the tasks of a fork.
    pub fn shared(&mut self, layer: usize) -> Shared<u8> {
        Shared(self.layers[layer].as_mut_ptr())
    }

    /// The bytes of a page.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn page_bytes(&self, layer: usize, block: BlockIndex, head: usize) -> &[u8] {
        // SAFETY: a page of the layer, as `offset` checked. Only the page is borrowed: others may be on their way to DRAM.
        unsafe { std::slice::from_raw_parts(self.page(layer, block, head), self.geometry.page_bytes()) }
    }

    /// Bytes from the start of a page to its V.
    pub fn value_offset(&self) -> usize {
        self.geometry.page_bytes() / 2
    }

    /// The pages of a block, of all heads.
    pub fn block(&self, layer: usize, block: BlockIndex) -> &[u8] {
        let bytes = self.geometry.kv_heads * self.geometry.page_bytes();
        // SAFETY: the pages of all heads of a block follow one another.
        unsafe { std::slice::from_raw_parts(self.page(layer, block, 0), bytes) }
    }

    /// The pages of `run` blocks from `block` on.
    pub fn run_mut(&mut self, layer: usize, block: BlockIndex, run: usize) -> &mut [u8] {
        let bytes = run * self.geometry.kv_heads * self.geometry.page_bytes();
        let (first, last) = (self.offset(block, 0), BlockIndex(block.0 + run as u32 - 1));
        assert!(self.offset(last, 0) >= first, "a run of blocks");
        // SAFETY: the blocks from the first to the last, which `offset` checked, and this borrows the pool alone. Pages
        // outside of the run may be on their way to DRAM and are not borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.layers[layer].as_mut_ptr().add(first), bytes) }
    }

    /// Element of a page that holds channel `c` of K at `slot`.
    pub(crate) fn key_element(&self, slot: usize, c: usize) -> usize {
        let per_step = k_per_step(self.geometry.dtype);
        slot / RUN * RUN * self.geometry.head_dim
            + (c / per_step * RUN + slot % RUN) * per_step
            + c % per_step
    }

    /// Element of a page that holds channel `c` of V at `slot`.
    pub fn value_element(&self, slot: usize, c: usize) -> usize {
        let per_step = k_per_step(self.geometry.dtype);
        let half = self.geometry.page_tokens * self.geometry.head_dim;
        half + (slot / per_step * self.geometry.head_dim + c) * per_step + slot % per_step
    }

    /// Copies what a slot of a page holds to a slot of another one.
    pub fn copy_slot(&self, from: &[u8], from_slot: usize, to: &mut [u8], to_slot: usize) {
        let KvGeometry { head_dim, dtype, .. } = self.geometry;
        let bytes = dtype.bytes();
        let run = k_per_step(dtype) * bytes;
        // Channels of K lie side by side as far as one step of a product goes.
        for c in (0..head_dim).step_by(k_per_step(dtype)) {
            let (from_at, to_at) =
                (self.key_element(from_slot, c) * bytes, self.key_element(to_slot, c) * bytes);
            to[to_at..to_at + run].copy_from_slice(&from[from_at..from_at + run]);
        }
        for c in 0..head_dim {
            let (from_at, to_at) =
                (self.value_element(from_slot, c) * bytes, self.value_element(to_slot, c) * bytes);
            to[to_at..to_at + bytes].copy_from_slice(&from[from_at..from_at + bytes]);
        }
    }

    /// Writes K and V (`[page_tokens, head_dim]`) of a page.
    pub fn write_page(&mut self, layer: usize, block: BlockIndex, head: usize, k: &[f32], v: &[f32]) {
        let KvGeometry { head_dim, page_tokens, dtype, .. } = self.geometry;
        assert_eq!((k.len(), v.len()), (page_tokens * head_dim, page_tokens * head_dim), "a whole page");
        let offset = self.offset(block, head);
        for slot in 0..page_tokens {
            for c in 0..head_dim {
                let key = self.key_element(slot, c);
                let value = self.value_element(slot, c);
                let page = &mut self.layers[layer].as_mut_slice()[offset..];
                write(page, key, dtype, k[slot * head_dim + c]);
                write(page, value, dtype, v[slot * head_dim + c]);
            }
        }
    }

    /// K and V (`[page_tokens, head_dim]`) of a page.
    pub fn read_page(&self, layer: usize, block: BlockIndex, head: usize) -> (Vec<f32>, Vec<f32>) {
        let KvGeometry { head_dim, page_tokens, dtype, .. } = self.geometry;
        let page = &self.layers[layer].as_slice()[self.offset(block, head)..];
        let places = || (0..page_tokens).flat_map(|slot| (0..head_dim).map(move |c| (slot, c)));
        let k = places().map(|(slot, c)| dtype.read(page, self.key_element(slot, c))).collect();
        let v = places().map(|(slot, c)| dtype.read(page, self.value_element(slot, c))).collect();
        (k, v)
    }
}

fn write(page: &mut [u8], element: usize, dtype: DType, value: f32) {
    let at = element * dtype.bytes();
    match dtype {
        DType::F32 => page[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        DType::F16 => page[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        DType::Bf16 => page[at..at + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}

/// Normalisation of the heads of q and k: weights of each, and epsilon.
pub type QkNorm<'a> = Option<(&'a Vector, &'a Vector, f32)>;

/// Normalises and rotates q and k in place and writes k and v to the open pages. A task is what one sequence writes to
/// one block, so no two tasks touch a page.
pub fn append(
    isa: Isa,
    pool: &mut Pool,
    kv: &mut Kv,
    layer: usize,
    qkv: &mut CpuTensor,
    heads: HeadShape,
    qk_norm: QkNorm,
    angles: &CpuTensor,
    batch: &Batch,
) {
    let KvGeometry { head_dim, page_tokens, dtype, .. } = *kv.geometry();
    assert_eq!((heads.kv_heads, heads.head_dim), (kv.geometry().kv_heads, head_dim), "heads of the cache");
    assert_eq!((qkv.rows(), qkv.cols()), (batch.num_rows(), heads.qkv_cols()), "shape of QKV");
    assert_eq!((angles.rows(), angles.cols()), (batch.num_rows(), head_dim), "shape of the angles");
    if let Some((q, k, _)) = qk_norm {
        assert_eq!((q.dim(), k.dim()), (head_dim, head_dim), "weights of the head norms");
    }
    batch.check(page_tokens);
    let blocks_of = |s: &SequenceRows| {
        let first = s.first_position as usize / page_tokens;
        (first, s.context_tokens().div_ceil(page_tokens))
    };
    for s in batch.sequences {
        let blocks = &batch.block_table(s)[..blocks_of(s).1];
        assert!(blocks.iter().all(|b| b.at() < kv.dram.pool_blocks), "blocks of the pool");
    }
    if let Some(tier) = &mut kv.tier {
        tier.localize(&kv.dram, layer, batch);
    }
    let num_tasks = batch.sequences.iter().map(blocks_of).map(|(first, end)| end - first).sum();
    let (stride, rows) = (qkv.stride(), qkv.shared());
    let (value_offset, page_bytes) = (kv.dram.value_offset(), kv.geometry().page_bytes());
    let pages = kv.shared(layer);
    let kv = &*kv;
    pool.run(num_tasks, &|task, _| {
        let mut task = task;
        // Sequences are few and this search is short; a table of first tasks would have to be kept somewhere.
        let mut found = None;
        for s in batch.sequences {
            let (first, end) = blocks_of(s);
            if task < end - first {
                found = Some((s, first + task));
                break;
            }
            task -= end - first;
        }
        let (s, block) = found.expect("every task is a block of a sequence");
        let block_start = block * page_tokens;
        let positions =
            block_start.max(s.first_position as usize)..(block_start + page_tokens).min(s.context_tokens());
        let page = kv.write_offset(layer, Pages::of(batch, s), block);
        for position in positions {
            let row = s.rows.start as usize + position - s.first_position as usize;
            // SAFETY: the row and the pages of the block belong to this task alone; shapes were checked above.
            unsafe {
                let append = AppendRow {
                    qkv: rows.at(row * stride),
                    angles: angles.row(row).as_ptr(),
                    heads,
                    qk_norm,
                    page: pages.at(page),
                    page_bytes,
                    value_offset,
                    slot: position - block_start,
                };
                match dtype {
                    DType::Bf16 => isa.run(AppendAs(append, PhantomData::<Bf16>)),
                    DType::F16 => isa.run(AppendAs(append, PhantomData::<F16>)),
                    DType::F32 => isa.run(AppendAs(append, PhantomData::<F32>)),
                }
            }
        }
    });
}

/// One row on its way to its slot. All pointers are valid for the shape.
struct AppendRow<'a> {
    qkv: *mut f32,
    angles: *const f32,
    heads: HeadShape,
    qk_norm: QkNorm<'a>,
    /// The page of KV head 0; those of the other heads follow.
    page: *mut u8,
    page_bytes: usize,
    value_offset: usize,
    slot: usize,
}

struct AppendAs<'a, E>(AppendRow<'a>, PhantomData<E>);

impl<E: Element> Kernel for AppendAs<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let a = self.0;
        let HeadShape { q_heads, kv_heads, head_dim } = a.heads;
        // SAFETY: q heads, then k heads, then v heads lie in the row; the page is as long as `page_bytes` per head.
        unsafe {
            for head in 0..q_heads + kv_heads {
                let values = a.qkv.add(head * head_dim);
                if let Some((q, k, eps)) = a.qk_norm {
                    let weight = if head < q_heads { q } else { k };
                    rms_norm_row(s, values, values, weight.padded().as_ptr(), head_dim, eps);
                }
                rotate(s, values, a.angles, head_dim);
            }
            for head in 0..kv_heads {
                let page = a.page.add(head * a.page_bytes);
                if a.slot == 0 {
                    page.write_bytes(0, a.page_bytes);
                }
                let k = a.qkv.add((q_heads + head) * head_dim);
                let v = a.qkv.add((q_heads + kv_heads + head) * head_dim);
                let per_step = E::K_PER_STEP;
                // As `Layers::key_element` says.
                let first = a.slot / RUN * RUN * head_dim + a.slot % RUN * per_step;
                scatter::<S, E>(s, page, k, head_dim, first, per_step, RUN * per_step);
                // As `Layers::value_element` says.
                let first = a.slot / per_step * head_dim * per_step + a.slot % per_step;
                scatter::<S, E>(s, page.add(a.value_offset), v, head_dim, first, 1, per_step);
            }
        }
    }
}

/// Rotates the pairs `(c, c + head_dim / 2)` by `[cos | sin]`.
///
/// # Safety
/// `values` and `angles` are valid for `head_dim` values.
#[inline(always)]
unsafe fn rotate<S: Simd>(s: S, values: *mut f32, angles: *const f32, head_dim: usize) {
    let half = head_dim / 2;
    let mut c = 0;
    while c < half {
        let n = (half - c).min(LANES);
        // SAFETY: `c + n <= half`.
        unsafe {
            let (x, y) = (s.load_part(values.add(c), n), s.load_part(values.add(half + c), n));
            let (cos, sin) = (s.load_part(angles.add(c), n), s.load_part(angles.add(half + c), n));
            let rotated_x = s.sub(s.mul(x, cos), s.mul(y, sin));
            let rotated_y = s.add(s.mul(y, cos), s.mul(x, sin));
            s.store_part(values.add(c), rotated_x, n);
            s.store_part(values.add(half + c), rotated_y, n);
        }
        c += LANES;
    }
}

/// Writes `len` values as elements: value `c` goes to element `first + c / run * stride + c % run`.
///
/// # Safety
/// `values` is valid for `len` values and `to` for those elements.
#[inline(always)]
unsafe fn scatter<S: Simd, E: Element>(
    s: S,
    to: *mut u8,
    values: *const f32,
    len: usize,
    first: usize,
    run: usize,
    stride: usize,
) {
    let element = E::VECTOR_BYTES / LANES / E::K_PER_STEP;
    let mut converted = [0u32; LANES];
    let mut c = 0;
    while c < len {
        let n = (len - c).min(LANES);
        // SAFETY: the buffer holds 16 elements of up to 4 bytes; the rest is the caller's promise. `element * run` is 2
        // or 4 and all places are aligned to it, as pages are.
        unsafe {
            E::store_right(s, converted.as_mut_ptr().cast(), s.load_part(values.add(c), n));
            let mut i = 0;
            while i < n {
                let place = to.add((first + (c + i) / run * stride) * element);
                if element * run == 4 {
                    place.cast::<u32>().write(*converted.as_ptr().byte_add(i * element));
                } else {
                    place.cast::<u16>().write(*converted.as_ptr().cast::<u16>().add(i));
                }
                i += run;
            }
        }
        c += LANES;
    }
}
