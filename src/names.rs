//! Checked names: once one of these types exists, its content is well formed.
//!
//! Everything here is parsed at the edge (request, policy file name, command
//! line) and carried as a type from there on.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Longest namespace, service or method name, in bytes.
pub const NAME_MAX: usize = 128;

/// Why a name was not accepted. Its text completes "NAME ...".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("is empty")]
    Empty,
    /// Over [`NAME_MAX`].
    #[error("is {length} bytes long; at most {NAME_MAX} are allowed")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// A character that this kind of name cannot hold.
    #[error("has {character:?} at byte {position}; allowed are {allowed}")]
    Character {
        /// The offender.
        character: char,
        /// Its byte offset.
        position: usize,
        /// What would have been fine.
        allowed: &'static str,
    },
    /// Not `sha256:` and 64 hexadecimal digits.
    #[error("is not a digest of the form \"sha256:\" followed by 64 hexadecimal digits")]
    Digest,
    /// Not 32 hexadecimal digits.
    #[error("is not a run id (32 hexadecimal digits)")]
    RunId,
}

fn check(
    text: &str,
    first: fn(char) -> bool,
    rest: fn(char) -> bool,
    allowed: &'static str,
) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > NAME_MAX {
        return Err(NameError::TooLong { length: text.len() });
    }
    for (position, character) in text.char_indices() {
        let fits = if position == 0 { first(character) } else { rest(character) };
        if !fits {
            return Err(NameError::Character { character, position, allowed });
        }
    }
    Ok(())
}

macro_rules! checked_name {
    ($(#[$doc:meta])* $name:ident, $first:expr, $rest:expr, $allowed:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check(text, $first, $rest, $allowed)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

fn alphanumeric(c: char) -> bool {
    c.is_ascii_alphanumeric()
}

fn dotted(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

fn identifier_start(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

checked_name!(
    /// A tenant: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`. Also a policy's file name,
    /// hence no slash and no leading dot.
    Namespace, alphanumeric, dotted, "A-Z a-z 0-9, and after the first character also . _ -"
);
checked_name!(
    /// A service, such as `greeter` or `helloworld.Greeter`.
    ServiceName, identifier_start, dotted, "A-Z a-z 0-9 _, and after the first character also . -"
);
checked_name!(
    /// A method of a service, such as `SayHello`.
    MethodName, identifier_start, dotted, "A-Z a-z 0-9 _, and after the first character also . -"
);

/// SHA-256 of an executable or of a policy; written `sha256:HEX`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Wraps the 32 bytes that a SHA-256 computation gave.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of `content`.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(content).into())
    }

    /// The raw 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// In one piece: every report and every audit record has several of these.
fn write_hex<const LENGTH: usize>(bytes: &[u8; LENGTH], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut pairs = [[0; 2]; LENGTH];
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    }
    f.write_str(std::str::from_utf8(pairs.as_flattened()).map_err(|_| fmt::Error)?)
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let hex = text.strip_prefix("sha256:").ok_or(NameError::Digest)?;
        parse_hex(hex).map(Self).ok_or(NameError::Digest)
    }
}

/// One execution, unique across dispatchers; 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RunId([u8; 16]);

impl RunId {
    /// A new id from 128 random bits.
    ///
    /// # Errors
    /// Whatever getrandom(2) reports; it does not fail once the kernel is up.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        // So few bytes come in one piece, getrandom(2).
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RunId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        parse_hex(text).map(Self).ok_or(NameError::RunId)
    }
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = (high * 16 + low) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_file_names_without_tricks() {
        for good in ["a", "demo", "0", "a.b-c_d", &"x".repeat(128)] {
            assert!(good.parse::<Namespace>().is_ok(), "{good}");
        }
        for bad in
            ["", ".", "..", ".hidden", "a/b", "-x", "_x", "a b", "ä", "a\0", &"x".repeat(129)]
        {
            assert!(bad.parse::<Namespace>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn digests_round_trip_and_take_either_case() {
        let digest = Digest::of(b"");
        let text = digest.to_string();
        assert_eq!(text, "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(text.parse(), Ok(digest));
        assert_eq!(text.to_uppercase().replace("SHA256", "sha256").parse(), Ok(digest));
        for bad in ["", "sha256:", "sha256:zz", "md5:00", &text[..70], &format!("{text}0")] {
            assert_eq!(bad.parse::<Digest>(), Err(NameError::Digest), "{bad}");
        }
    }

    #[test]
    fn run_ids_round_trip() {
        let id = RunId::random().unwrap();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("x".parse::<RunId>(), Err(NameError::RunId));
    }
}
