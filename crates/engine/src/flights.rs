//! Prompts that go through the layers one by one: how many at a time, where their hidden states are, and what each runs in a step.
//!
//! A prompt that fits a step whole runs as rows of its batch, through all layers at once. A longer one *takes off*: it gets rows of
//! the store of hidden states, and goes some layers further in each step, all of its tokens in a layer before the next one. Work is
//! counted in tokens times layers.
//!
//! Prompts are *short* if they would fit a step of their own. One place is for short ones alone, and long ones leave a quarter of
//! each step to them, so a short prompt never waits for a long one to land.

use std::ops::Range;

use crate::config::{Config, Prefill, Segments};

/// Pieces in which a prompt goes on in a step, at most: the rest of a layer, whole layers, a part of one.
pub(crate) const LEGS_MAX: usize = 3;

/// How far a prompt has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flight {
    /// Its tokens without those that were cached: positions `start..end`.
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// The layer in which it is, and how many of the tokens have been through that.
    pub(crate) layer: usize,
    pub(crate) tokens: usize,
    /// Rows of the store of hidden states.
    pub(crate) hidden: Range<usize>,
    is_short: bool,
    /// Work that it may do in the step at hand.
    pub(crate) granted: usize,
}

/// Tokens of a flight in some layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leg {
    pub(crate) layers: Range<usize>,
    pub(crate) positions: Range<usize>,
}

impl Flight {
    /// What is left to do before it lands.
    pub(crate) fn work_left(&self, layers: usize) -> usize {
        (layers - self.layer) * (self.end - self.start) - self.tokens
    }

    /// Whether it has been through all layers.
    pub(crate) fn has_landed(&self, layers: usize) -> bool {
        self.layer == layers
    }

    /// Goes on for `work`; tells the legs in order.
    pub(crate) fn fly(&mut self, mut work: usize, layers: usize, mut leg: impl FnMut(Leg)) {
        let len = self.end - self.start;
        while work > 0 && self.layer < layers {
            let whole = if self.tokens == 0 { (work / len).min(layers - self.layer) } else { 0 };
            if whole > 0 {
                leg(Leg { layers: self.layer..self.layer + whole, positions: self.start..self.end });
                self.layer += whole;
                work -= whole * len;
                continue;
            }
            let tokens = work.min(len - self.tokens);
            let from = self.start + self.tokens;
            leg(Leg { layers: self.layer..self.layer + 1, positions: from..from + tokens });
            self.tokens += tokens;
            work -= tokens;
            if self.tokens == len {
                (self.layer, self.tokens) = (self.layer + 1, 0);
            }
        }
    }
}

/// The places and the hidden rows of prompts that go layer by layer.
pub(crate) struct Flights {
    /// `None` where prompts are chunked.
    bounds: Option<Segments>,
    inject_tokens: usize,
    /// Hidden rows in use, ascending.
    used: Vec<Range<usize>>,
    long: usize,
    /// Flights that ended since the start: who found no place need not look again before this changes.
    pub(crate) ended: u64,
}

impl Flights {
    pub(crate) fn new(config: &Config) -> Self {
        let bounds = match config.prefill {
            Prefill::Chunked => None,
            Prefill::Segmented(segments) => Some(segments),
        };
        Flights {
            bounds,
            inject_tokens: config.max_inject_tokens,
            used: Vec::with_capacity(bounds.map_or(0, |b| b.prompts)),
            long: 0,
            ended: 0,
        }
    }

    /// Layers that work is counted in; 1 where prompts are chunked.
    pub(crate) fn layers(&self) -> usize {
        self.bounds.map_or(1, |bounds| bounds.layers)
    }

    /// Whether prompts go layer by layer.
    pub(crate) fn is_on(&self) -> bool {
        self.bounds.is_some()
    }

    /// Prompts on their way.
    pub(crate) fn count(&self) -> usize {
        self.used.len()
    }

    /// Whether a prompt of so many tokens fits a step of its own.
    pub(crate) fn is_short(&self, tokens: usize) -> bool {
        tokens <= self.inject_tokens
    }

    /// Whether a prompt of `tokens` tokens could take off now.
    pub(crate) fn has_room(&self, tokens: usize) -> bool {
        let Some(bounds) = self.bounds else { return false };
        let long_max = (bounds.prompts - 1).max(1);
        let free_place = self.used.len() < bounds.prompts && (self.is_short(tokens) || self.long < long_max);
        free_place && self.gap(tokens, bounds.hidden_rows).is_some()
    }

    /// The place of the first free `tokens` hidden rows among `used`, and the first of them.
    fn gap(&self, tokens: usize, rows: usize) -> Option<(usize, usize)> {
        let mut free_from = 0;
        for (place, used) in self.used.iter().enumerate() {
            if free_from + tokens <= used.start {
                return Some((place, free_from));
            }
            free_from = used.end;
        }
        (free_from + tokens <= rows).then_some((self.used.len(), free_from))
    }

    /// Takes off with the tokens at `positions`, if there is room.
    pub(crate) fn take_off(&mut self, positions: Range<usize>) -> Option<Flight> {
        if !self.has_room(positions.len()) {
            return None;
        }
        let (place, row) = self.gap(positions.len(), self.bounds?.hidden_rows)?;
        let hidden = row..row + positions.len();
        self.used.insert(place, hidden.clone());
        let is_short = self.is_short(positions.len());
        self.long += usize::from(!is_short);
        Some(Flight {
            start: positions.start,
            end: positions.end,
            layer: 0,
            tokens: 0,
            hidden,
            is_short,
            granted: 0,
        })
    }

    /// A flight has landed, or was broken off: its place and its rows are free.
    pub(crate) fn end(&mut self, flight: Option<Flight>) {
        let Some(flight) = flight else { return };
        let place = self.used.iter().position(|used| *used == flight.hidden);
        self.used.remove(place.expect("a flight has its rows"));
        self.long -= usize::from(!flight.is_short);
        self.ended += 1;
    }

    /// Panics unless these are all flights there are.
    pub(crate) fn check<'a>(&self, flights: impl Iterator<Item = &'a Flight>) {
        let (mut count, mut long) = (0, 0);
        for flight in flights {
            (count, long) = (count + 1, long + usize::from(!flight.is_short));
            assert!(self.used.contains(&flight.hidden), "a flight has its rows");
            assert!(flight.start < flight.end && flight.hidden.len() == flight.end - flight.start);
            assert!(
                flight.layer < self.layers() && flight.tokens < flight.end - flight.start,
                "still on its way"
            );
        }
        assert_eq!((count, long), (self.used.len(), self.long), "rows are those of flights");
        assert!(self.used.is_sorted_by(|a, b| a.end <= b.start), "nobody shares hidden rows");
        let bounds = self.bounds.map_or((0, 0), |b| (b.prompts, b.hidden_rows));
        assert!(count <= bounds.0 && self.used.last().is_none_or(|last| last.end <= bounds.1));
    }
}

/// What a step may still do for prompts.
pub(crate) struct StepBudget {
    /// Tokens times layers.
    work: usize,
    /// Of these, what long prompts that go layer by layer leave to others.
    kept: usize,
    layers: usize,
    pub(crate) replay_rows: usize,
}

impl StepBudget {
    pub(crate) fn new(inject_tokens: usize, flights: &Flights, replay_rows: usize) -> Self {
        let layers = flights.layers();
        let work = inject_tokens.saturating_mul(layers);
        StepBudget { work, kept: if flights.is_on() { work / 4 } else { 0 }, layers, replay_rows }
    }

    /// Tokens that could still run through all layers.
    pub(crate) fn tokens(&self) -> usize {
        self.work / self.layers
    }

    /// Takes tokens that run through all layers.
    pub(crate) fn take_tokens(&mut self, tokens: usize) {
        self.work -= tokens * self.layers;
    }

    /// Grants a flight work, as far as it has some to do.
    pub(crate) fn grant(&mut self, flight: &mut Flight) {
        let kept = if flight.is_short { 0 } else { self.kept };
        let wanted = flight.work_left(self.layers) - flight.granted;
        let work = wanted.min(self.work.saturating_sub(kept));
        flight.granted += work;
        self.work -= work;
    }

    /// From here on long prompts may have all that is left.
    pub(crate) fn keep_nothing(&mut self) {
        self.kept = 0;
    }
}

#[cfg(test)]
mod tests {
    use ops::Random;

    use super::*;
    use crate::tests::support::config;

    fn flights(prompts: usize, hidden_rows: usize) -> Flights {
        let prefill = Prefill::Segmented(Segments { layers: 5, prompts, hidden_rows });
        Flights::new(&Config { prefill, max_inject_tokens: 16, ..config(10) })
    }

    /// Whatever the pieces, every token goes through every layer once, in order.
    #[test]
    fn legs_cover_every_layer_of_every_token() {
        for seed in 0..200 {
            println!("seed {seed}");
            let mut random = Random::new(seed);
            let (start, len) = (random.below(9), 1 + random.below(40));
            let mut flights = flights(2, 100);
            let mut flight = flights.take_off(start..start + len).expect("room");
            let mut through = vec![0; len];
            while !flight.has_landed(5) {
                let left = flight.work_left(5);
                let work = 1 + random.below(90);
                let mut legs = 0;
                flight.fly(work, 5, |leg| {
                    legs += 1;
                    for layer in leg.layers.clone() {
                        for position in leg.positions.clone() {
                            assert_eq!(through[position - start], layer, "in order");
                            through[position - start] += 1;
                        }
                    }
                    assert!(leg.layers.len() == 1 || leg.positions == (start..start + len));
                });
                assert!(legs <= LEGS_MAX);
                assert_eq!(left - work.min(left), flight.work_left(5));
            }
            assert!(through.iter().all(|&layers| layers == 5));
            flights.end(Some(flight));
            flights.check([].iter());
        }
    }

    #[test]
    fn one_place_is_for_short_prompts() {
        let mut flights = flights(3, 100);
        let first = flights.take_off(0..40).expect("room");
        let second = flights.take_off(0..17).expect("room");
        assert!(!flights.has_room(17) && flights.has_room(16), "the last one is for short ones");
        let short = flights.take_off(7..23).expect("room");
        assert!(!flights.has_room(1));
        flights.check([first.clone(), second.clone(), short.clone()].iter());
        assert_eq!((second.hidden.clone(), short.hidden.clone()), (40..57, 57..73));
        flights.end(Some(second));
        assert!(flights.has_room(27) && !flights.has_room(28), "17 rows between others and 27 behind them");
        flights.end(Some(first));
        assert_eq!(flights.take_off(0..57).map(|f| f.hidden), Some(0..57));
        flights.end(Some(short));
        assert_eq!(flights.ended, 3);
    }

    #[test]
    fn long_prompts_leave_a_quarter_to_short_ones() {
        let mut flights = flights(3, 200);
        let mut long = flights.take_off(0..100).expect("room");
        let mut budget = StepBudget::new(16, &flights, 0);
        budget.grant(&mut long);
        assert_eq!((long.granted, budget.tokens()), (60, 4));
        let mut short = flights.take_off(0..10).expect("room");
        budget.grant(&mut short);
        assert_eq!(short.granted, 20);
        budget.keep_nothing();
        budget.grant(&mut long);
        assert_eq!((long.granted, budget.tokens()), (60, 0), "nothing was left");
    }
}
