//! From samples to figures.

use std::time::Duration;

use serde::Serialize;

/// What a number of samples comes to, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub runs: usize,
    pub min_ms: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub mean_ms: f64,
    pub max_ms: f64,
}

impl Summary {
    /// `None` of no samples.
    pub fn of(samples: &[Duration]) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.iter().map(|sample| milliseconds(*sample)).collect();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            runs: sorted.len(),
            min_ms: *sorted.first()?,
            p50_ms: quantile(&sorted, 50),
            p99_ms: quantile(&sorted, 99),
            mean_ms: sorted.iter().sum::<f64>() / sorted.len() as f64,
            max_ms: *sorted.last()?,
        })
    }
}

/// The least sample that so many percent don't exceed: one that was measured, nothing in between.
fn quantile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() * percent).div_ceil(100) - 1]
}

/// The middle one, in milliseconds; 0 of none.
pub fn median_ms(samples: impl IntoIterator<Item = Duration>) -> f64 {
    let samples: Vec<Duration> = samples.into_iter().collect();
    Summary::of(&samples).map_or(0.0, |summary| summary.p50_ms)
}

/// A duration as the figures have it.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
