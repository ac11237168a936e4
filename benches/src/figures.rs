//! Many measurements in three numbers.

use serde::Serialize;

/// The spread of a measurement; the unit is in the name of the field that
/// holds it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The median.
    pub p50: f64,
    /// One in a hundred is above this.
    pub p99: f64,
    /// How many there were.
    pub count: usize,
}

impl Spread {
    /// The spread of nanoseconds, in microseconds.
    pub fn of_ns_in_us(measured: impl IntoIterator<Item = u64>) -> Self {
        Self::of(measured.into_iter().map(|ns| real(ns) / 1000.0))
    }

    /// The spread of numbers; zeros if there are none.
    pub fn of(measured: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = measured.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |hundredths: usize| {
            let last = sorted.len().saturating_sub(1);
            sorted.get((last * hundredths).div_ceil(100)).copied().unwrap_or(0.0)
        };
        Self { min: rank(0), p50: rank(50), p99: rank(99), count: sorted.len() }
    }
}

/// A number for dividing; what is measured here stays far below 2^53.
pub fn real(number: u64) -> f64 {
    let high = u32::try_from(number >> 32).unwrap_or(u32::MAX);
    let low = u32::try_from(number & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_measured_values() {
        let spread = Spread::of_ns_in_us((1..=101).map(|n| n * 1000));
        assert_eq!(spread, Spread { min: 1.0, p50: 51.0, p99: 100.0, count: 101 });
        assert_eq!(Spread::of([]), Spread { min: 0.0, p50: 0.0, p99: 0.0, count: 0 });
    }

    #[test]
    fn large_numbers_keep_their_value() {
        assert!((real(5_000_000_000) - 5e9).abs() < 1e-3);
    }
}
