//! What a caller adds to the headers of a call: `metadata.NAME` in `execution_context`.

use base64::{
    Engine as _,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, HeaderName, HeaderValue};

/// What a key of `execution_context` begins with.
pub const PREFIX: &str = "metadata.";

/// Names that are HTTP's, or say how the call is made.
const RESERVED: [&str; 10] = [
    "host",
    "te",
    "content-type",
    "content-length",
    "user-agent",
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
];

/// With or without padding, as gRPC over HTTP/2 has binary values.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Checks one entry: the name without its prefix, in small letters, and the value.
///
/// # Errors
/// What is wrong with it; completes "KEY ...".
pub fn check(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let name = name.to_ascii_lowercase();
    let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b"_-.".contains(&c);
    if name.is_empty() || !name.bytes().all(legal) {
        return Err("has a name that no metadata has: letters, digits, _, - and . only".into());
    }
    if RESERVED.contains(&name.as_str()) || name.starts_with("grpc-") {
        return Err(format!("names {name}, which says how the call is made"));
    }
    let text = match name.ends_with("-bin") {
        true => {
            let bytes = BASE64.decode(value).map_err(|_| "isn't base64, as -bin values are")?;
            base64::engine::general_purpose::STANDARD_NO_PAD.encode(bytes)
        }
        false => value.to_owned(),
    };
    if !text.bytes().all(|c| (0x20..0x7f).contains(&c)) {
        return Err("has a value that isn't printable ASCII; name it NAME-bin for others".into());
    }
    let name = HeaderName::try_from(name).map_err(|error| format!("is wrong: {error}"))?;
    let value = HeaderValue::try_from(text).map_err(|error| format!("is wrong: {error}"))?;
    Ok((name, value))
}

/// Those entries as headers. What [`check`] refuses is left out.
#[must_use]
pub fn headers<'a>(entries: impl IntoIterator<Item = (&'a String, &'a String)>) -> HeaderMap {
    entries.into_iter().filter_map(|(name, value)| check(name, value).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_checked() {
        let (name, value) = check("X-Tenant", "a b").unwrap();
        assert_eq!((name.as_str(), value.as_bytes()), ("x-tenant", &b"a b"[..]));
        assert_eq!(check("k-bin", "/w==").unwrap().1, "/w");
        assert_eq!(check("k-bin", "/w").unwrap().1, "/w");
        for (name, value) in [
            ("", "x"),
            ("a b", "x"),
            (":path", "x"),
            ("GRPC-timeout", "1S"),
            ("te", "x"),
            ("Content-Type", "x"),
            ("a", "x\r\ny: z"),
            ("a", "ä"),
            ("a-bin", "%"),
        ] {
            assert!(check(name, value).is_err(), "{name}: {value}");
        }
    }
}
