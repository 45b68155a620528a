//! The RPC's own deadline.

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// Most time that is kept for ending a run and reporting it.
const MARGIN_MAX: Duration = Duration::from_millis(100);

/// When a call that arrived at `arrival` must be over, so that its report is
/// there before the caller stops waiting: 100 ms, or a tenth of the time given,
/// before the deadline. The transport's own timer only fires at the deadline.
#[must_use]
pub fn end_by(arrival: Instant, metadata: &MetadataMap) -> Option<Instant> {
    let timeout = grpc_timeout(metadata.get("grpc-timeout")?.to_str().ok()?)?;
    let margin = MARGIN_MAX.min(timeout / 10);
    arrival.checked_add(timeout - margin)
}

/// Reads a `grpc-timeout` header: at most 8 digits and a unit.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(amount * 3600)),
        'M' => Some(Duration::from_secs(amount * 60)),
        'S' => Some(Duration::from_secs(amount)),
        'm' => Some(Duration::from_millis(amount)),
        'u' => Some(Duration::from_micros(amount)),
        'n' => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_specification_has_them() {
        for (text, expected) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("30S", Duration::from_secs(30)),
            ("1500m", Duration::from_millis(1500)),
            ("7u", Duration::from_micros(7)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(grpc_timeout(text), Some(expected), "{text}");
        }
        for bad in ["", "S", "123456789S", "-1S", "1.5S", "1s", "1ä", "+1S"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn some_time_is_kept_for_the_report() {
        let now = Instant::now();
        let end = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            end_by(now, &metadata).unwrap() - now
        };
        assert_eq!(end("10S"), Duration::from_millis(9900));
        assert_eq!(end("500m"), Duration::from_millis(450));
        assert_eq!(end("0m"), Duration::ZERO);
        assert_eq!(end_by(now, &MetadataMap::new()), None);
    }
}
