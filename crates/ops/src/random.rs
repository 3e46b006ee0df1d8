//! A counter-based random stream: value `i` of seed `s` depends on nothing else.

/// Random numbers by SplitMix64 over a counter (Steele, Lea, Flood: *Fast Splittable Pseudorandom Number
/// Generators*, 2014). Used for sampling, where the stream is keyed by (request seed, position) so that a draw does
/// not depend on the batch, and for test inputs.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// The stream of `seed`.
    #[inline]
    pub fn new(seed: u64) -> Self {
        Random { state: mix(seed.wrapping_add(GOLDEN_GAMMA)) }
    }

    /// The stream of (`seed`, `key`): streams of different keys are independent.
    #[inline]
    pub fn keyed(seed: u64, key: u64) -> Self {
        Random {
            state: mix(
                mix(seed.wrapping_add(GOLDEN_GAMMA)) ^ mix(key.wrapping_add(GOLDEN_GAMMA).rotate_left(32))
            ),
        }
    }

    /// 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN_GAMMA);
        mix(self.state)
    }

    /// Uniform in `[0, 1)` with 53 random bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `0..bound` (bias below 2^-32 for the small bounds used here).
    ///
    /// # Panics
    /// When `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        assert!(bound > 0, "an empty range has no element");
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Roughly normal, mean 0 and variance 1: the sum of twelve uniforms less six.
    pub fn normal(&mut self) -> f32 {
        ((0..12).map(|_| self.unit()).sum::<f64>() - 6.0) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn streams_are_reproducible_and_distinct() {
        let draw = |stream: Random| {
            let mut stream = stream;
            (0..4).map(|_| stream.next_u64()).collect::<Vec<_>>()
        };
        assert_eq!(draw(Random::keyed(1, 2)), draw(Random::keyed(1, 2)));
        assert_ne!(draw(Random::keyed(1, 2)), draw(Random::keyed(2, 1)));
        assert_ne!(draw(Random::keyed(1, 2)), draw(Random::keyed(1, 3)));
    }

    #[test]
    fn moments() {
        let mut r = Random::new(7);
        let n = 20_000;
        let xs: Vec<f64> = (0..n).map(|_| f64::from(r.normal())).collect();
        let mean = xs.iter().sum::<f64>() / n as f64;
        let var = xs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.05, "mean {mean} var {var}");
        let mut seen = [false; 10];
        (0..1000).for_each(|_| seen[r.below(10)] = true);
        assert!(seen.iter().all(|&s| s));
    }
}
