//! The register tile: the one loop in which matrix products, attention scores and weighted values are computed.
//!
//! A tile is up to `TILE_ROWS` rows by `TILE_VECTORS` vectors of outputs, held in registers while k ascends. Every
//! output element adds its products in that one order whatever the shape of the tile around it, which is why a
//! row has the same bits in a batch of 1 and of 1000.

use crate::memory::LINE_BYTES;
use crate::simd::{LANES, Simd};

/// How the right operand (weights, K, V) is stored, and what that makes of the left one (activations, q, p).
///
/// One *step* of k multiplies [`Element::K_PER_STEP`] values of a left row with as many of 16 outputs: pairs for
/// bf16, as its dot-product instruction wants, else single values.
pub trait Element: Copy + Send + Sync + 'static {
    /// Values of k per step.
    const K_PER_STEP: usize;
    /// Bytes of 16 outputs for one step of the right operand.
    const VECTOR_BYTES: usize;

    /// What the left operand holds per step.
    type Left: Copy + Send + Sync;
    /// A loaded vector of the right operand.
    type Right<S: Simd>: Copy;

    /// Loads 16 outputs of the right operand.
    ///
    /// # Safety
    /// `VECTOR_BYTES` are readable.
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> Self::Right<S>;
    /// Loads 8 outputs, and 8 more from elsewhere.
    ///
    /// # Safety
    /// Half of `VECTOR_BYTES` is readable at each place.
    unsafe fn load_halves<S: Simd>(s: S, from: [*const u8; 2]) -> Self::Right<S>;
    /// `acc + left * right`.
    fn mul_add<S: Simd>(s: S, acc: S::V, left: Self::Left, right: Self::Right<S>) -> S::V;
    /// `acc + left * right`, lane by lane, for the next `16 * K_PER_STEP` values of a left row and of a right one that was loaded
    /// from memory like it: what a dot product of two rows sums.
    ///
    /// # Safety
    /// As many values of the left row are readable.
    unsafe fn mul_add_lanes<S: Simd>(s: S, acc: S::V, left: *const Self::Left, right: Self::Right<S>)
    -> S::V;
    /// Writes 16 values of a left row: rounded to bf16 for bf16, else as they are. `step` is a multiple of 16 / `K_PER_STEP`.
    ///
    /// # Safety
    /// 16 values are writable.
    unsafe fn store_left<S: Simd>(s: S, to: *mut Self::Left, v: S::V);
    /// What [`Element::store_left`] keeps of a value.
    fn round_left<S: Simd>(s: S, v: S::V) -> S::V;
    /// 16 elements of the right operand that lie side by side, widened.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn widen<S: Simd>(s: S, from: *const u8) -> S::V;
    /// Writes 16 values as elements of the right operand.
    ///
    /// # Safety
    /// 16 elements are writable.
    unsafe fn store_right<S: Simd>(s: S, to: *mut u8, v: S::V);
}

/// bf16 with the left operand rounded to bf16 too.
#[derive(Clone, Copy, Debug)]
pub struct Bf16;

/// f16, widened; the left operand stays f32.
#[derive(Clone, Copy, Debug)]
pub struct F16;

/// f32.
#[derive(Clone, Copy, Debug)]
pub struct F32;

impl Element for Bf16 {
    const K_PER_STEP: usize = 2;
    const VECTOR_BYTES: usize = 64;

    type Left = u32;
    type Right<S: Simd> = S::Pairs;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_pairs(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_halves<S: Simd>(s: S, [low, high]: [*const u8; 2]) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { s.load_pairs_halves(low.cast(), high.cast()) }
    }

    #[inline(always)]
    fn mul_add<S: Simd>(s: S, acc: S::V, left: u32, right: S::Pairs) -> S::V {
        s.dot_pairs(acc, s.splat_pair(left), right)
    }

    #[inline(always)]
    unsafe fn mul_add_lanes<S: Simd>(s: S, acc: S::V, left: *const u32, right: S::Pairs) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.dot_pairs(acc, s.load_pairs(left), right) }
    }

    #[inline(always)]
    unsafe fn store_left<S: Simd>(s: S, to: *mut u32, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store_bf16(to.cast(), v) }
    }

    #[inline(always)]
    fn round_left<S: Simd>(s: S, v: S::V) -> S::V {
        s.round_bf16(v)
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_right<S: Simd>(s: S, to: *mut u8, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store_bf16(to.cast(), v) }
    }
}

impl Element for F16 {
    const K_PER_STEP: usize = 1;
    const VECTOR_BYTES: usize = 32;

    type Left = f32;
    type Right<S: Simd> = S::V;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_halves<S: Simd>(s: S, [low, high]: [*const u8; 2]) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16_halves(low.cast(), high.cast()) }
    }

    #[inline(always)]
    fn mul_add<S: Simd>(s: S, acc: S::V, left: f32, right: S::V) -> S::V {
        s.mul_add(s.splat(left), right, acc)
    }

    #[inline(always)]
    unsafe fn mul_add_lanes<S: Simd>(s: S, acc: S::V, left: *const f32, right: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.mul_add(s.load(left), right, acc) }
    }

    #[inline(always)]
    unsafe fn store_left<S: Simd>(s: S, to: *mut f32, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store(to, v) }
    }

    #[inline(always)]
    fn round_left<S: Simd>(_: S, v: S::V) -> S::V {
        v
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_right<S: Simd>(s: S, to: *mut u8, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store_f16(to.cast(), v) }
    }
}

impl Element for F32 {
    const K_PER_STEP: usize = 1;
    const VECTOR_BYTES: usize = 64;

    type Left = f32;
    type Right<S: Simd> = S::V;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_halves<S: Simd>(s: S, [low, high]: [*const u8; 2]) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_halves(low.cast(), high.cast()) }
    }

    #[inline(always)]
    fn mul_add<S: Simd>(s: S, acc: S::V, left: f32, right: S::V) -> S::V {
        s.mul_add(s.splat(left), right, acc)
    }

    #[inline(always)]
    unsafe fn mul_add_lanes<S: Simd>(s: S, acc: S::V, left: *const f32, right: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.mul_add(s.load(left), right, acc) }
    }

    #[inline(always)]
    unsafe fn store_left<S: Simd>(s: S, to: *mut f32, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store(to, v) }
    }

    #[inline(always)]
    fn round_left<S: Simd>(_: S, v: S::V) -> S::V {
        v
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, from: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_right<S: Simd>(s: S, to: *mut u8, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store(to.cast(), v) }
    }
}

/// What else a tile does at every step: fetch into the cache what is read next, or nothing. A type and not a condition:
/// one in the inner loop costs a tenth of the speed of prefill.
pub trait Fetch {
    /// Called once per step.
    fn step<S: Simd>(&mut self, s: S);
}

/// For operands that the hardware sees as a stream, or that are in the cache.
#[derive(Clone, Copy, Debug)]
pub struct FetchNothing;

impl Fetch for FetchNothing {
    #[inline(always)]
    fn step<S: Simd>(&mut self, _: S) {}
}

/// Fetches some lines at each step, as far ahead of what is worked on as it was begun.
#[derive(Clone, Copy, Debug)]
pub struct FetchStream {
    /// The next line for the nearest cache.
    pub next: *const u8,
    /// Bytes from there to the next one for the second-level cache.
    pub far: usize,
    /// Lines per step.
    pub lines: usize,
    /// Bytes from those of one step to those of the next.
    pub stride: usize,
}

impl Fetch for FetchStream {
    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        for line in 0..self.lines {
            s.prefetch(self.next.wrapping_add(line * LINE_BYTES));
            s.prefetch_second(self.next.wrapping_add(self.far + line * LINE_BYTES));
        }
        self.next = self.next.wrapping_add(self.stride);
    }
}

/// Where the vectors of a right operand are.
pub trait Operand: Copy {
    /// The one of step `step`.
    ///
    /// # Safety
    /// It is readable.
    unsafe fn load<S: Simd, E: Element>(self, s: S, step: usize, stride: usize) -> E::Right<S>;
}

/// Each in one piece.
impl Operand for *const u8 {
    #[inline(always)]
    unsafe fn load<S: Simd, E: Element>(self, s: S, step: usize, stride: usize) -> E::Right<S> {
        // SAFETY: the caller's promise.
        unsafe { E::load(s, self.add(step * stride)) }
    }
}

/// Each in two halves.
impl Operand for [*const u8; 2] {
    #[inline(always)]
    unsafe fn load<S: Simd, E: Element>(self, s: S, step: usize, stride: usize) -> E::Right<S> {
        // SAFETY: the caller's promise.
        unsafe { E::load_halves(s, self.map(|half| half.add(step * stride))) }
    }
}

/// `acc[r][n] += sum over steps of left[r][step] * right[n][step]`, in ascending order of steps. The left rows are
/// `left_stride` apart, the steps of a right vector `right_stride` bytes.
///
/// # Safety
/// All of that is readable.
#[inline(always)]
pub unsafe fn accumulate<S: Simd, E: Element, P: Operand, F: Fetch, const R: usize, const N: usize>(
    s: S,
    acc: &mut [[S::V; N]; R],
    left: *const E::Left,
    left_stride: usize,
    right: [P; N],
    right_stride: usize,
    steps: usize,
    mut fetch: F,
) {
    for step in 0..steps {
        fetch.step(s);
        // SAFETY: the caller's promise.
        unsafe {
            let mut vectors = [right[0].load::<S, E>(s, step, right_stride); N];
            for n in 1..N {
                vectors[n] = right[n].load::<S, E>(s, step, right_stride);
            }
            for r in 0..R {
                let l = *left.add(r * left_stride + step);
                for n in 0..N {
                    acc[r][n] = E::mul_add(s, acc[r][n], l, vectors[n]);
                }
            }
        }
    }
}

/// Calls `$call::<S, E, R, N>` for a tile whose shape is known only at run time. The conditions are constants, so
/// tiles that an instruction set never asks for are not even compiled for it.
macro_rules! with_tile {
    // All vectors that a tile may have.
    ($simd:ty, $rows:expr, all, $call:ident, $args:tt) => {
        if const { <$simd>::TILE_VECTORS > 1 } {
            $crate::tile::with_tile!(@rows $simd, $rows, 4, $call, $args)
        } else {
            $crate::tile::with_tile!(@rows $simd, $rows, 1, $call, $args)
        }
    };
    ($simd:ty, $rows:expr, $vectors:expr, $call:ident, $args:tt) => {
        match $vectors {
            1 => $crate::tile::with_tile!(@rows $simd, $rows, 1, $call, $args),
            2 => {
                if const { <$simd>::TILE_VECTORS > 1 } {
                    $crate::tile::with_tile!(@rows $simd, $rows, 2, $call, $args)
                } else {
                    unreachable!("tiles have one vector")
                }
            }
            4 => {
                if const { <$simd>::TILE_VECTORS > 1 } {
                    $crate::tile::with_tile!(@rows $simd, $rows, 4, $call, $args)
                } else {
                    unreachable!("tiles have one vector")
                }
            }
            _ => unreachable!("tiles have 1, 2 or 4 vectors"),
        }
    };
    (@rows $simd:ty, $rows:expr, $n:literal, $call:ident, $args:tt) => {
        match $rows {
            1 => $crate::tile::with_tile!(@call $simd, $call, 1, $n, $args),
            2 => $crate::tile::with_tile!(@call $simd, $call, 2, $n, $args),
            3 => $crate::tile::with_tile!(@call $simd, $call, 3, $n, $args),
            4 => $crate::tile::with_tile!(@call $simd, $call, 4, $n, $args),
            5 => $crate::tile::with_tile!(@call $simd, $call, 5, $n, $args),
            6 => $crate::tile::with_tile!(@call $simd, $call, 6, $n, $args),
            _ => unreachable!("a tile has 1 to TILE_ROWS rows"),
        }
    };
    (@call $simd:ty, $call:ident, $r:literal, $n:literal, ($($arg:expr),* $(,)?)) => {
        if const { $r <= <$simd>::TILE_ROWS } {
            $call::<S, E, $r, $n>($($arg),*)
        } else {
            unreachable!("a tile has 1 to TILE_ROWS rows")
        }
    };
}
pub(crate) use with_tile;

/// How many vectors the next tile takes of `left`: 4, 2 or 1.
#[inline(always)]
pub fn tile_vectors<S: Simd>(left: usize) -> usize {
    match left.min(S::TILE_VECTORS) {
        3 => 2,
        n => n,
    }
}

/// Cuts rows into tiles of nearly equal height, none above `S::TILE_ROWS`: 8 rows are 4 + 4, not 6 + 2, so no tile
/// leaves most of the registers idle.
///
/// Not a closure or an iterator chain, as nowhere in kernels: those would have to be inlined to get the target features.
#[derive(Debug)]
pub struct RowTiles {
    next: usize,
    rows: usize,
    tiles_left: usize,
}

impl RowTiles {
    /// Tiles of `rows` rows.
    #[inline(always)]
    pub fn new<S: Simd>(rows: usize) -> Self {
        RowTiles { next: 0, rows, tiles_left: rows.div_ceil(S::TILE_ROWS) }
    }

    /// First row and height of the next tile.
    #[inline(always)]
    pub fn next_tile(&mut self) -> Option<(usize, usize)> {
        if self.tiles_left == 0 {
            return None;
        }
        let first = self.next;
        let height = (self.rows - first).div_ceil(self.tiles_left);
        self.next += height;
        self.tiles_left -= 1;
        Some((first, height))
    }
}

/// `count` rounded up to whole vectors.
pub const fn round_to_lanes(count: usize) -> usize {
    count.next_multiple_of(LANES)
}
