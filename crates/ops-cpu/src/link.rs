//! A link between the tiers, played with a clock: copies inside one memory are too fast for what a real link teaches.
//!
//! Each direction is a queue of its own (full duplex). A transfer begins when its direction is free, and takes what
//! [`LinkSpec::time`] says: the bytes at the bandwidth, and something for each call. The bytes themselves are copied by whoever
//! sends them, as ever, beside that time: so a transfer takes as long as its link or its copy does, whichever is slower.
//! Who needs what was sent waits for it; who does not goes on, as a step does while saves are on their way.
//!
//! Without a [`LinkSpec`] nothing takes time, and calls are counted all the same.

use std::time::{Duration, Instant};

use ops::tier::LinkSpec;

/// Where a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To HBM: a fetch.
    ToHbm,
    /// To DRAM: a save.
    ToDram,
}

/// When a transfer is done; the default is long ago. The later one of two is the larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Done(Option<Instant>);

/// A link, which may cost nothing.
#[derive(Debug)]
pub struct Link {
    spec: Option<LinkSpec>,
    /// When each direction is free.
    free: [Done; 2],
    calls: [u64; 2],
}

/// Waits longer than this sleep at first: a sleep may end this much too late, and microseconds count.
const SLEEP_LATE: Duration = Duration::from_millis(2);

impl Link {
    /// A link that is free.
    pub const fn new(spec: Option<LinkSpec>) -> Self {
        Link { spec, free: [Done(None); 2], calls: [0; 2] }
    }

    /// Sends `bytes` in `calls` calls, after all that was sent in this direction before. To be called before they are copied, and
    /// followed by a [`wait`](Link::wait) before they are used.
    pub fn send(&mut self, direction: Direction, bytes: usize, calls: usize) -> Done {
        self.calls[direction as usize] += calls as u64;
        match self.spec {
            None => Done::default(),
            Some(spec) => self.send_at(Instant::now(), direction, spec.time(bytes as u64, calls as u64)),
        }
    }

    fn send_at(&mut self, now: Instant, direction: Direction, time: Duration) -> Done {
        let free = &mut self.free[direction as usize];
        *free = Done(Some(free.0.map_or(now, |free| free.max(now)) + time));
        *free
    }

    /// When no more than `bytes` of what was sent in this direction are still on their way.
    pub fn room(&self, direction: Direction, bytes: usize) -> Done {
        let (Some(spec), Done(Some(free))) = (self.spec, self.free[direction as usize]) else {
            return Done::default();
        };
        Done(free.checked_sub(spec.time(bytes as u64, 0)))
    }

    /// Whether it is done.
    pub fn is_done(&self, Done(end): Done) -> bool {
        end.is_none_or(|end| end <= Instant::now())
    }

    /// Waits until it is done; returns the nanoseconds that took.
    pub fn wait(&self, Done(end): Done) -> u64 {
        let Some(end) = end else { return 0 };
        let start = Instant::now();
        let mut now = start;
        while now < end {
            match (end - now).checked_sub(SLEEP_LATE) {
                Some(long) if !long.is_zero() => std::thread::sleep(long),
                _ => std::hint::spin_loop(),
            }
            now = Instant::now();
        }
        (now - start).as_nanos() as u64
    }

    /// Calls since the start: to HBM, and to DRAM.
    pub const fn calls(&self) -> [u64; 2] {
        self.calls
    }
}

#[cfg(test)]
mod tests {
    use super::Direction::{ToDram, ToHbm};
    use super::*;

    const MICRO: Duration = Duration::from_micros(1);

    /// 1 GB/s: a byte takes a nanosecond.
    fn link() -> Link {
        Link::new(Some(LinkSpec { bytes_per_second: 1_000_000_000, call_nanos: 2_000 }))
    }

    #[test]
    fn a_transfer_begins_when_its_direction_is_free() {
        let (mut link, start) = (link(), Instant::now());
        let at = |micros: u32| Done(Some(start + micros * MICRO));
        assert_eq!(link.send_at(start, ToHbm, 5 * MICRO), at(5));
        assert_eq!(link.send_at(start + MICRO, ToHbm, 3 * MICRO), at(8), "after the one before it");
        assert_eq!(link.send_at(start + MICRO, ToDram, 3 * MICRO), at(4), "the other direction is free");
        assert_eq!(link.send_at(start + 20 * MICRO, ToHbm, 3 * MICRO), at(23), "idle time is lost");
        assert_eq!(link.room(ToHbm, 2_000), at(21), "bytes of two microseconds");
        assert!(at(4) < at(5) && Done::default() < at(0));
    }

    #[test]
    fn who_waits_has_waited_long_enough() {
        let mut link = link();
        for (bytes, calls) in [(1_000, 1), (0, 10), (3_000_000, 1)] {
            let start = Instant::now();
            let done = link.send(ToHbm, bytes, calls);
            link.wait(done);
            let least = Duration::from_nanos(bytes as u64 + 2_000 * calls as u64);
            assert!(start.elapsed() >= least && link.is_done(done));
        }
        assert_eq!(link.calls(), [12, 0]);
    }

    #[test]
    fn a_link_that_costs_nothing_only_counts() {
        let mut link = Link::new(None);
        let done = link.send(ToDram, usize::MAX, 3);
        assert_eq!((done, link.wait(done), link.room(ToDram, 0)), (Done::default(), 0, Done::default()));
        assert_eq!(link.calls(), [0, 3]);
    }
}
