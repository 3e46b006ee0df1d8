//! Rounding to fp8, by search among all numbers.

use crate::fp8::{EXPONENTS, LARGEST, number, value};

/// The numbers of e4m3, ascending.
#[derive(Debug)]
pub(super) struct Outward(Vec<f64>);

impl Outward {
    pub(super) fn new() -> Self {
        let mut numbers: Vec<f64> = (0..0x7f).map(|code| f64::from(number(code))).collect();
        numbers.extend((1..0x7f).map(|code| -f64::from(number(code))));
        numbers.sort_by(f64::total_cmp);
        Outward(numbers)
    }

    /// What is read of a two-sided digest that was written as fp8. The arithmetic is exact in f64.
    pub(super) fn round(&self, values: &[f32]) -> Vec<f32> {
        let Outward(numbers) = self;
        let power = |s: i32| 2f64.powi(s);
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        let fits = |s: &i32| f64::from(LARGEST) * power(*s) >= f64::from(largest);
        let s = EXPONENTS.into_iter().find(fits).unwrap_or(*EXPONENTS.end());
        let (high, low) = values.split_at(values.len() / 2);
        let last = numbers.len() - 1;
        let up = |v: &f32| {
            let x = f64::from(*v) / power(s);
            numbers[numbers.partition_point(|n| *n < x).min(last)]
        };
        let down = |v: &f32| {
            let x = f64::from(*v) / power(s);
            numbers[numbers.partition_point(|n| *n <= x).saturating_sub(1)]
        };
        let rounded = high.iter().map(up).chain(low.iter().map(down));
        rounded.map(|x| value(x as f32, power(s) as f32)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_outward_to_the_next_number() {
        let outward = Outward::new();
        assert_eq!(outward.round(&[448.0, 1.01, -1.01, 0.0]), [448.0, 1.125, -1.125, 0.0]);
        assert_eq!(outward.round(&[448.1, 1.01, 1.01, -0.01]), [480.0, 1.125, 1.0, -3.0 * 2f32.powi(-8)]);
        assert_eq!(outward.round(&[0.0, -1e-45, 1e-45, -0.0]), [0.0; 4]);
        assert_eq!(outward.round(&[1e-45, -1e-45]), [2f32.powi(-135), -2f32.powi(-135)]);
        assert_eq!(outward.round(&[f32::MAX, f32::MIN]), [f32::MAX, f32::MIN]);
        assert_eq!(
            outward.round(&[f32::MAX, 1e-45, 0.0, -1e-45]),
            [f32::MAX, 2f32.powi(111), 0.0, -2f32.powi(111)]
        );
    }
}
