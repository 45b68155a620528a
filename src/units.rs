//! Sizes, durations, processor shares and rates as people write them.
//!
//! One parser for policy files, the server's file, flags and
//! `execution_context`, so that `"512m"` means the same everywhere.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// A limit that may be switched off, in so many words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Limit<T> {
    /// At most this much.
    At(T),
    /// No limit; written `"unlimited"`.
    Unlimited,
}

impl<T: PartialOrd + Copy> Limit<T> {
    /// Whether `value` stays within the limit.
    #[must_use]
    pub fn allows(&self, value: T) -> bool {
        match self {
            Self::At(limit) => value <= *limit,
            Self::Unlimited => true,
        }
    }

    /// The number, or `None` when unlimited.
    #[must_use]
    pub fn finite(self) -> Option<T> {
        match self {
            Self::At(limit) => Some(limit),
            Self::Unlimited => None,
        }
    }

    /// The tighter of this limit and an asked-for value.
    #[must_use]
    pub fn tightened(self, asked: Option<T>) -> Self {
        match (self, asked) {
            (limit, None) => limit,
            (Self::At(limit), Some(value)) if limit < value => Self::At(limit),
            (_, Some(value)) => Self::At(value),
        }
    }
}

/// Thousandths of a processor's time: 1500 is one and a half processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MilliCpus(pub u32);

impl MilliCpus {
    /// From a number such as 0.5; `None` when it is not positive, not finite or over 1024.
    #[must_use]
    pub fn from_f64(cpus: f64) -> Option<Self> {
        let milli = (cpus * 1000.0).round();
        (1.0..=1_024_000.0).contains(&milli).then_some(Self(milli as u32))
    }

    /// As a number of processors.
    #[must_use]
    pub fn as_f64(self) -> f64 {
        f64::from(self.0) / 1000.0
    }
}

impl fmt::Display for MilliCpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_f64())
    }
}

/// Calls per second; written `"100/s"`, `"30/m"` or `"5/h"`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
pub struct Rate(pub f64);

/// Why a quantity was not accepted; says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error(
        "{0:?} is not a size; write a number of bytes or one with a unit, such as \"64MiB\", \"64M\" or \"512m\""
    )]
    Size(String),
    /// Not a duration.
    #[error(
        "{0:?} is not a duration; write a number with a unit, such as \"1500ms\", \"30s\" or \"2m\""
    )]
    Duration(String),
    /// Not a number of processors.
    #[error("{0:?} is not a number of processors; write one from 0.001 to 1024, such as 0.5")]
    Cpus(String),
    /// Not a rate.
    #[error("{0:?} is not a rate; write a number per s, m or h, such as \"100/s\"")]
    Rate(String),
}

/// Reads a size in bytes: `64MiB`, `64M`, `512m`, `0`; all multiples are binary.
///
/// # Errors
/// [`UnitError::Size`] for anything else, also where it would not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let error = || UnitError::Size(text.to_owned());
    let (number, unit) = split_number(text).ok_or_else(error)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(error()),
    };
    scale(number, f64::from(2_u32).powi(shift)).ok_or_else(error)
}

/// Reads a duration: `1500ms`, `30s`, `2m`, `1h`, `250us`.
///
/// # Errors
/// [`UnitError::Duration`] for anything else, also for a bare number.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let error = || UnitError::Duration(text.to_owned());
    let (number, unit) = split_number(text).ok_or_else(error)?;
    let nanoseconds = match unit {
        "ns" => 1.0,
        "us" | "µs" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        "m" | "min" => 60e9,
        "h" => 3600e9,
        "d" => 86_400e9,
        _ => return Err(error()),
    };
    scale(number, nanoseconds).map(Duration::from_nanos).ok_or_else(error)
}

/// Reads a number of processors such as `0.5`.
///
/// # Errors
/// [`UnitError::Cpus`] outside 0.001 to 1024.
pub fn parse_cpus(text: &str) -> Result<MilliCpus, UnitError> {
    split_number(text)
        .filter(|(_, unit)| unit.is_empty())
        .and_then(|(number, _)| number.parse().ok())
        .and_then(MilliCpus::from_f64)
        .ok_or_else(|| UnitError::Cpus(text.to_owned()))
}

/// Reads a rate such as `100/s`.
///
/// # Errors
/// [`UnitError::Rate`] for anything else, and for zero.
pub fn parse_rate(text: &str) -> Result<Rate, UnitError> {
    let error = || UnitError::Rate(text.to_owned());
    let (number, unit) = split_number(text).ok_or_else(error)?;
    let seconds = match unit {
        "/s" => 1.0,
        "/m" => 60.0,
        "/h" => 3600.0,
        _ => return Err(error()),
    };
    let rate = number.parse::<f64>().map_err(|_| error())? / seconds;
    if rate > 0.0 && rate.is_finite() { Ok(Rate(rate)) } else { Err(error()) }
}

/// Splits `"1.5MiB"` into `"1.5"` and `"MiB"`; no sign, no exponent.
fn split_number(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let digits = number.bytes().filter(u8::is_ascii_digit).count();
    let dots = number.len() - digits;
    (digits > 0 && dots <= 1).then(|| (number, unit.strip_prefix(' ').unwrap_or(unit)))
}

fn scale(number: &str, factor: f64) -> Option<u64> {
    // Whole numbers stay exact; only fractions go through floating point.
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor as u64);
    }
    let value = (number.parse::<f64>().ok()? * factor).round();
    (value < u64::MAX as f64).then_some(value as u64)
}

/// Shows a size the way it would be written: `64MiB`, `1536KiB`, `100`.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >> shift > 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Shows a duration the way it would be written: `1500ms`, `30s`, `2m`.
pub struct Span(pub Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        for (unit, name) in [
            (3_600_000_000_000, "h"),
            (60_000_000_000, "m"),
            (1_000_000_000, "s"),
            (1_000_000, "ms"),
            (1_000, "us"),
        ] {
            if nanoseconds >= unit && nanoseconds.is_multiple_of(unit) {
                return write!(f, "{}{name}", nanoseconds / unit);
            }
        }
        if nanoseconds == 0 { f.write_str("0s") } else { write!(f, "{nanoseconds}ns") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_in_every_spelling() {
        for (text, bytes) in [
            ("0", 0),
            ("100", 100),
            ("64MiB", 64 << 20),
            ("64M", 64 << 20),
            ("512m", 512 << 20),
            ("1.5k", 1536),
            ("1 GiB", 1 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in
            ["", "m", "-1", "1e3", "1.2.3m", "64 miles", ".", "99999999999999999999", "99999999T"]
        {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("0.5s"), Ok(Duration::from_millis(500)));
        for bad in ["", "30", "s", "-1s", "1 fortnight", "1e9s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cpus_and_rates() {
        assert_eq!(parse_cpus("0.5"), Ok(MilliCpus(500)));
        assert!(parse_cpus("0").is_err());
        assert!(parse_cpus("NaN").is_err());
        assert_eq!(parse_rate("30/m"), Ok(Rate(0.5)));
        assert!(parse_rate("0/s").is_err());
        assert!(parse_rate("100").is_err());
    }

    #[test]
    fn shown_as_written() {
        assert_eq!(Size(64 << 20).to_string(), "64MiB");
        assert_eq!(Size(1000).to_string(), "1000");
        assert_eq!(Size(0).to_string(), "0");
        assert_eq!(Span(Duration::from_secs(90)).to_string(), "90s");
        assert_eq!(Span(Duration::from_secs(120)).to_string(), "2m");
        assert_eq!(Span(Duration::ZERO).to_string(), "0s");
    }

    #[test]
    fn a_request_only_tightens() {
        assert_eq!(Limit::At(5).tightened(Some(3)), Limit::At(3));
        assert_eq!(Limit::At(5).tightened(Some(9)), Limit::At(5));
        assert_eq!(Limit::Unlimited.tightened(Some(9)), Limit::At(9));
        assert!(!Limit::At(5).allows(6));
    }
}
