//! Kinds of values that are numbers: sizes, durations, counts, rates, and
//! limits of them.

use std::{fmt::Debug, marker::PhantomData, time::Duration};

use serde_json::{Value as Json, json};

use super::{
    fault::Fault,
    kinds::{Kind, Shown, Text, Wrong, toml_string},
    read::Item,
};
use crate::units::{self, Limit, MilliCpus, Rate, Size, Span};

/// The word that switches a limit off.
pub const UNLIMITED: &str = "unlimited";

/// A size of at least `MIN` bytes.
pub struct Bytes<const MIN: u64>;

impl<const MIN: u64> Kind for Bytes<MIN> {
    type Value = u64;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<u64> {
        const HELP: &str = "write a number of bytes or one with a unit, such as \"64MiB\"";
        let size = match (item.integer(), item.text()) {
            (Some(integer), _) => u64::try_from(integer).ok(),
            (None, Some(text)) => units::parse_size(text).ok(),
            (None, None) => None,
        };
        let Some(size) = size else {
            faults.push(item.wrong("a size", HELP));
            return None;
        };
        // The kernel takes the numbers above for "no limit".
        if size > i64::MAX as u64 {
            faults.push(item.fault("is more than any memory", format!("write {UNLIMITED:?}")));
            return None;
        }
        if size < MIN {
            let message = format!("is {}, less than the least possible", Size(size));
            faults.push(item.fault(message, format!("write at least \"{}\"", Size(MIN))));
            return None;
        }
        Some(size)
    }

    fn show(value: &u64) -> Shown {
        Shown::One(toml_string(&Size(*value).to_string()))
    }

    fn schema() -> Json {
        json!({ "anyOf": [
            { "type": "integer", "minimum": MIN },
            { "type": "string",
              "pattern": r"^[0-9]*\.?[0-9]* ?([bB]|[kKmMgGtT]([bB]|[iI][bB])?)?$" },
        ] })
    }
}

/// A duration of at least `MIN` milliseconds.
pub struct Time<const MIN: u64>;

impl<const MIN: u64> Kind for Time<MIN> {
    type Value = Duration;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Duration> {
        const HELP: &str = "write a number with a unit, such as \"1500ms\", \"30s\" or \"2m\"";
        let Some(duration) = item.text().and_then(|text| units::parse_duration(text).ok()) else {
            faults.push(item.wrong("a duration", HELP));
            return None;
        };
        let least = Duration::from_millis(MIN);
        if duration < least {
            let message = format!("is {}, less than the least possible", Span(duration));
            faults.push(item.fault(message, format!("write at least \"{}\"", Span(least))));
            return None;
        }
        Some(duration)
    }

    fn show(value: &Duration) -> Shown {
        Shown::One(toml_string(&Span(*value).to_string()))
    }

    fn schema() -> Json {
        json!({ "type": "string", "pattern": r"^[0-9]*\.?[0-9]* ?(ns|us|µs|ms|s|m|min|h|d)$" })
    }
}

/// A whole number from `MIN` to `MAX`.
pub struct Count<N, const MIN: u64, const MAX: u64>(PhantomData<N>);

impl<N, const MIN: u64, const MAX: u64> Kind for Count<N, MIN, MAX>
where
    N: TryFrom<u64> + Copy + Debug + PartialEq + ToString,
{
    type Value = N;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<N> {
        let number = item
            .integer()
            .and_then(|integer| u64::try_from(integer).ok())
            .filter(|number| (MIN..=MAX).contains(number))
            .and_then(|number| N::try_from(number).ok());
        if number.is_none() {
            let what = format!("a whole number from {MIN} to {MAX}");
            faults.push(item.wrong(&what, "write such a number, without quotes"));
        }
        number
    }

    fn show(value: &N) -> Shown {
        Shown::One(value.to_string())
    }

    fn schema() -> Json {
        json!({ "type": "integer", "minimum": MIN, "maximum": MAX })
    }
}

/// A number of processors.
pub struct Cpus;

impl Kind for Cpus {
    type Value = MilliCpus;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<MilliCpus> {
        let cpus = item.number().and_then(MilliCpus::from_f64);
        if cpus.is_none() {
            let what = "a number of processors from 0.001 to 1024";
            faults.push(item.wrong(what, "write such a number, without quotes, such as 0.5"));
        }
        cpus
    }

    fn show(value: &MilliCpus) -> Shown {
        Shown::One(format!("{:?}", value.as_f64()))
    }

    fn schema() -> Json {
        json!({ "type": "number", "minimum": 0.001, "maximum": 1024 })
    }
}

/// Calls per second.
pub struct PerSecond;

impl Text for PerSecond {
    type Value = Rate;
    const WHAT: &'static str = "a rate";
    const HELP: &'static str = "write a number per s, m or h, such as \"100/s\"";

    fn parse(text: &str) -> Result<Rate, Wrong> {
        units::parse_rate(text).map_err(|_| Wrong::is_not(text, Self::WHAT, Self::HELP))
    }

    fn show(value: &Rate) -> String {
        // The unit in which it is a whole number, as it was most likely written.
        [(1.0, "s"), (60.0, "m"), (3600.0, "h")]
            .into_iter()
            .map(|(seconds, unit)| (value.0 * seconds, unit))
            .find(|(number, _)| *number >= 1.0 && number.fract() == 0.0)
            .map_or_else(|| format!("{}/s", value.0), |(number, unit)| format!("{number}/{unit}"))
    }

    fn pattern() -> Option<&'static str> {
        Some(r"^[0-9]*\.?[0-9]* ?/[smh]$")
    }
}

/// A limit that can be switched off in so many words.
pub struct Limited<K>(PhantomData<K>);

impl<K: Kind> Kind for Limited<K> {
    type Value = Limit<K::Value>;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Self::Value> {
        if item.text() == Some(UNLIMITED) {
            return Some(Limit::Unlimited);
        }
        K::read(item, faults).map(Limit::At)
    }

    fn show(value: &Self::Value) -> Shown {
        match value {
            Limit::At(value) => K::show(value),
            Limit::Unlimited => Shown::One(toml_string(UNLIMITED)),
        }
    }

    fn schema() -> Json {
        json!({ "anyOf": [K::schema(), { "const": UNLIMITED }] })
    }
}
