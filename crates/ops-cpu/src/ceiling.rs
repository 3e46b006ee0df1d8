//! What the machine can do at best: the yardsticks of the benches.

use std::hint::black_box;
use std::time::Instant;

use ops::{DType, Error};

use crate::isa::{Isa, Kernel};
use crate::memory::{Buffer, LINE_BYTES, PerThread};
use crate::pool::Pool;
use crate::simd::{LANES, Simd};
use crate::tile::{Bf16, Element, F16, F32, FetchNothing, accumulate, with_tile};

/// Size of the buffer whose reading is timed: far above any last-level cache of a desktop or server slice.
const READ_BYTES: usize = 512 << 20;

/// Bytes that one task reads.
const READ_TASK_BYTES: usize = 1 << 20;

/// Steps of the register tile: left and right operands fit in the first-level cache with room to spare.
const TILE_STEPS: usize = 64;

/// Tiles per task.
const TILES_PER_TASK: usize = 2000;

/// Measures ceilings again and again, between the measurements that they are compared with.
#[derive(Debug)]
pub struct Ceiling {
    isa: Isa,
    memory: Buffer<f32>,
    operands: PerThread<Buffer<f32>>,
}

impl Ceiling {
    /// Allocates and touches the memory.
    ///
    /// # Errors
    /// When there is not enough of it.
    pub fn new(isa: Isa, threads: usize) -> Result<Self, Error> {
        let mut memory = Buffer::<f32>::zeroed(READ_BYTES / size_of::<f32>(), "bandwidth measurement")?;
        // Untouched memory is one shared page of zeros, which is always in the cache.
        memory.as_mut_slice().fill(1.0);
        let mut operands = Vec::new();
        for _ in 0..threads {
            operands.push(Buffer::zeroed(16 * TILE_STEPS * LANES, "rate measurement")?);
        }
        let mut operands = operands.into_iter();
        let operands = PerThread::new(threads, || operands.next().expect("one per thread"));
        Ok(Ceiling { isa, memory, operands })
    }

    /// Bytes per second at which all threads of `pool` together read memory.
    pub fn read_bandwidth(&self, pool: &mut Pool) -> f64 {
        let words = READ_TASK_BYTES / size_of::<f32>();
        let start = Instant::now();
        pool.run(READ_BYTES / READ_TASK_BYTES, &|task, _| {
            let words = &self.memory.as_slice()[task * words..][..words];
            black_box(self.isa.run(Sum { words }));
        });
        READ_BYTES as f64 / start.elapsed().as_secs_f64()
    }

    /// Floating-point operations per second of the register tile on operands in the first-level cache, all threads
    /// of `pool` together.
    pub fn matmul_rate(&self, pool: &mut Pool, dtype: DType) -> f64 {
        let num_tasks = 4 * pool.threads();
        let start = Instant::now();
        let operations = std::sync::atomic::AtomicUsize::new(0);
        pool.run(num_tasks, &|_, thread| {
            // SAFETY: the operands of this thread, in its only task at the time.
            let operands = unsafe { &mut *self.operands.get(thread) };
            let count = match dtype {
                DType::Bf16 => self.isa.run(Tiles { operands, element: std::marker::PhantomData::<Bf16> }),
                DType::F16 => self.isa.run(Tiles { operands, element: std::marker::PhantomData::<F16> }),
                DType::F32 => self.isa.run(Tiles { operands, element: std::marker::PhantomData::<F32> }),
            };
            operations.fetch_add(count, std::sync::atomic::Ordering::Relaxed);
        });
        operations.into_inner() as f64 / start.elapsed().as_secs_f64()
    }
}

struct Sum<'a> {
    words: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for line in self.words.chunks_exact(4 * LANES) {
            for i in 0..4 {
                // SAFETY: a chunk has four vectors.
                sums[i] = s.add(sums[i], unsafe { s.load(line.as_ptr().add(i * LANES)) });
            }
        }
        s.reduce_sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

struct Tiles<'a, E> {
    operands: &'a mut Buffer<f32>,
    element: std::marker::PhantomData<E>,
}

impl<E: Element> Kernel for Tiles<'_, E> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        for _ in 0..TILES_PER_TASK {
            // SAFETY: the operands hold 6 left rows and 4 right vectors of all steps.
            unsafe { with_tile!(S, S::TILE_ROWS, all, rate_tile, (s, self.operands)) };
        }
        TILES_PER_TASK * TILE_STEPS * S::TILE_ROWS * S::TILE_VECTORS * LANES * E::K_PER_STEP * 2
    }
}

/// # Safety
/// `operands` has room for both.
#[inline(always)]
unsafe fn rate_tile<S: Simd, E: Element, const R: usize, const N: usize>(s: S, operands: &mut Buffer<f32>) {
    let mut acc = [[s.splat(0.0); N]; R];
    let left_stride = TILE_STEPS + LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let right_start: *const u8 = black_box(operands.as_ptr().cast::<u8>());
        let left = right_start.add(N * TILE_STEPS * LINE_BYTES).cast();
        let mut right = [right_start; N];
        for n in 1..N {
            right[n] = right_start.add(n * E::VECTOR_BYTES);
        }
        accumulate::<S, E, _, _, R, N>(
            s,
            &mut acc,
            left,
            left_stride,
            right,
            N * E::VECTOR_BYTES,
            TILE_STEPS,
            FetchNothing,
        );
        let mut sum = s.splat(0.0);
        for r in 0..R {
            for n in 0..N {
                sum = s.add(sum, acc[r][n]);
            }
        }
        s.store(operands.as_mut_ptr().add((N + 2 * R) * TILE_STEPS * LANES / 2), sum);
    }
}
