//! Fork and join: threads that wait for the operations of a step.
//!
//! An operation is a fork of independent tasks. Every thread has a share of them, one after the other, so that what it wrote in
//! one operation is what it reads in the next: a line that another core's cache holds costs more than one in memory. Tasks are
//! claimed one by one, and who is done with its own share takes from those of others, so a thread that the
//! system takes away holds up one task, not a share of the work. A worker *joins* a fork when it gets to it; the
//! caller, who works too, closes the fork once everything is claimed and waits only for workers that did join. So
//! on a machine with fewer free cores than threads a late worker costs nothing.
//!
//! Workers spin after a fork, since the next operation of a step follows within microseconds, and then park.
//!
//! Measured on two cores of Zen 5 with a third-level cache each, decode of four sequences after 32,000 tokens under `shadowkv`: with
//! one counter for all tasks a step takes 33 ms, of which scores are 10; with shares 26, of which scores are 6.
//!
//! Measured on four cores of Zen 4, a fork of 16 empty tasks (medians of 31 runs, others at work beside them): 0.4 to
//! 0.8 us. rayon takes 0.5 to 1.1 us when its caller is one of its workers and 20 us when it is not, and it is not
//! here: the engine's thread is the caller.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use ops::Error;

/// What a fork runs: `(task, thread)`.
type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// How long a worker looks for the next fork before it parks. Longer than the serial parts between the operations of
/// a step, far shorter than what an idle server would be blamed for.
const SPIN: Duration = Duration::from_micros(60);

/// Threads of a pool at most.
pub const THREADS_MAX: usize = 1024;

/// Spin-loop hints between two looks at the clock.
const SPINS_PER_LOOK: usize = 64;

const OPEN: u64 = 1 << 16;
const JOINED: u64 = OPEN - 1;
const EPOCH: u64 = 1 << 17;

/// What caller and workers share.
struct Fork {
    /// Epoch of the fork in the high bits, then the open bit, then how many workers have joined and not yet left.
    state: AtomicU64,
    /// Of each thread.
    shares: Vec<Share>,
    /// Valid while the fork is open or somebody is joined.
    job: UnsafeCell<Option<(&'static Job<'static>, usize)>>,
    /// First panic of a task.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: Vec<AtomicBool>,
    stop: AtomicBool,
}

/// The next task to be claimed of a thread's share, in lines of its own.
#[repr(align(128))]
struct Share(AtomicUsize);

// SAFETY: `job` is written only by the caller while the fork is closed and nobody is joined, and read only between
// joining and leaving; `state` orders the two.
unsafe impl Sync for Fork {}

/// A fixed set of threads. The thread that calls [`Pool::run`] is number 0 and works too.
pub struct Pool {
    fork: Arc<Fork>,
    threads: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] among them.
    ///
    /// # Errors
    /// When the system gives no more threads, or `threads` is not in `1..=`[`THREADS_MAX`].
    pub fn new(threads: usize) -> Result<Self, Error> {
        if !(1..=THREADS_MAX).contains(&threads) {
            return Err(Error::Unsupported(format!(
                "{threads} threads: at least one thread is needed and {THREADS_MAX} are possible"
            )));
        }
        let fork = Arc::new(Fork {
            state: AtomicU64::new(0),
            shares: (0..threads).map(|_| Share(AtomicUsize::new(0))).collect(),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        // Dropping it stops those that have started, should a later one not.
        let mut pool = Pool { fork, threads: Vec::new(), handles: Vec::new() };
        for number in 1..threads {
            let fork = Arc::clone(&pool.fork);
            let builder = std::thread::Builder::new().name(format!("kernel-{number}"));
            let handle = builder.spawn(move || fork.work(number)).map_err(|e| {
                Error::Unsupported(format!(
                    "cannot start thread {number} of {threads}: {e}; take fewer threads"
                ))
            })?;
            pool.threads.push(handle.thread().clone());
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `job(task, thread)` for every task in `0..num_tasks`, in any order, on any thread, and returns when all
    /// are done. Allocates nothing. Takes `&mut self`, so forks never nest.
    ///
    /// # Panics
    /// With the first panic of a task, after the others have come to rest; the pool stays usable.
    pub fn run(&mut self, num_tasks: usize, job: &Job) {
        if self.threads.is_empty() || num_tasks <= 1 {
            (0..num_tasks).for_each(|task| job(task, 0));
            return;
        }
        let fork = &*self.fork;
        // SAFETY: only the lifetime is changed. The reference is used only between joining and leaving, and this
        // function does not return before the fork is closed and everybody has left.
        let job: &'static Job<'static> = unsafe { std::mem::transmute::<&Job, &'static Job<'static>>(job) };
        // SAFETY: the last fork was closed and left by all, and `&mut self` excludes another caller.
        unsafe { *fork.job.get() = Some((job, num_tasks)) };
        for (thread, share) in fork.shares.iter().enumerate() {
            share.0.store(fork.share(thread, num_tasks).start, Ordering::Relaxed);
        }
        let epoch = fork.state.load(Ordering::Relaxed) / EPOCH;
        // Sequentially consistent, as is a worker's `parked` store and its look at the state after it: either the
        // worker sees this fork or we see the worker parked.
        fork.state.store(((epoch + 1) * EPOCH) | OPEN, Ordering::SeqCst);
        for (parked, thread) in fork.parked.iter().zip(&self.threads) {
            if parked.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        fork.claim(job, num_tasks, 0);
        fork.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while fork.state.load(Ordering::Acquire) & JOINED != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let panic = fork.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.fork.stop.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        for handle in self.handles.drain(..) {
            // A worker catches the panics of its tasks, so it ends without one.
            let _ = handle.join();
        }
    }
}

impl Fork {
    /// The tasks of a thread.
    fn share(&self, thread: usize, num_tasks: usize) -> Range<usize> {
        let threads = self.shares.len();
        // At most THREADS_MAX times what lies in memory, so no product overflows.
        thread * num_tasks / threads..(thread + 1) * num_tasks / threads
    }

    /// Claims and runs tasks until none is left, those of this thread first.
    fn claim(&self, job: &Job, num_tasks: usize, thread: usize) {
        let threads = self.shares.len();
        let run = AssertUnwindSafe(|| {
            for owner in (thread..threads).chain(0..thread) {
                let (next, end) = (&self.shares[owner].0, self.share(owner, num_tasks).end);
                // Looked at first: a share that is done with is written by nobody any more.
                while next.load(Ordering::Relaxed) < end {
                    let task = next.fetch_add(1, Ordering::Relaxed);
                    if task < end {
                        job(task, thread);
                    }
                }
            }
        });
        if let Err(panic) = catch_unwind(run) {
            self.shares.iter().for_each(|share| share.0.store(num_tasks, Ordering::Relaxed));
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// Joins the open fork of an epoch other than `seen`, if there is one.
    fn join(&self, seen: u64) -> Option<u64> {
        let mut state = self.state.load(Ordering::SeqCst);
        while state & OPEN != 0 && state / EPOCH != seen {
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(state / EPOCH),
                Err(now) => state = now,
            }
        }
        None
    }

    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            if let Some(epoch) = self.join_or_park(seen, thread) {
                seen = epoch;
                // SAFETY: joined, so the caller neither writes the cell nor lets the job go.
                if let Some((job, num_tasks)) = unsafe { *self.job.get() } {
                    self.claim(job, num_tasks, thread);
                }
                self.state.fetch_sub(1, Ordering::Release);
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    /// Spins, then parks, until there is a fork to join or the pool is dropped.
    fn join_or_park(&self, seen: u64, thread: usize) -> Option<u64> {
        let start = Instant::now();
        loop {
            for _ in 0..SPINS_PER_LOOK {
                if let Some(epoch) = self.join(seen) {
                    return Some(epoch);
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                break;
            }
        }
        let parked = &self.parked[thread - 1];
        parked.store(true, Ordering::SeqCst);
        let joined = loop {
            if let Some(epoch) = self.join(seen) {
                break Some(epoch);
            }
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            std::thread::park();
        };
        parked.store(false, Ordering::SeqCst);
        joined
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 4, 9] {
            let mut pool = Pool::new(threads).expect("threads");
            for num_tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_tasks, &|task, thread| {
                    assert!(thread < threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {num_tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn threads_begin_with_their_own_tasks() {
        const THREADS: usize = 4;
        let mut pool = Pool::new(THREADS).expect("threads");
        // As many tasks as threads, each of which waits until all have begun: nobody does two.
        for _ in 0..100 {
            let barrier = Barrier::new(THREADS);
            pool.run(THREADS, &|task, thread| {
                assert_eq!(task, thread);
                barrier.wait();
            });
        }
    }

    #[test]
    fn who_is_done_takes_from_others() {
        let mut pool = Pool::new(2).expect("threads");
        let done = AtomicUsize::new(0);
        // The first task ends after all others, so one thread does the rest of both shares.
        pool.run(100, &|task, _| {
            if task == 0 {
                while done.load(Ordering::Relaxed) < 99 {
                    std::thread::yield_now();
                }
            }
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn no_pool_without_threads_or_with_thousands() {
        for threads in [0, THREADS_MAX + 1] {
            assert!(matches!(Pool::new(threads), Err(Error::Unsupported(_))), "{threads}");
        }
    }

    #[test]
    fn results_are_visible_and_forks_do_not_mix() {
        let mut pool = Pool::new(4).expect("threads");
        let sums: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
        for round in 0..5000 {
            // Now and then long enough for the workers to park.
            if round % 1000 == 0 {
                std::thread::sleep(SPIN * 4);
            }
            let num_tasks = 2 + round % 63;
            pool.run(num_tasks, &|task, _| {
                // Relaxed load and store, not an addition: loses counts unless the join orders rounds.
                let old = sums[task].load(Ordering::Relaxed);
                sums[task].store(old + 1, Ordering::Relaxed);
            });
        }
        let expected = |task: usize| (0..5000).filter(|round| task < 2 + round % 63).count();
        for (task, sum) in sums.iter().enumerate() {
            assert_eq!(sum.load(Ordering::Relaxed), expected(task));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3).expect("threads");
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|task, _| assert!(task != 50, "task {task} fails"));
            }));
            let panic = result.expect_err("the panic is passed on");
            assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some("task 50 fails"));
            let count = AtomicUsize::new(0);
            pool.run(100, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 100);
        }
    }
}
