//! Matrix products: one path for one row and for thousands.
//!
//! A task is one panel of 64 outputs times a block of rows. Within it a slice of the panel, `K_BLOCK` deep, meets
//! all rows of the block before the next slice; sums that are not finished wait in a buffer of the thread. With
//! one row that is a stream through the panel.
//!
//! Measured on four cores of Zen 4 in bf16, as fractions of the machine's own ceiling in the same round (`bench`, otherwise
//! idle): one row reads weights at 0.95 to 1.0 of a memory bandwidth of 37 GB/s, 16 rows at 0.81 to 0.92, and 512 or 2048
//! rows reach 0.93 to 1.0 of the rate of the register tile alone. When memory gave 62 GB/s (and others were at work),
//! one row reached 0.76 to 0.84 of that and 16 rows 0.48 to 0.60. Tried, with others at work and in turns with the present
//! form (0.94 to 1.04): slices of 128 steps 0.95 to 1.0, no slices 0.84 to 1.1 (0.88 to 0.90 at 512 rows), blocks of 480
//! rows 0.64 to 0.75 at 512 rows (too few tasks), tiles of 4 rows 3 % less.
//!
//! Measured on two cores of a Xeon (Emerald Rapids), whose dot product of pairs takes two cycles: few rows wait for memory and
//! then for arithmetic, since the instructions that wait for a line leave no room for those that would ask for the next ones.
//! Fetched ahead, to the second-level cache 5 KiB and from there to the first 1 KiB before they are needed, lines overlap with
//! arithmetic: 4 rows of 1024 -> 6144 read at 0.84 (0.83 to 0.86) of a bandwidth of 28 GB/s instead of 0.45 to 0.50. At once to
//! the first cache, 4 KiB ahead, 0.77 (2, 8 and 16 KiB: 0.71 to 0.74); to the second alone 0.71; to the second 9 KiB ahead 0.80, 18
//! KiB ahead and to the first 2 KiB 0.85 and less evenly. One row, fetched to the first alone, went from 0.77 to 0.84 to 0.92, 16
//! rows from 0.23 to 0.31.

use ops::{DType, Tensor};

use crate::isa::{Isa, Kernel};
use crate::memory::{Buffer, LINE_BYTES, PerThread, Shared};
use crate::pack::{Linear, PANEL};
use crate::pool::Pool;
use crate::simd::{LANES, Simd};
use crate::tensor::{CpuTensor, odd_stride};
use crate::tile::{
    Bf16, Element, F16, F32, FetchNothing, FetchStream, RowTiles, accumulate, tile_vectors, with_tile,
};

/// Steps of k between two visits of the buffer of unfinished sums: 128 KiB of a panel, which the second-level cache
/// keeps for all rows of the block.
const STEPS_BLOCK: usize = 512;

/// Rows of one task: a multiple of every tile height, few enough that there are more tasks than threads.
const ROWS_BLOCK: usize = 120;

/// Rows beyond which packing the left operand is worth a fork.
const ROWS_PACKED_ALONE: usize = 8;

/// Rows up to which weights are fetched ahead: above this arithmetic hides what it takes to read them.
const STREAM_ROWS_MAX: usize = 16;

/// Bytes that they are fetched ahead, to the nearest cache.
const STREAM_AHEAD: usize = 1024;

/// Bytes from there to what is fetched to the second-level cache.
const STREAM_FAR: usize = 4096;

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `out = product`.
    Set,
    /// `out += product`.
    Add,
}

/// Memory of the products of one backend.
#[derive(Debug)]
pub struct Scratch {
    /// Left operands in bf16.
    left: Buffer<u32>,
    /// Unfinished sums per thread, `[ROWS_BLOCK][PANEL]`.
    partial: PerThread<Buffer<f32>>,
}

// SAFETY: any four bytes are a u32.
unsafe impl crate::memory::Plain for u32 {}

impl Scratch {
    /// Scratch for `threads` threads and nothing else yet.
    pub fn new(threads: usize) -> Result<Self, ops::Error> {
        let mut partial = Vec::with_capacity(threads);
        for _ in 0..threads {
            partial.push(Buffer::zeroed(ROWS_BLOCK * PANEL, "products")?);
        }
        let mut partial = partial.into_iter();
        let partial = PerThread::new(threads, || partial.next().expect("one buffer per thread"));
        Ok(Scratch { left: Buffer::zeroed(0, "products")?, partial })
    }

    /// Makes room for left operands of `rows` by `cols`; returns all bytes held.
    pub fn reserve(&mut self, rows: usize, cols: usize) -> Result<u64, ops::Error> {
        let needed = rows.saturating_mul(left_stride(cols));
        if self.left.len() < needed {
            self.left = Buffer::zeroed(needed, "left operands of products")?;
        }
        let partial: usize = self.partial.iter_mut().map(|p| p.len()).sum();
        Ok(((self.left.len() + partial) * 4) as u64)
    }
}

/// u32 pairs from one packed row to the next.
const fn left_stride(cols: usize) -> usize {
    odd_stride(cols.div_ceil(2), LANES)
}

/// `out = x w^T + b`, or added to `out`.
///
/// # Panics
/// When shapes do not fit.
pub fn product(
    isa: Isa,
    pool: &mut Pool,
    scratch: &mut Scratch,
    out: &mut CpuTensor,
    x: &CpuTensor,
    w: &Linear,
    store: Store,
) {
    assert_eq!(x.cols(), w.cols(), "inputs of the product");
    assert_eq!(out.cols(), w.rows(), "outputs of the product");
    let rows = x.rows();
    match store {
        Store::Set => out.set_rows(rows),
        Store::Add => assert_eq!(out.rows(), rows, "rows of the residual"),
    }
    if rows == 0 {
        return;
    }
    match w.dtype() {
        DType::Bf16 => {
            if scratch.left.len() < rows * left_stride(x.cols()) {
                scratch.reserve(rows, x.cols()).expect("memory for a step that was not reserved");
            }
            let left = Left { start: pack_left(isa, pool, scratch, x), stride: left_stride(x.cols()), rows };
            panels::<Bf16>(isa, pool, scratch, out, left, w, store);
        }
        DType::F16 => panels::<F16>(isa, pool, scratch, out, Left::plain(x), w, store),
        DType::F32 => panels::<F32>(isa, pool, scratch, out, Left::plain(x), w, store),
    }
}

/// The left operand of a product.
struct Left<T> {
    start: *const T,
    stride: usize,
    rows: usize,
}

impl Left<f32> {
    fn plain(x: &CpuTensor) -> Self {
        Left { start: x.as_ptr(), stride: x.stride(), rows: x.rows() }
    }
}

/// Rounds `x` to bf16 in the scratch.
fn pack_left(isa: Isa, pool: &mut Pool, scratch: &mut Scratch, x: &CpuTensor) -> *const u32 {
    let to = Shared(scratch.left.as_mut_ptr());
    let stride = left_stride(x.cols());
    let pack = |row: usize| {
        // SAFETY: row `row` of the scratch is this call's alone.
        let to = unsafe { to.at(row * stride) };
        isa.run(PackRow { to, from: x.row(row) });
    };
    if x.rows() <= ROWS_PACKED_ALONE {
        (0..x.rows()).for_each(pack);
    } else {
        let per_task = ROWS_PACKED_ALONE;
        pool.run(x.rows().div_ceil(per_task), &|task, _| {
            (task * per_task..((task + 1) * per_task).min(x.rows())).for_each(pack);
        });
    }
    to.0
}

struct PackRow<'a> {
    /// Room for `from`, rounded up to vectors.
    to: *mut u32,
    from: &'a [f32],
}

impl Kernel for PackRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut c = 0;
        while c < self.from.len() {
            let n = (self.from.len() - c).min(LANES);
            // SAFETY: `n` values are left in the row, and the packed row has room for whole vectors.
            unsafe { s.store_bf16(self.to.cast::<u16>().add(c), s.load_part(self.from.as_ptr().add(c), n)) };
            c += LANES;
        }
    }
}

/// All panels times all blocks of rows.
fn panels<E: Element>(
    isa: Isa,
    pool: &mut Pool,
    scratch: &Scratch,
    out: &mut CpuTensor,
    left: Left<E::Left>,
    w: &Linear,
    store: Store,
) {
    let (out_stride, rows) = (out.stride(), left.rows);
    let (out, start) = (out.shared(), Shared(left.start.cast_mut()));
    let num_panels = w.num_panels();
    pool.run(num_panels * rows.div_ceil(ROWS_BLOCK), &|task, thread| {
        // Neighbouring tasks share the block of rows, which stays in the cache while panels go by.
        let (block, panel) = (task / num_panels, task % num_panels);
        let row = block * ROWS_BLOCK;
        let (right, vectors) = w.panel(panel);
        // SAFETY: the partial sums are this thread's; the rows and columns of `out` are this task's alone. Rows of
        // `out` and the bias have room for whole vectors.
        unsafe {
            isa.run(PanelProduct::<E> {
                left: start.at(row * left.stride),
                left_stride: left.stride,
                rows: (rows - row).min(ROWS_BLOCK),
                right,
                vectors,
                steps: w.steps(),
                out: out.at(row * out_stride + panel * PANEL),
                out_stride,
                bias: w.bias().map(|b| b[panel * PANEL..].as_ptr()),
                store,
                partial: (*scratch.partial.get(thread)).as_mut_ptr(),
            });
        }
    });
}

/// A block of rows times one panel. All pointers are valid for the shape; `out` and `partial` are written.
struct PanelProduct<E: Element> {
    left: *const E::Left,
    left_stride: usize,
    rows: usize,
    right: *const u8,
    vectors: usize,
    steps: usize,
    out: *mut f32,
    out_stride: usize,
    bias: Option<*const f32>,
    store: Store,
    partial: *mut f32,
}

/// Which part of k a tile adds.
#[derive(Clone, Copy)]
struct Slice {
    first: usize,
    steps: usize,
    last: bool,
}

impl<E: Element> Kernel for PanelProduct<E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut first = 0;
        loop {
            let steps = (self.steps - first).min(STEPS_BLOCK);
            let slice = Slice { first, steps, last: first + steps == self.steps };
            let mut vector = 0;
            while vector < self.vectors {
                let vectors = tile_vectors::<S>(self.vectors - vector);
                let mut tiles = RowTiles::new::<S>(self.rows);
                while let Some((row, rows)) = tiles.next_tile() {
                    // SAFETY: the tile lies in the block and in the panel.
                    unsafe { with_tile!(S, rows, vectors, product_tile, (s, &self, row, vector, slice)) };
                }
                vector += vectors;
            }
            if slice.last {
                break;
            }
            first += steps;
        }
    }
}

/// # Safety
/// `R` rows from `row` and `N` vectors from `vector` lie in the block and the panel.
#[inline(always)]
unsafe fn product_tile<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    p: &PanelProduct<E>,
    row: usize,
    vector: usize,
    slice: Slice,
) {
    let mut acc = [[s.splat(0.0); N]; R];
    // SAFETY: the caller's promise and that of `PanelProduct`.
    unsafe {
        let partial = p.partial.add(row * PANEL + vector * LANES);
        if slice.first > 0 {
            for r in 0..R {
                for n in 0..N {
                    acc[r][n] = s.load(partial.add(r * PANEL + n * LANES));
                }
            }
        }
        let stride = p.vectors * E::VECTOR_BYTES;
        let start = p.right.add(slice.first * stride + vector * E::VECTOR_BYTES);
        let mut right = [start; N];
        for n in 1..N {
            right[n] = start.add(n * E::VECTOR_BYTES);
        }
        let left = p.left.add(row * p.left_stride + slice.first);
        if row == 0 && p.rows <= STREAM_ROWS_MAX {
            // Past the end of this panel lies the next one, which is this thread's too.
            let lines = (N * E::VECTOR_BYTES).div_ceil(LINE_BYTES);
            let fetch =
                FetchStream { next: start.wrapping_add(STREAM_AHEAD), far: STREAM_FAR, lines, stride };
            accumulate::<S, E, _, _, R, N>(
                s,
                &mut acc,
                left,
                p.left_stride,
                right,
                stride,
                slice.steps,
                fetch,
            );
        } else {
            accumulate::<S, E, _, _, R, N>(
                s,
                &mut acc,
                left,
                p.left_stride,
                right,
                stride,
                slice.steps,
                FetchNothing,
            );
        }
        if !slice.last {
            for r in 0..R {
                for n in 0..N {
                    s.store(partial.add(r * PANEL + n * LANES), acc[r][n]);
                }
            }
            return;
        }
        let out = p.out.add(row * p.out_stride + vector * LANES);
        if let Some(bias) = p.bias {
            for n in 0..N {
                let b = s.load(bias.add((vector + n) * LANES));
                for r in 0..R {
                    acc[r][n] = s.add(acc[r][n], b);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                let to = out.add(r * p.out_stride + n * LANES);
                match p.store {
                    Store::Set => s.store(to, acc[r][n]),
                    Store::Add => s.store(to, s.add(s.load(to), acc[r][n])),
                }
            }
        }
    }
}
