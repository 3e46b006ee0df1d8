//! Pages on their way to DRAM, off the path of a step.
//!
//! A page is copied to a staging chunk at once, so its frame is free for other tokens; a thread copies it from there to its
//! block (the shape of SparseServe's FlashD2H: one fast copy out of HBM, and processors that scatter). Chunks are used in
//! turn, so a ticket is a number: a page is in DRAM when as many jobs are done.
//!
//! Nobody waits for a chunk. Who finds none copies to the block itself, which takes no longer than copying to a chunk. Some are kept
//! for answers, so prompts, which bring many pages at once, come to that first.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ops::Error;

use crate::memory::{Buffer, Shared};

/// Copies chunks to where they belong, in order.
#[derive(Debug)]
pub struct Saver {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
    staging: Buffer<u8>,
    chunk_bytes: usize,
    chunks: usize,
    /// Jobs sent so far.
    sent: u64,
}

#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    /// A job came, or the end.
    work: Condvar,
    /// A job is done, or the thread is.
    progress: Condvar,
}

#[derive(Debug)]
struct State {
    jobs: VecDeque<Job>,
    /// Jobs done so far.
    done: u64,
    stop: bool,
    /// The thread is gone although nobody asked it to go.
    died: bool,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    from: Shared<u8>,
    to: Shared<u8>,
    bytes: usize,
}

impl Queue {
    /// A panic of the thread is noticed by `died`, which it sets on its way out.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells those who wait that nobody copies any more.
struct Farewell(Arc<Queue>);

impl Drop for Farewell {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.died = !state.stop;
        self.0.progress.notify_all();
    }
}

impl Saver {
    /// A thread with `chunks` chunks of `chunk_bytes`, which takes its time if `slow`: for tests.
    ///
    /// # Errors
    /// Out of memory; a thread that cannot be started.
    pub fn new(chunks: usize, chunk_bytes: usize, slow: bool) -> Result<Self, Error> {
        Self::with(chunks, chunk_bytes, if slow { copy_late } else { copy })
    }

    /// The same with another way to do a job.
    fn with(chunks: usize, chunk_bytes: usize, run: fn(Job)) -> Result<Self, Error> {
        let staging = Buffer::zeroed(chunks * chunk_bytes, "staging of pages")?;
        let jobs = VecDeque::with_capacity(chunks);
        let queue = Arc::new(Queue {
            state: Mutex::new(State { jobs, done: 0, stop: false, died: false }),
            work: Condvar::new(),
            progress: Condvar::new(),
        });
        let own = Arc::clone(&queue);
        let thread = std::thread::Builder::new()
            .name("kv-saver".into())
            .spawn(move || {
                let farewell = Farewell(own);
                work(&farewell.0, run);
            })
            .map_err(|e| Error::Unsupported(format!("cannot start the thread that saves pages: {e}")))?;
        Ok(Saver { queue, thread: Some(thread), staging, chunk_bytes, chunks, sent: 0 })
    }

    /// Sends a chunk of `bytes` bytes to `to` and returns its ticket; `None` if all chunks but `reserve` are in use, and the bytes
    /// are there already.
    ///
    /// # Safety
    /// Both are valid for `bytes` bytes; nobody touches `to` before the ticket is done, and it outlives this.
    ///
    /// # Panics
    /// When the thread has died, or the chunk is too long.
    pub unsafe fn send(&mut self, from: *const u8, to: *mut u8, bytes: usize, reserve: usize) -> Option<u64> {
        assert!(bytes <= self.chunk_bytes && reserve < self.chunks, "{bytes} bytes in a chunk");
        if self.sent - self.done() >= (self.chunks - reserve) as u64 {
            // SAFETY: the caller's promise.
            unsafe { to.copy_from_nonoverlapping(from, bytes) };
            return None;
        }
        let chunk = (self.sent % self.chunks as u64) as usize * self.chunk_bytes;
        // SAFETY: the chunk lies in the staging memory, and its last job is done. The rest is the caller's promise.
        let staged = unsafe {
            let staged = self.staging.as_mut_ptr().add(chunk);
            staged.copy_from_nonoverlapping(from, bytes);
            staged
        };
        self.queue.lock().jobs.push_back(Job { from: Shared(staged), to: Shared(to), bytes });
        self.queue.work.notify_one();
        self.sent += 1;
        Some(self.sent)
    }

    /// Jobs done so far.
    ///
    /// # Panics
    /// When the thread has died: what it was copying is lost.
    pub fn done(&self) -> u64 {
        let state = self.queue.lock();
        assert!(!state.died, "the thread that saves KV pages to DRAM has died");
        state.done
    }

    /// Jobs that are sent and not done.
    pub fn in_flight(&self) -> u64 {
        self.sent - self.queue.lock().done
    }

    /// Waits until `ticket` jobs are done.
    ///
    /// # Panics
    /// When the thread has died.
    pub fn wait(&self, ticket: u64) {
        let mut state = self.queue.lock();
        while state.done < ticket {
            assert!(!state.died, "the thread that saves KV pages to DRAM has died");
            state = self.queue.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.queue.lock().stop = true;
        self.queue.work.notify_all();
        if let Some(thread) = self.thread.take() {
            // If it panicked it has said so; there is nothing left to save here.
            let _ = thread.join();
        }
    }
}

/// Does jobs until all are done and no more will come.
fn work(queue: &Queue, run: fn(Job)) {
    loop {
        let mut state = queue.lock();
        let job = loop {
            if let Some(job) = state.jobs.pop_front() {
                break job;
            }
            if state.stop {
                return;
            }
            state = queue.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        run(job);
        queue.lock().done += 1;
        queue.progress.notify_all();
    }
}

/// Long enough for a step that does not wait to read what is not there.
fn copy_late(job: Job) {
    std::thread::sleep(Duration::from_micros(300));
    copy(job);
}

fn copy(job: Job) {
    // SAFETY: as the sender promised; staging and blocks do not overlap.
    unsafe { job.to.0.copy_from_nonoverlapping(job.from.0, job.bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Saves `count` blocks of 8 bytes, waits for all, and returns them, and how many were not sent.
    fn send_all(saver: &mut Saver, count: usize) -> (Vec<u8>, usize) {
        let mut blocks = vec![0u8; 8 * count];
        let to = blocks.as_mut_ptr();
        let (mut last, mut at_once) = (0, 0);
        for i in 0..count {
            let from = [i as u8 + 1; 8];
            // SAFETY: block `i` is among the blocks, which outlive the wait below.
            match unsafe { saver.send(from.as_ptr(), to.add(8 * i), 8, i % 2) } {
                Some(ticket) => last = ticket,
                None => at_once += 1,
            }
        }
        saver.wait(last);
        (blocks, at_once)
    }

    #[test]
    fn everything_arrives_whatever_the_staging_holds() {
        for chunks in [2, 3, 100] {
            let mut saver = Saver::new(chunks, 8, false).expect("memory");
            let (blocks, at_once) = send_all(&mut saver, 40);
            assert!(blocks.chunks(8).enumerate().all(|(i, b)| b.iter().all(|&v| v == i as u8 + 1)));
            assert_eq!((saver.done(), saver.in_flight()), (40 - at_once as u64, 0));
            assert!(chunks < 100 || at_once == 0, "there is a chunk for each");
        }
    }

    #[test]
    fn nobody_waits_for_a_slow_thread_to_free_a_chunk() {
        let slowly = |job| {
            std::thread::sleep(Duration::from_millis(20));
            copy(job);
        };
        let mut saver = Saver::with(2, 8, slowly).expect("memory");
        let (blocks, at_once) = send_all(&mut saver, 20);
        assert!(blocks.iter().all(|&v| v > 0), "what was sent is waited for");
        assert!(at_once > 0 && at_once < 20, "{at_once}");
    }

    #[test]
    #[should_panic(expected = "has died")]
    fn a_thread_that_dies_stops_the_step() {
        let mut saver = Saver::with(2, 8, |_| panic!("a test wants it so")).expect("memory");
        send_all(&mut saver, 20);
    }
}
